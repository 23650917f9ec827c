// transducer_loss on CPU: joiner, log-softmax and lattice of the transducer, and the gradients, with a tile of cells in
// the caches instead of a matrix (cells, joiner) or (cells, tokens) in memory.
//
// A cell (t, u) of an utterance stands for "t frames are over, u tokens are said": a blank leads to (t + 1, u), the next
// label to (t, u + 1). The lattice needs two numbers of a cell's log-softmax, so one pass makes the logits tile by tile
// and keeps those. Forward and backward recursion (alpha, beta; Graves 2012, eq. 16 and 18) give how much of all
// alignments' probability goes through a cell, by its blank and by its label. A second pass makes the tiles again and the
// gradient of the logits, softmax times the first less the other two, and multiplies it into the sums at once. Cells that
// less than LEAST goes through are left out: together they are below float32's rounding of the rest.
//
// Utterances are dealt to GROUPS, each with its own sums, added in order: the bits do not depend on the threads.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "vector.h"

namespace audio_lottery {
namespace {

constexpr int64_t LINE = 16;       // floats of a cache line; a multiple of every vector
constexpr int64_t TILE = 64;       // cells whose joiner and logits are in the caches
constexpr int64_t GROUPS = 16;     // sums of the output layer's gradients
constexpr double LEAST = 1e-12;

// The output layer; joiner and padded (tokens and more) are multiples of LINE, filled with zeros. The bias of a token that
// is none is so low that its exp is 0.
struct Joiner {
  const float *weight, *weight_t, *bias;  // (tokens, joiner), (joiner, padded), (padded,)
  int64_t joiner, tokens, padded;
};

struct Utterance {
  const float *encoder_out, *predictor_out;  // (frames, joiner), (width, joiner)
  const int64_t* targets;                    // (width - 1,)
  int64_t frames, width;
  float *d_encoder_out, *d_predictor_out, *d_weight, *d_bias;
  int64_t cells() const { return frames * width; }
};

// How much of the alignments' probability goes through a cell, and on by which way.
struct Occupied {
  float in_all, by_blank, by_label;
};

double either(double a, double b) {  // log(exp(a) + exp(b))
  const double high = a > b ? a : b, low = a > b ? b : a;
  return low == -INFINITY ? high : high + std::log1p(std::exp(low - high));
}

// What a thread needs.
struct Scratch {
  std::vector<double> norm, blank, label, alpha, beta;  // (cells,)
  std::vector<float> joined, d_joined, logits, zeros;   // of a tile; and a row of zeros
  int64_t cells[TILE];

  explicit Scratch(const Joiner& m)
      : joined(TILE * m.joiner), d_joined(TILE * m.joiner), logits(TILE * m.padded), zeros(m.joiner) {}

  void fit(int64_t n) {
    for (auto* values : {&norm, &blank, &label, &alpha, &beta}) values->resize(n);
  }

  // Fills alpha and, from the last cell to the first beside it, beta.
  void align(const Utterance& x) {
    const int64_t last = x.cells() - 1, width = x.width;
    for (int64_t i = 0; i <= last; ++i) {
      const int64_t j = last - i;
      const bool first_frame = i < width, first_label = i % width == 0;  // or the last, of beta
      double& a = alpha[i];
      if (i == 0) a = 0;
      else if (first_frame) a = alpha[i - 1] + label[i - 1];
      else if (first_label) a = alpha[i - width] + blank[i - width];
      else a = either(alpha[i - width] + blank[i - width], alpha[i - 1] + label[i - 1]);
      double& b = beta[j];
      if (i == 0) b = blank[j];
      else if (first_frame) b = beta[j + 1] + label[j];
      else if (first_label) b = beta[j + width] + blank[j];
      else b = either(beta[j + width] + blank[j], beta[j + 1] + label[j]);
    }
  }

