// Checks shared by the CPU and CUDA operators: each message has the position, both values and the rule.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <tuple>

namespace audio_lottery {

using at::IntArrayRef;
using at::Tensor;
using at::TensorList;

inline void check_dtype(const Tensor& weight, size_t i) {
  auto t = weight.scalar_type();
  TORCH_CHECK_TYPE(t == at::kFloat || t == at::kBFloat16 || t == at::kHalf || t == at::kDouble, "weights[", i,
                   "] must be float32, bfloat16, float16 or float64, got ", t);
}

inline void check_device(TensorList weights, size_t i) {
  TORCH_CHECK_VALUE(weights[i].device() == weights[0].device(), "all weights must be on one device: weights[0] is on ",
                    weights[0].device(), ", weights[", i, "] on ", weights[i].device());
}

// One mask a weight: bool, of its shape, on its device; all weights on one device.
inline void check_masks(TensorList weights, TensorList masks) {
  TORCH_CHECK_VALUE(weights.size() == masks.size(), "weights and masks must be as many, got ", weights.size(), " and ",
                    masks.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    check_dtype(weights[i], i);
    TORCH_CHECK_TYPE(masks[i].scalar_type() == at::kBool, "masks[", i, "] must be bool, got ", masks[i].scalar_type());
    TORCH_CHECK_VALUE(weights[i].sizes() == masks[i].sizes(), "masks[", i, "] must have the shape of weights[", i,
                      "], got ", masks[i].sizes(), " and ", weights[i].sizes());
    check_device(weights, i);
    TORCH_CHECK_VALUE(masks[i].device() == weights[i].device(), "masks[", i, "] must be on the device of weights[", i,
                      "], got ", masks[i].device(), " and ", weights[i].device());
  }
}

// No gradients at all, or one a weight with its dtype, shape and device.
inline void check_grads(TensorList weights, TensorList grads) {
  TORCH_CHECK_VALUE(grads.empty() || grads.size() == weights.size(), "grads must be empty or as many as weights, got ",
                    grads.size(), " and ", weights.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    TORCH_CHECK_TYPE(grads[i].scalar_type() == weights[i].scalar_type(), "grads[", i, "] must have the dtype of weights[",
                     i, "], got ", grads[i].scalar_type(), " and ", weights[i].scalar_type());
    TORCH_CHECK_VALUE(grads[i].sizes() == weights[i].sizes(), "grads[", i, "] must have the shape of weights[", i,
                      "], got ", grads[i].sizes(), " and ", weights[i].sizes());
    TORCH_CHECK_VALUE(grads[i].device() == weights[i].device(), "grads[", i, "] must be on the device of weights[", i,
                      "], got ", grads[i].device(), " and ", weights[i].device());
  }
}

inline void check_blocks(TensorList weights, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(rows >= 1 && columns >= 1, "rows and columns must be at least 1, got ", rows, " and ", columns);
  for (size_t i = 0; i < weights.size(); ++i) {
    check_dtype(weights[i], i);
    TORCH_CHECK_VALUE(weights[i].dim() >= 2, "weights[", i, "] must have at least 2 dimensions, got ", weights[i].dim(),
                      " (a block is a tile of a matrix)");
    check_device(weights, i);
  }
}

// Magnitudes are compared as bits, so they must be of one dtype.
inline void check_one_dtype(TensorList weights) {
  for (size_t i = 1; i < weights.size(); ++i) {
    TORCH_CHECK_TYPE(weights[i].scalar_type() == weights[0].scalar_type(),
                     "all weights must have one dtype: weights[0] is ", weights[0].scalar_type(), ", weights[", i, "] ",
                     weights[i].scalar_type());
  }
}

inline void check_finite(bool finite, size_t i) {
  TORCH_CHECK_VALUE(finite, "weights[", i, "] has a NaN or infinite value (magnitudes must be finite to be ranked)");
}

inline void check_keep(int64_t keep, int64_t survivors) {
  TORCH_CHECK_VALUE(keep >= 0 && keep <= survivors, "keep must be between 0 and the ", survivors,
                    " surviving weights, got ", keep);
}

// The loss and its gradients by encoder_out, predictor_out, weight and bias.
using TransducerLoss = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline void check_shape(const Tensor& x, IntArrayRef shape, const Tensor& first, at::ScalarType type, const char* name) {
  TORCH_CHECK_TYPE(x.scalar_type() == type, name, " must be ", type, ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.sizes() == shape, name, " must have the shape ", shape, ", got ", x.sizes());
  TORCH_CHECK_VALUE(x.device() == first.device(), name, " must be on the device of encoder_out, got ", x.device(), " and ",
                    first.device());
}

inline void check_lengths(IntArrayRef lengths, int64_t batch, int64_t least, int64_t most, const char* name) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(lengths.size()) == batch, name, " must be one an utterance, got ",
                    lengths.size(), " for ", batch);
  for (size_t b = 0; b < lengths.size(); ++b) {
    TORCH_CHECK_VALUE(lengths[b] >= least && lengths[b] <= most, name, "[", b, "] must be between ", least, " and ", most,
                      ", got ", lengths[b]);
  }
}

