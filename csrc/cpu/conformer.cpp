// gated_convolution and rotary_heads on CPU: parts of a Conformer's block in one pass. A channel's GLU, depthwise
// convolution and SiLU, while its frames stay in the first cache; a frame's queries and keys, turned and put by heads.
// Loops are plain, and vectors are the compiler's: of numbers of 32 bits and without branches, so that it makes them
// without -ffast-math.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "vector.h"

namespace audio_lottery {
namespace {

constexpr int64_t THREAD_PRODUCTS = 1 << 16;  // multiplications that are worth a thread

template <typename To, typename From>
AUDIO_LOTTERY_INLINE To bits_of(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// 1 / (1 + exp(-x)), within 2e-7; exp as in Cephes: a power of 2 times a polynomial. NaN stays NaN.
AUDIO_LOTTERY_INLINE float sigmoid(float x) {
  const auto given = bits_of<int32_t>(x);
  const int32_t size = given & 0x7fffffff, most = 0x42ae0000;  // |x|, and 87: as integers they sort alike
  const float y = bits_of<float>((size < most ? size : most) | (~given & INT32_MIN));
  const float shifted = y * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: its last bits hold the rounded exponent
  const float n = shifted - 12582912.0f, f = y - n * 0.693359375f + n * 2.12194440e-4f;
  float p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const auto power = static_cast<int32_t>(static_cast<uint32_t>(bits_of<int32_t>(shifted)) << 23) + 0x3f800000;
  const auto result = bits_of<int32_t>(1.0f / (1.0f + p * bits_of<float>(power)));
  return bits_of<float>(result | -static_cast<int32_t>(size > 0x7f800000));
}

// One channel: frames (length) of it and of its gate -> out (length). padded: length + kernel - 1 floats, zero outside
// of the length in their middle.  sums: length floats.
AUDIO_LOTTERY_CLONES
void convolve(const float* frames, const float* gates, const float* weights, float bias, float* __restrict padded,
              float* __restrict sums, float* __restrict out, int64_t length, int64_t kernel) {
  for (int64_t t = 0; t < length; ++t) padded[kernel / 2 + t] = frames[t] * sigmoid(gates[t]);
  for (int64_t t = 0; t < length; ++t) sums[t] = bias;
  int64_t k = 0;
  for (; k + 4 <= kernel; k += 4) {  // four at once, so that sums are read and written a fourth as often
    const float *w = weights + k, *x = padded + k;
    const float w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
    for (int64_t t = 0; t < length; ++t) sums[t] += w0 * x[t] + w1 * x[t + 1] + w2 * x[t + 2] + w3 * x[t + 3];
  }
  for (; k < kernel; ++k) {
    const float w = weights[k];
    for (int64_t t = 0; t < length; ++t) sums[t] += w * padded[k + t];
  }
  for (int64_t t = 0; t < length; ++t) out[t] = sums[t] * sigmoid(sums[t]);
}

void check_floats(const Tensor& tensor, const char* name, int64_t dim, const Tensor& first, const char* first_name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, name, " must be float32, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == dim, name, " must have ", dim, " dimension(s), got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == first.device(), name, " must be on the device of ", first_name, ", got ",
                    tensor.device(), " and ", first.device());
}

void check(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& lengths) {
  for (const auto& [tensor, name, dim] :
       {std::tuple(&x, "x", 3), std::tuple(&weight, "weight", 2), std::tuple(&bias, "bias", 1)}) {
    check_floats(*tensor, name, dim, x, "x");
  }
  TORCH_CHECK_VALUE(x.size(1) == 2 * weight.size(0) && bias.size(0) == weight.size(0),
                    "x must have two channels a row of weight, and bias a number, got ", x.sizes(), ", ", weight.sizes(),
                    " and ", bias.sizes());
  TORCH_CHECK_VALUE(weight.size(1) % 2 == 1, "weight must be of an odd kernel, got ", weight.sizes());
  if (!lengths) return;
  TORCH_CHECK_TYPE(lengths->scalar_type() == at::kLong, "lengths must be int64, got ", lengths->scalar_type());
  TORCH_CHECK_VALUE(lengths->dim() == 1 && lengths->size(0) == x.size(0), "lengths must be one an utterance, got ",
                    lengths->sizes(), " for x of ", x.sizes());
  TORCH_CHECK_VALUE(lengths->device() == x.device(), "lengths must be on the device of x, got ", lengths->device(), " and ",
                    x.device());
}

Tensor gated_convolution(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& lengths) {
  check(x, weight, bias, lengths);
  const int64_t batch = x.size(0), channels = weight.size(0), time = x.size(2), kernel = weight.size(1);
  const Tensor in = x.contiguous(), weights = weight.contiguous(), biases = bias.contiguous();
  std::vector<int64_t> ends(batch, time);
  if (lengths) {
    const Tensor given = lengths->contiguous();
    std::copy_n(given.const_data_ptr<int64_t>(), batch, ends.begin());  // of no utterance it is null
    for (const int64_t end : ends) {
      TORCH_CHECK_VALUE(end >= 0 && end <= time, "lengths must be between 0 and the ", time, " frames, got ", end);
    }
  }
  Tensor out = at::empty({batch, channels, time}, x.options());
  if (out.numel() == 0) return out;
  const float *from = in.const_data_ptr<float>(), *w = weights.const_data_ptr<float>();
  const float* b = biases.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, THREAD_PRODUCTS / (time * kernel));
  at::parallel_for(0, batch * channels, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> padded(time + kernel - 1), sums(time);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / channels, c = i % channels, length = ends[n];
      std::fill(padded.begin() + kernel / 2 + length, padded.end(), 0.0f);
      const float *frames = from + (2 * n * channels + c) * time, *gates = frames + channels * time;
      convolve(frames, gates, w + c * kernel, b[c], padded.data(), sums.data(), to + i * time, length, kernel);
      std::fill(to + i * time + length, to + (i + 1) * time, 0.0f);
    }
  });
  return out;
}

