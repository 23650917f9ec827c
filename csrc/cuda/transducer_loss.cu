// transducer_loss on CUDA, in the passes of cpu/transducer_loss.cpp: CHUNK cells at a time through cuBLAS and kernels of
// a warp a cell, the lattice of an utterance in a block that goes over its diagonals. Each sum has one writer that adds in
// order. All cells are differentiated.

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../checks.h"

namespace audio_lottery {
namespace {

constexpr int THREADS = 256;
constexpr int WARP = 32;
constexpr int64_t CHUNK = int64_t{1} << 25;  // numbers of joiner and logits that are in memory at a time

// Utterance b has frames[b] * width[b] cells from first[b] on, among all; first has B + 1 numbers.
struct Batch {
  const int64_t *first, *frames, *width, *targets;
  int64_t size, padded_frames, padded_width, joiner, tokens;
};

struct Cell {
  int64_t b, t, u;
};

__device__ Cell cell_of(const Batch& x, int64_t cell) {
  int64_t low = 0, high = x.size - 1;  // the last utterance that begins at the cell or before
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (x.first[middle] <= cell) low = middle; else high = middle - 1;
  }
  const int64_t inside = cell - x.first[low];
  return {low, inside / x.width[low], inside % x.width[low]};
}

__device__ int64_t label_of(const Batch& x, const Cell& at) {
  return x.targets[at.b * (x.padded_width - 1) + at.u];
}

__device__ bool has_label(const Batch& x, const Cell& at) { return at.u + 1 < x.width[at.b]; }

__global__ void join_kernel(Batch x, const float* ahead, const float* predicted, float* joined, int64_t start, int64_t n) {
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const Cell at = cell_of(x, start + i);
    const float* a = ahead + (at.b * x.padded_frames + at.t) * x.joiner;
    const float* p = predicted + (at.b * x.padded_width + at.u) * x.joiner;
    for (int64_t j = threadIdx.x; j < x.joiner; j += blockDim.x) joined[i * x.joiner + j] = tanhf(a[j] + p[j]);
  }
}

