// gated_convolution and rotary_attention on CPU: parts of a Conformer's block in one pass. GLU, depthwise convolution and
// SiLU of some channels, while their frames stay in the first cache; attention of a head between its projections, with
// queries and keys turned by their positions and some rows of scores at a time.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "vector.h"

namespace audio_lottery {
namespace {

constexpr int64_t LINE = 16;                  // floats of a cache line; a multiple of every vector
constexpr int64_t TILE = 2 * LINE;            // channels at a time
constexpr int64_t SCORES = 1 << 14;           // floats that stay in the caches
constexpr int64_t ROWS = 8;                   // of which products take several at a time
constexpr int64_t THREAD_PRODUCTS = 1 << 16;  // multiplications that are worth a thread

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Head {
  const float *cos, *sin;  // (frames, size / 2)
  int64_t size, between;   // floats; from a frame's query to its key, and from that to its value
};

// Cache lines of a row of keys: at a large power of two all rows would want the same places in the first cache.
int64_t lines_of(int64_t frames) {
  const int64_t lines = (frames + LINE - 1) / LINE;
  return lines % 16 ? lines : lines + 1;
}

// What a thread needs.
struct Scratch {
  int64_t wide, padded, rows;
  std::vector<float> queries, keys, values;                 // (frames, size), (size, wide), (frames, padded)
  std::vector<float> scores, sums, totals, start, zeros;    // of some rows; what scores and sums begin with

  Scratch(int64_t frames, int64_t size)
      : wide(lines_of(frames) * LINE),
        padded(round_up(size, LINE)),
        rows(std::clamp<int64_t>(SCORES / wide / ROWS * ROWS, ROWS, 64)),
        queries((frames + ROWS) * size),
        keys(size * wide),
        values(frames * padded),
        scores(rows * wide),
        sums(rows * padded),
        totals(rows),
        start(wide),
        zeros(padded) {}
};

struct Kernels {
  void (*convolve)(const float*, const float*, const float*, float*, int64_t, int64_t, int64_t, int64_t, float*);
  void (*attend)(const Head&, const float*, int64_t, int64_t, float*, int64_t, Scratch&);
};

#define KERNELS_FILE "conformer_kernels.h"
#include "instruction_sets.h"

const Kernels& kernels() {
  static const Kernels& chosen = *kernels_named(at::get_cpu_capability());
  return chosen;
}

void check_floats(const Tensor& tensor, const char* name, int64_t dim, const Tensor& first, const char* first_name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, " must be float32, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == dim, name, " must have ", dim, " dimension(s), got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == first.device(), name, " must be on the device of ", first_name, ", got ",
                    tensor.device(), " and ", first.device());
}

// How many frames each of x's utterances has.
std::vector<int64_t> ends_of(const std::optional<Tensor>& lengths, const Tensor& x, const char* name, int64_t time) {
  std::vector<int64_t> ends(x.size(0), time);
  if (!lengths) return ends;
  TORCH_CHECK_TYPE(lengths->scalar_type() == at::kLong, "lengths must be int64, got ", lengths->scalar_type());
  TORCH_CHECK_VALUE(lengths->dim() == 1 && lengths->size(0) == x.size(0), "lengths must be one an utterance, got ",
                    lengths->sizes(), " for ", name, " of ", x.sizes());
  TORCH_CHECK_VALUE(lengths->device() == x.device(), "lengths must be on the device of ", name, ", got ", lengths->device(),
                    " and ", x.device());
  const Tensor given = lengths->contiguous();
  std::copy_n(given.const_data_ptr<int64_t>(), x.size(0), ends.begin());  // of no utterance it is null
  for (const int64_t end : ends) {
    TORCH_CHECK_VALUE(end >= 0 && end <= time, "lengths must be between 0 and the ", time, " frames, got ", end);
  }
  return ends;
}

Tensor gated_convolution(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& lengths) {
  for (const auto& [tensor, name, dim] :
       {std::tuple(&x, "x", 3), std::tuple(&weight, "weight", 2), std::tuple(&bias, "bias", 1)}) {
    check_floats(*tensor, name, dim, x, "x");
  }
  TORCH_CHECK_VALUE(x.size(1) == 2 * weight.size(0) && bias.size(0) == weight.size(0),
                    "x must have two channels a row of weight, and bias a number, got ", x.sizes(), ", ", weight.sizes(),
                    " and ", bias.sizes());
  TORCH_CHECK_VALUE(weight.size(1) % 2 == 1, "weight must be of an odd kernel, got ", weight.sizes());
  const int64_t batch = x.size(0), channels = weight.size(0), time = x.size(2), kernel = weight.size(1);
  const std::vector<int64_t> ends = ends_of(lengths, x, "x", time);
  // Frame by frame, as a product of frames leaves them and another one takes them: no copy, where x is such a view.
  const Tensor in = x.transpose(1, 2).contiguous(), weights = weight.contiguous(), biases = bias.contiguous();
  const Tensor out = at::empty({batch, time, channels}, x.options());
  if (out.numel() == 0) return out.transpose(1, 2);
  const auto *from = in.const_data_ptr<float>(), *w = weights.const_data_ptr<float>(), *b = biases.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  const int64_t tiles = (channels + TILE - 1) / TILE, grain = std::max<int64_t>(1, THREAD_PRODUCTS / (time * kernel * TILE));
  at::parallel_for(0, batch * tiles, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> room(TILE * (time + 2 * kernel + 4));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / tiles, first = i % tiles * TILE;
      kernels().convolve(from + 2 * n * time * channels, w, b, to + n * time * channels, channels, ends[n], kernel, first,
                         room.data());
    }
  });
  for (int64_t n = 0; n < batch; ++n) {
    std::fill(to + (n * time + ends[n]) * channels, to + (n + 1) * time * channels, 0.0f);
  }
  return out.transpose(1, 2);
}