// One frame's vectors of all heads, each of two halves (a, b) -> (a cos - b sin, a sin + b cos), `apart` floats apart.
AUDIO_LOTTERY_CLONES
void turn(const float* x, const float* cos, const float* sin, float* __restrict out, int64_t heads, int64_t half,
          int64_t apart) {
  for (int64_t head = 0; head < heads; ++head, x += 2 * half, out += apart) {
    for (int64_t i = 0; i < half; ++i) out[i] = x[i] * cos[i] - x[half + i] * sin[i];
    for (int64_t i = 0; i < half; ++i) out[half + i] = x[i] * sin[i] + x[half + i] * cos[i];
  }
}

Tensor rotary_heads(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t heads) {
  for (const auto& [tensor, name, dim] :
       {std::tuple(&qkv, "qkv", 3), std::tuple(&cos, "cos", 2), std::tuple(&sin, "sin", 2)}) {
    check_floats(*tensor, name, dim, qkv, "qkv");
  }
  TORCH_CHECK_VALUE(heads > 0 && qkv.size(2) % (6 * heads) == 0,
                    "qkv must be three vectors of an even size a head, got ", qkv.sizes(), " for ", heads, " heads");
  const int64_t batch = qkv.size(0), time = qkv.size(1), size = qkv.size(2) / (3 * heads), half = size / 2;
  for (const auto& [tensor, name] : {std::pair(&cos, "cos"), std::pair(&sin, "sin")}) {
    TORCH_CHECK_VALUE(tensor->size(0) == time && tensor->size(1) == half, name, " must be [", time, ", ", half, "], got ",
                      tensor->sizes());
  }
  const Tensor in = qkv.contiguous(), cosines = cos.contiguous(), sines = sin.contiguous();
  Tensor out = at::empty({3, batch, heads, time, size}, qkv.options());
  if (out.numel() == 0) return out;
  const float *from = in.const_data_ptr<float>(), *c = cosines.const_data_ptr<float>();
  const float* s = sines.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  const int64_t apart = time * size, part = batch * heads * apart;
  const int64_t grain = std::max<int64_t>(1, THREAD_PRODUCTS / qkv.size(2));
  at::parallel_for(0, batch * time, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / time, t = i % time;
      const float* x = from + i * qkv.size(2);
      float* y = to + n * heads * apart + t * size;
      turn(x, c + t * half, s + t * half, y, heads, half, apart);
      turn(x + heads * size, c + t * half, s + t * half, y + part, heads, half, apart);
      for (int64_t h = 0; h < heads; ++h) {
        std::memcpy(y + 2 * part + h * apart, x + (2 * heads + h) * size, size * sizeof(float));
      }
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(audio_lottery, CPU, m) {
  m.impl("gated_convolution", &gated_convolution);
  m.impl("rotary_heads", &rotary_heads);
}

}  // namespace audio_lottery