// encoder_out (B, T, J), predictor_out (B, U + 1, J), weight (V, J), bias (V,), targets (B, U).
inline void check_transducer(const Tensor& encoder_out, const Tensor& predictor_out, const Tensor& weight,
                             const Tensor& bias, const Tensor& targets, IntArrayRef lengths,
                             IntArrayRef target_lengths) {
  TORCH_CHECK_VALUE(encoder_out.dim() == 3, "encoder_out must be (batch, frames, joiner), got ", encoder_out.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) >= 1, "weight must be (tokens, joiner), got ", weight.sizes());
  TORCH_CHECK_VALUE(targets.dim() == 2, "targets must be (batch, tokens), got ", targets.sizes());
  const int64_t batch = encoder_out.size(0), joiner = encoder_out.size(2), width = targets.size(1) + 1;
  check_shape(encoder_out, encoder_out.sizes(), encoder_out, at::kFloat, "encoder_out");
  check_shape(predictor_out, {batch, width, joiner}, encoder_out, at::kFloat, "predictor_out");
  check_shape(weight, {weight.size(0), joiner}, encoder_out, at::kFloat, "weight");
  check_shape(bias, {weight.size(0)}, encoder_out, at::kFloat, "bias");
  check_shape(targets, {batch, width - 1}, encoder_out, at::kLong, "targets");
  check_lengths(lengths, batch, 1, encoder_out.size(1), "lengths");
  check_lengths(target_lengths, batch, 0, width - 1, "target_lengths");
}

// targets: on a CPU, contiguous.
inline void check_targets(const Tensor& targets, int64_t tokens, IntArrayRef target_lengths) {
  const auto* at = targets.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < targets.size(0); ++b) {
    for (int64_t u = 0; u < target_lengths[b]; ++u) {
      const int64_t target = at[b * targets.size(1) + u];
      TORCH_CHECK_VALUE(target >= 0 && target < tokens, "targets[", b, "][", u, "] must be between 0 and ", tokens - 1,
                        ", got ", target);
    }
  }
}

// A weight as a matrix, (size(0), the rest flattened), and its tiles of rows x columns, which are cut to its size.
struct Blocks {
  int64_t height, width, rows, columns, down, across;

  Blocks(const Tensor& weight, int64_t most_rows, int64_t most_columns)
      : height(weight.size(0)),
        width(c10::multiply_integers(weight.sizes().slice(1))),
        rows(std::min(most_rows, std::max<int64_t>(height, 1))),
        columns(std::min(most_columns, std::max<int64_t>(width, 1))),
        down((height + rows - 1) / rows),
        across((width + columns - 1) / columns) {}
};

}  // namespace audio_lottery