template <typename Number, typename Function>
__device__ Number over_warp(Number value, const Function& function) {
  for (int step = WARP / 2; step > 0; step /= 2) value = function(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

__global__ void log_probs_kernel(Batch x, const float* logits, double* norm, double* blank, double* label, int64_t start,
                                 int64_t n) {
  const int lane = threadIdx.x % WARP;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (THREADS / WARP);
  for (int64_t i = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP; i < n; i += warps) {
    const float* row = logits + i * x.tokens;
    float top = -INFINITY;
    for (int64_t k = lane; k < x.tokens; k += WARP) top = fmaxf(top, row[k]);
    top = over_warp(top, [](float a, float b) { return fmaxf(a, b); });
    double sum = 0;
    for (int64_t k = lane; k < x.tokens; k += WARP) sum += expf(row[k] - top);  // NaN goes into the sum
    sum = over_warp(sum, [](double a, double b) { return a + b; });
    if (lane) continue;
    const Cell at = cell_of(x, start + i);
    const double all = top + log(sum);
    norm[start + i] = all;
    blank[start + i] = row[0] - all;
    label[start + i] = has_label(x, at) ? row[label_of(x, at)] - all : -INFINITY;
  }
}

__device__ double either(double a, double b) {  // log(exp(a) + exp(b))
  const double high = a > b ? a : b, low = a > b ? b : a;
  return low == -INFINITY ? high : high + log1p(exp(low - high));
}

// Block (b, 0) makes alpha of utterance b, block (b, 1) beta.
__global__ void lattice_kernel(Batch x, const double* blanks, const double* labels, double* alphas, double* betas) {
  const int64_t b = blockIdx.x, frames = x.frames[b], width = x.width[b], last = frames * width - 1;
  const double *blank = blanks + x.first[b], *label = labels + x.first[b];
  double *alpha = alphas + x.first[b], *beta = betas + x.first[b];
  for (int64_t diagonal = 0; diagonal < frames + width - 1; ++diagonal) {
    const int64_t low = max(int64_t{0}, diagonal - frames + 1), high = min(diagonal, width - 1);
    for (int64_t u = low + threadIdx.x; u <= high; u += blockDim.x) {
      const int64_t i = (diagonal - u) * width + u, j = last - i;  // beta goes from the other end
      const bool first_frame = i < width, first_label = u == 0;
      if (blockIdx.y == 0) {
        if (i == 0) alpha[i] = 0;
        else if (first_frame) alpha[i] = alpha[i - 1] + label[i - 1];
        else if (first_label) alpha[i] = alpha[i - width] + blank[i - width];
        else alpha[i] = either(alpha[i - width] + blank[i - width], alpha[i - 1] + label[i - 1]);
      } else {
        if (i == 0) beta[j] = blank[j];
        else if (first_frame) beta[j] = beta[j + 1] + label[j];
        else if (first_label) beta[j] = beta[j + width] + blank[j];
        else beta[j] = either(beta[j + width] + blank[j], beta[j + 1] + label[j]);
      }
    }
    __syncthreads();
  }
}

// The gradient of the logits in their place: occupied * softmax, less what goes through blank and label.
__global__ void differentiate_kernel(Batch x, float* logits, const double* norm, const double* blank, const double* label,
                                     const double* alpha, const double* beta, int64_t start, int64_t n) {
  const int lane = threadIdx.x % WARP;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (THREADS / WARP);
  for (int64_t i = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP; i < n; i += warps) {
    const int64_t cell = start + i;
    const Cell at = cell_of(x, cell);
    const int64_t width = x.width[at.b];
    const bool labelled = has_label(x, at), last_frame = at.t + 1 == x.frames[at.b];
    const double before = alpha[cell] - beta[x.first[at.b]];
    const double behind = !last_frame ? beta[cell + width] : labelled ? -INFINITY : 0.0;
    const float in_all = exp(before + beta[cell]), by_blank = exp(before + blank[cell] + behind);
    const float by_label = labelled ? exp(before + label[cell] + beta[cell + 1]) : 0.0;
    const int64_t said = labelled ? label_of(x, at) : -1;
    const float all = norm[cell];
    float* row = logits + i * x.tokens;
    for (int64_t k = lane; k < x.tokens; k += WARP) {
      float d = in_all * expf(row[k] - all);
      if (k == 0) d -= by_blank;
      if (k == said) d -= by_label;
      row[k] = d;
    }
  }
}

// Adds to d (B, padded_frames or padded_width, joiner) what comes from the chunk's cells: d_joined * (1 - joined^2), over
// the labels of a frame or over the frames of a label. A block a row, which no other block writes.
__global__ void add_kernel(Batch x, const float* joined, const float* d_joined, float* d, bool over_labels, int64_t start,
                           int64_t n) {
  const int64_t rows = over_labels ? x.padded_frames : x.padded_width;
  for (int64_t index = blockIdx.x; index < x.size * rows; index += gridDim.x) {
    const int64_t b = index / rows, row = index % rows, width = x.width[b];
    if (row >= (over_labels ? x.frames[b] : width)) continue;
    const int64_t step = over_labels ? 1 : width, count = over_labels ? width : x.frames[b];
    const int64_t from = x.first[b] + (over_labels ? row * width : row) - start;  // its first cell, in the chunk
    const int64_t begin = from >= 0 ? 0 : (-from + step - 1) / step;
    const int64_t end = from >= n ? 0 : min(count, (n - from + step - 1) / step);
    for (int64_t j = threadIdx.x; j < x.joiner && begin < end; j += blockDim.x) {
      float sum = d[index * x.joiner + j];
      for (int64_t k = begin; k < end; ++k) {
        const int64_t at = (from + k * step) * x.joiner + j;
        sum += d_joined[at] * (1.0f - joined[at] * joined[at]);
      }
      d[index * x.joiner + j] = sum;
    }
  }
}

unsigned blocks(int64_t n) { return static_cast<unsigned>(std::clamp<int64_t>(n, 1, 1 << 20)); }

TransducerLoss transducer_loss(const Tensor& encoder_out, const Tensor& predictor_out, const Tensor& weight,
                               const Tensor& bias, const Tensor& targets, IntArrayRef lengths,
                               IntArrayRef target_lengths) {
  check_transducer(encoder_out, predictor_out, weight, bias, targets, lengths, target_lengths);
  check_targets(targets.cpu().contiguous(), weight.size(0), target_lengths);
  const c10::cuda::CUDAGuard guard(encoder_out.device());
  // Products in float32 whatever autocast says, and without a graph of their own.
  const c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                                 c10::autocast_dispatch_keyset);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t batch = encoder_out.size(0), joiner = encoder_out.size(2), tokens = weight.size(0);
  std::vector<int64_t> table(3 * batch + 1);  // first (B + 1,), frames, width
  for (int64_t b = 0; b < batch; ++b) {
    table[batch + 1 + b] = lengths[b];
    table[2 * batch + 1 + b] = target_lengths[b] + 1;
    table[b + 1] = table[b] + lengths[b] * (target_lengths[b] + 1);
  }
  const int64_t cells = table[batch], part = std::max<int64_t>(CHUNK / (joiner + tokens), 1);
  const Tensor places = at::tensor(table, at::kLong).to(encoder_out.device());
  const Tensor ahead = encoder_out.contiguous(), predicted = predictor_out.contiguous(), said = targets.contiguous();
  const auto* place = places.const_data_ptr<int64_t>();
  const Batch x{place, place + batch + 1, place + 2 * batch + 1, said.const_data_ptr<int64_t>(), batch, ahead.size(1),
                predicted.size(1), joiner, tokens};
  const Tensor d_ahead = at::zeros_like(ahead), d_predicted = at::zeros_like(predicted);
  const Tensor d_weight = at::zeros({tokens, joiner}, weight.options()), d_bias = at::zeros({tokens}, bias.options());
  const Tensor numbers = at::empty({5, cells}, weight.options().dtype(at::kDouble));
  double *norm = numbers.data_ptr<double>(), *blank = norm + cells, *label = blank + cells, *alpha = label + cells,
         *beta = alpha + cells;
  const auto logits_of = [&](const Tensor& joined, int64_t start, int64_t n) {
    join_kernel<<<blocks(n), THREADS, 0, stream>>>(x, ahead.const_data_ptr<float>(), predicted.const_data_ptr<float>(),
                                                   joined.data_ptr<float>(), start, n);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return at::addmm(bias, joined, weight.t());
  };
  for (int64_t start = 0; start < cells; start += part) {
    const int64_t n = std::min(part, cells - start);
    const Tensor logits = logits_of(at::empty({n, joiner}, ahead.options()), start, n);
    log_probs_kernel<<<blocks(n / (THREADS / WARP) + 1), THREADS, 0, stream>>>(x, logits.const_data_ptr<float>(), norm,
                                                                             blank, label, start, n);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (batch) lattice_kernel<<<dim3(static_cast<unsigned>(batch), 2), THREADS, 0, stream>>>(x, blank, label, alpha, beta);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  for (int64_t start = 0; start < cells; start += part) {
    const int64_t n = std::min(part, cells - start);
    const Tensor joined = at::empty({n, joiner}, ahead.options()), d_logits = logits_of(joined, start, n);
    differentiate_kernel<<<blocks(n / (THREADS / WARP) + 1), THREADS, 0, stream>>>(x, d_logits.data_ptr<float>(), norm,
                                                                                 blank, label, alpha, beta, start, n);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    d_weight.addmm_(d_logits.t(), joined);
    d_bias.add_(d_logits.sum(0));
    const Tensor d_joined = at::mm(d_logits, weight);
    for (const bool over_labels : {true, false}) {
      const Tensor& d = over_labels ? d_ahead : d_predicted;
      add_kernel<<<blocks(batch * d.size(1)), THREADS, 0, stream>>>(x, joined.const_data_ptr<float>(),
                                                                 d_joined.const_data_ptr<float>(), d.data_ptr<float>(),
                                                                 over_labels, start, n);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  const Tensor losses = numbers[4].index_select(0, places.narrow(0, 0, batch));  // beta of the first cells
  return {losses.sum().neg().to(at::kFloat), d_ahead, d_predicted, d_weight, d_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(audio_lottery, CUDA, m) { m.impl("transducer_loss", &transducer_loss); }

}  // namespace audio_lottery