  Occupied occupied(const Utterance& x, int64_t cell) const {
    const double before = alpha[cell] - beta[0];
    const bool is_last = cell + 1 == x.cells(), in_last_frame = cell + x.width >= x.cells();
    const double behind = is_last ? 0 : in_last_frame ? -INFINITY : beta[cell + x.width];
    const bool has_label = (cell + 1) % x.width != 0;
    return {static_cast<float>(std::exp(before + beta[cell])),
            static_cast<float>(std::exp(before + blank[cell] + behind)),
            has_label ? static_cast<float>(std::exp(before + label[cell] + beta[cell + 1])) : 0.0f};
  }
};

struct Kernels {
  void (*log_probs)(const Joiner&, const Utterance&, Scratch&);
  void (*gradients)(const Joiner&, const Utterance&, Scratch&);
};

#define KERNELS_FILE "transducer_loss_kernels.h"
#include "instruction_sets.h"

const Kernels& kernels() {
  static const Kernels& chosen = *kernels_named(at::get_cpu_capability());
  return chosen;
}

// Rows filled up with `value` to a multiple of LINE.
Tensor pad(const Tensor& x, double value = 0) {
  const int64_t missing = (LINE - x.size(-1) % LINE) % LINE;
  return missing ? at::constant_pad_nd(x, {0, missing}, value).contiguous() : x.contiguous();
}

TransducerLoss transducer_loss(const Tensor& encoder_out, const Tensor& predictor_out, const Tensor& weight,
                               const Tensor& bias, const Tensor& targets, IntArrayRef lengths,
                               IntArrayRef target_lengths) {
  check_transducer(encoder_out, predictor_out, weight, bias, targets, lengths, target_lengths);
  const int64_t batch = encoder_out.size(0), joiner = encoder_out.size(2), tokens = weight.size(0);
  const int64_t groups = std::min(batch, GROUPS);
  const Tensor ahead = pad(encoder_out), predicted = pad(predictor_out), said = targets.contiguous();
  const Tensor padded = pad(weight), across = pad(padded.t()), start = pad(bias, -INFINITY);
  check_targets(said, tokens, target_lengths);
  const Tensor d_ahead = at::zeros_like(ahead), d_predicted = at::zeros_like(predicted);
  const Tensor d_weight = at::zeros({std::max<int64_t>(groups, 1), tokens, padded.size(1)}, weight.options());
  const Tensor d_bias = at::zeros({d_weight.size(0), start.size(0)}, weight.options());
  const Joiner m{padded.const_data_ptr<float>(), across.const_data_ptr<float>(), start.const_data_ptr<float>(),
                 padded.size(1), tokens, start.size(0)};
  std::vector<double> losses(batch);
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    Scratch s(m);
    for (int64_t group = begin; group < end; ++group) {
      for (int64_t b = group; b < batch; b += GROUPS) {
        const int64_t first = b * ahead.size(1) * m.joiner, first_predicted = b * predicted.size(1) * m.joiner;
        const Utterance x{ahead.const_data_ptr<float>() + first,
                          predicted.const_data_ptr<float>() + first_predicted,
                          said.const_data_ptr<int64_t>() + b * said.size(1),
                          lengths[b],
                          target_lengths[b] + 1,
                          d_ahead.data_ptr<float>() + first,
                          d_predicted.data_ptr<float>() + first_predicted,
                          d_weight.data_ptr<float>() + group * tokens * m.joiner,
                          d_bias.data_ptr<float>() + group * m.padded};
        s.fit(x.cells());
        kernels().log_probs(m, x, s);
        s.align(x);
        losses[b] = -s.beta[0];
        kernels().gradients(m, x, s);
      }
    }
  });
  double loss = 0;
  for (const double one : losses) loss += one;
  for (int64_t group = 1; group < groups; ++group) {
    d_weight[0].add_(d_weight[group]);
    d_bias[0].add_(d_bias[group]);
  }
  return {at::scalar_tensor(loss, weight.options()), d_ahead.narrow(2, 0, joiner).contiguous(),
          d_predicted.narrow(2, 0, joiner).contiguous(), d_weight[0].narrow(1, 0, joiner).clone(),
          d_bias[0].narrow(0, 0, tokens).clone()};
}

TransducerLoss meta(const Tensor& encoder_out, const Tensor& predictor_out, const Tensor& weight, const Tensor& bias,
                    const Tensor& targets, IntArrayRef lengths, IntArrayRef target_lengths) {
  check_transducer(encoder_out, predictor_out, weight, bias, targets, lengths, target_lengths);
  const auto like = [](const Tensor& x) { return at::empty(x.sizes(), x.options()); };
  return {at::empty({}, weight.options()), like(encoder_out), like(predictor_out), like(weight), like(bias)};
}

}  // namespace

TORCH_LIBRARY_IMPL(audio_lottery, CPU, m) { m.impl("transducer_loss", &transducer_loss); }
TORCH_LIBRARY_IMPL(audio_lottery, Meta, m) { m.impl("transducer_loss", &meta); }

}  // namespace audio_lottery