Tensor rotary_attention(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const std::optional<Tensor>& lengths,
                        int64_t heads) {
  for (const auto& [tensor, name, dim] :
       {std::tuple(&qkv, "qkv", 3), std::tuple(&cos, "cos", 2), std::tuple(&sin, "sin", 2)}) {
    check_floats(*tensor, name, dim, qkv, "qkv");
  }
  TORCH_CHECK_VALUE(heads > 0 && qkv.size(2) % 6 == 0 && qkv.size(2) / 6 % heads == 0,
                    "qkv must be three vectors of an even size a head, got ", qkv.sizes(), " for ", heads, " heads");
  const int64_t batch = qkv.size(0), time = qkv.size(1), width = qkv.size(2) / 3, size = width / heads;
  for (const auto& [tensor, name] : {std::pair(&cos, "cos"), std::pair(&sin, "sin")}) {
    TORCH_CHECK_VALUE(tensor->size(0) == time && tensor->size(1) == size / 2, name, " must be [", time, ", ", size / 2,
                      "], got ", tensor->sizes());
  }
  const std::vector<int64_t> ends = ends_of(lengths, qkv, "qkv", time);
  const Tensor in = qkv.contiguous(), cosines = cos.contiguous(), sines = sin.contiguous();
  const Tensor out = at::empty({batch, time, width}, qkv.options());
  if (out.numel() == 0) return out;
  const Head head{cosines.const_data_ptr<float>(), sines.const_data_ptr<float>(), size, width};
  const auto* from = in.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, THREAD_PRODUCTS / (2 * time * time * size));
  at::parallel_for(0, batch * heads, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(time, size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / heads, at = n * time * width, of_head = i % heads * size;
      std::fill_n(scratch.start.begin(), ends[n], 0.0f);
      if (ends[n]) kernels().attend(head, from + 3 * at + of_head, 3 * width, ends[n], to + at + of_head, width, scratch);
    }
  });
  for (int64_t n = 0; n < batch; ++n) {
    std::fill(to + (n * time + ends[n]) * width, to + (n + 1) * time * width, 0.0f);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(audio_lottery, CPU, m) {
  m.impl("gated_convolution", &gated_convolution);
  m.impl("rotary_attention", &rotary_attention);
}

}  // namespace audio_lottery
