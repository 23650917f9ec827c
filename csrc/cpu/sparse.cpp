// sparse_linear, sparse_conv2d, sparse_lstm and sparse_transducer on CPU: products with a matrix of kept blocks, of
// vectors and of images, an LSTM over time that holds one, and the transducer's greedy loop, which holds three. Products in
// bytes are bytes.h's, what goes on over time is lstm.h's.
//
// A matrix of (outputs, inputs) is cut into blocks r x c. Block row g covers outputs g * r ... and lists its kept blocks
// from left to right at offsets[g] ... offsets[g + 1] - 1: `columns` has the place of each (its first input / c) and
// `values` its weights (r, c). Blocks at the lower and right edge are filled up with zeros; int8 values are multiplied by
// a scale an output.
//
// One column (streaming, recurrence) goes over the outputs and reads each value once. Many columns are transposed first,
// so that vectors run over columns, a tile of outputs x columns stays in registers, and each value is used on all of
// them; outputs are made in bands, which go back through a transposition as whole cache lines.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../checks.h"
#include "huge_pages.h"
#include "vector.h"

namespace audio_lottery {
namespace {

constexpr int64_t BAND = 64;             // outputs; a multiple of every r
constexpr int64_t LINE = 16;             // floats of a cache line; a multiple of every vector
constexpr int64_t PANEL = 1 << 17;       // floats that stay in the second cache
constexpr int64_t SIZES = int64_t{1} << 31;  // numbers of a window are below: then nothing overflows
constexpr int64_t BEHIND = 31;           // floats behind a state's last that a window may read
constexpr int64_t FRAMES = 64;           // at most, of an LSTM whose projections are made together
constexpr int64_t FEW_COLUMNS = 4;       // below this, one at a time
constexpr int64_t THREAD_VALUES = 1 << 15;  // multiplications that are worth a thread

struct Bfloat16 {
  uint16_t bits;
};

struct Matrix {
  const void* values;
  const uint16_t* columns;
  const int32_t* offsets;
  const float* scales;  // or null
  at::ScalarType type;
  int64_t outputs, inputs, groups, r, c;
};

// Single weights again, for products with one column: a group of rows, one a lane. A step has a window of inputs, from
// which each lane takes its next weight's, if it is there; some steps are a bundle. Eight lanes have windows of eight
// inputs, sixteen have windows of 32, as AVX2 and AVX-512 choose among registers.
struct Windows {
  const void* values;       // (bundles, steps, lanes): 0 where a lane takes nothing
  const int32_t* places;    // (bundles, lanes): where in its window each lane's input is, Steps::BITS bits a step
  const uint16_t* starts;   // (bundles, steps): each step's first input
  const int32_t* offsets;   // (groups + 1): each group's first bundle
  const int32_t* rows;      // (groups, lanes): each lane's output; `outputs` where there is none
  const float* scales;      // as in Matrix
  at::ScalarType type;
  int64_t outputs, groups, lanes;
};

template <int L>
struct Steps {
  static constexpr int INPUTS = L == 16 ? 32 : 8, A_BUNDLE = L == 16 ? 6 : 8, BITS = L == 16 ? 5 : 4;
};

struct Kernels {
  const char* name;
  int64_t lanes;
  void (*one_column)(const Matrix&, const float*, float*, int64_t, int64_t);
  void (*in_windows)(const Windows&, const float*, const float*, float*, int64_t, int64_t);
  void (*many_columns)(const Matrix&, const float*, const int64_t*, const float*, float*, int64_t, int64_t, int64_t);
  void (*convolution)(const Matrix&, const float*, const int64_t*, int64_t, int64_t, int64_t, const float*, float*,
                      int64_t, int64_t, int64_t, int64_t);
  void (*transpose)(const float*, int64_t, int64_t, int64_t, float*, int64_t);
  void (*lstm_cell)(const float*, float*, float*, int64_t, int64_t, int64_t);
  uint16_t (*largest)(const uint16_t*, int64_t);
};

#define KERNELS_FILE "sparse_kernels.h"
#include "instruction_sets.h"

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> chosen{kernels_named(at::get_cpu_capability())};
  return chosen;
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

// Threads wait for each other at every step of an LSTM. (OpenMP's own barrier spins on, so that on a busy machine a
// thread that was sent away costs a slice of the scheduler's at every step.)
class Barrier {
 public:
  void wait(int64_t threads) {
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins > 10000) std::this_thread::yield();
    }
  }

 private:
  std::atomic<int64_t> arrived_{0}, round_{0};
};

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// x is the operator's first tensor, `first`; all others are where it is.
void check_device(const Tensor& t, const char* name, const Tensor& x, const char* first) {
  TORCH_CHECK_VALUE(t.device() == x.device(), name, " must be on the device of ", first, ", got ", t.device(), " and ",
                    x.device());
}

Matrix check_matrix(const Tensor& values, const Tensor& columns, const Tensor& offsets,
                    const std::optional<Tensor>& scales, int64_t outputs, int64_t inputs, const Tensor& x,
                    const char* first) {
  check_device(values, "values", x, first);
  check_device(columns, "columns", x, first);
  check_device(offsets, "offsets", x, first);
  if (scales) check_device(*scales, "scales", x, first);
  TORCH_CHECK_VALUE(outputs >= 0 && outputs < SIZES, "outputs must be at least 0 and below 2^31, got ", outputs);
  const auto type = values.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kChar,
                   "values must be float32, bfloat16 or int8, got ", type);
  TORCH_CHECK_TYPE(columns.scalar_type() == at::kUInt16, "columns must be uint16, got ", columns.scalar_type());
  TORCH_CHECK_TYPE(offsets.scalar_type() == at::kInt, "offsets must be int32, got ", offsets.scalar_type());
  TORCH_CHECK_VALUE(values.dim() == 3, "values must be (blocks, r, c), got ", values.sizes());
  const int64_t blocks = values.size(0), r = values.size(1), c = values.size(2);
  TORCH_CHECK_VALUE((c == 1 && (r == 1 || r == 4 || r == 8 || r == 16)) || (r == 1 && c == 4),
                    "blocks must be 1x1, 1x4, 4x1, 8x1 or 16x1, got ", r, "x", c);
  TORCH_CHECK_VALUE(columns.dim() == 1 && columns.size(0) == blocks, "columns must be (", blocks,
                    "), one a block of values, got ", columns.sizes());
  const int64_t groups = (outputs + r - 1) / r;
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.size(0) == groups + 1, "offsets must be (", groups + 1,
                    ") for ", outputs, " outputs in blocks of ", r, ", got ", offsets.sizes());
  TORCH_CHECK_VALUE((type == at::kChar) == scales.has_value(), "scales must be given with int8 values, and only then");
  for (const auto* t : {&values, &columns, &offsets}) TORCH_CHECK_VALUE(t->is_contiguous(), "the matrix must be contiguous");
  if (scales) {
    TORCH_CHECK_TYPE(scales->scalar_type() == at::kFloat, "scales must be float32, got ", scales->scalar_type());
    TORCH_CHECK_VALUE(scales->dim() == 1 && scales->size(0) == outputs && scales->is_contiguous(), "scales must be (",
                      outputs, "), one an output, got ", scales->sizes());
  }
  const auto* places = static_cast<const uint16_t*>(columns.const_data_ptr());
  const auto* starts = offsets.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(starts[0] == 0 && starts[groups] == blocks, "offsets must run from 0 to the ", blocks,
                    " blocks, got ", starts[0], " to ", starts[groups]);
  TORCH_CHECK_VALUE(std::is_sorted(starts, starts + groups + 1), "offsets must not decrease");
  const int64_t most = blocks ? kernels().largest(places, blocks) : 0;
  TORCH_CHECK_VALUE(blocks == 0 || most * c < inputs, "columns must be below ", (inputs + c - 1) / c, " for ", inputs,
                    " inputs in blocks of ", c, ", got ", most);
  const float* scale = scales ? scales->const_data_ptr<float>() : nullptr;
  return {values.const_data_ptr(), places, starts, scale, type, outputs, inputs, groups, r, c};
}

void check_floats(const Tensor& t, const char* name, at::IntArrayRef sizes, const Tensor& x, const char* first) {
  check_device(t, name, x, first);
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, name, " must be float32, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must be ", sizes, ", got ", t.sizes());
}

// The windows of m, or none (groups < 0) where they are not given.
Windows check_windows(at::TensorList t, const Matrix& m, const Tensor& x, const char* first) {
  if (t.empty()) return {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, m.type, 0, -1, 0};
  TORCH_CHECK_VALUE(t.size() == 5 && m.r * m.c == 1,
                    "windows must be values, places, starts, offsets and rows of single weights, got ", t.size(),
                    " tensors and blocks ", m.r, "x", m.c);
  const int64_t lanes = t[0].dim() == 3 && t[0].size(2) == 16 ? 16 : 8, groups = (m.outputs + lanes - 1) / lanes;
  const int64_t bundles = t[0].size(0), steps = lanes == 16 ? Steps<16>::A_BUNDLE : Steps<8>::A_BUNDLE;
  const at::ScalarType types[] = {m.type, at::kInt, at::kUInt16, at::kInt, at::kInt};
  const std::vector<int64_t> sizes[] = {
      {bundles, steps, lanes}, {bundles, lanes}, {bundles, steps}, {groups + 1}, {groups, lanes}};
  const char* names[] = {"values", "places", "starts", "offsets", "rows"};
  for (int i = 0; i < 5; ++i) {
    check_device(t[i], "windows", x, first);
    TORCH_CHECK_TYPE(t[i].scalar_type() == types[i], "windows: ", names[i], " must be ", types[i], ", got ",
                     t[i].scalar_type());
    TORCH_CHECK_VALUE(t[i].sizes() == at::IntArrayRef(sizes[i]) && t[i].is_contiguous(), "windows: ", names[i],
                      " must be ", at::IntArrayRef(sizes[i]), ", got ", t[i].sizes());
  }
  const auto* places = t[1].const_data_ptr<int32_t>();
  const auto* starts = static_cast<const uint16_t*>(t[2].const_data_ptr());
  const auto *offsets = t[3].const_data_ptr<int32_t>(), *rows = t[4].const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(offsets[0] == 0 && offsets[groups] == bundles && std::is_sorted(offsets, offsets + groups + 1),
                    "windows: offsets must rise from 0 to the ", bundles, " bundles");
  const int64_t most = bundles ? kernels().largest(starts, steps * bundles) : 0;
  TORCH_CHECK_VALUE(most < std::max<int64_t>(m.inputs, 1), "windows: starts must be below the ", m.inputs, " inputs, got ", most);
  TORCH_CHECK_VALUE(std::all_of(rows, rows + lanes * groups, [](int32_t row) { return row >= 0; }),
                    "windows: rows must be at least 0");
  return {t[0].const_data_ptr(), places, starts, offsets, rows, m.scales, m.type, m.outputs, groups, lanes};
}

// The first of each of `parts` shares of groups with about as much in them, and the end; a multiple of `multiple`.
std::vector<int64_t> share(const int32_t* offsets, int64_t groups, int64_t parts, int64_t multiple = 1) {
  std::vector<int64_t> begin(parts + 1, groups);
  for (int64_t p = 0; p < parts; ++p) {
    const auto wanted = static_cast<int64_t>(offsets[groups]) * p / parts;
    const int64_t g = std::lower_bound(offsets, offsets + groups, wanted) - offsets;
    begin[p] = std::min(p ? g / multiple * multiple : 0, groups);
  }
  return begin;
}

// The same of bands of outputs.
std::vector<int64_t> share_bands(const Matrix& m, int64_t parts) {
  auto begin = share(m.offsets, m.groups, parts, BAND / m.r);
  for (auto& g : begin) g = (g * m.r + BAND - 1) / BAND;
  return begin;
}

int64_t threads_for(const Matrix& m, int64_t columns) {
  const int64_t work = m.offsets[m.groups] * m.r * m.c * columns / THREAD_VALUES;
  return at::in_parallel_region() ? 1 : std::clamp<int64_t>(work, 1, at::get_num_threads());
}

// Rows of x, readable up to a multiple of c.
Tensor padded(const Tensor& x, int64_t c) {
  const int64_t inputs = x.size(-1);
  const Tensor rows = x.contiguous();  // what is padded keeps the order that x has in memory
  return inputs % c == 0 ? rows : at::constant_pad_nd(rows, {0, round_up(inputs, c) - inputs});
}

// What an operator returns. (Pages of 4 KiB cost a product of many columns as much as itself.)
Tensor fresh(at::IntArrayRef sizes, const Tensor& like) {
  Tensor y = at::empty(sizes, like.options());
  advise_huge_pages(y.data_ptr(), y.nbytes());
  return y;
}

std::vector<float> padded_bias(const std::optional<Tensor>& bias, int64_t size) {
  std::vector<float> biases(size);
  if (bias) std::memcpy(biases.data(), bias->contiguous().const_data_ptr<float>(), bias->numel() * sizeof(float));
  return biases;
}

// Y += X W^T, a few rows of X one at a time; they are `stride` apart and readable up to a multiple of c.
void few_columns(const Matrix& m, const float* x, int64_t stride, float* y, int64_t n) {
  const int64_t threads = threads_for(m, n);
  const auto begin = share(m.offsets, m.groups, threads);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < n; ++i) kernels().one_column(m, x + i * stride, y + i * m.outputs, begin[first], begin[last]);
  });
}

typedef std::array<int64_t, 2> Sizes;

// Height and width of a convolution's output.
Sizes check_convolution(const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                        at::IntArrayRef dilation) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "x must be float32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be (batch, channels, height, width), got ", x.sizes());
  for (const auto& [pair, name, least] : {std::tuple(kernel, "kernel", 1), std::tuple(stride, "stride", 1),
                                          std::tuple(padding, "padding", 0), std::tuple(dilation, "dilation", 1)}) {
    TORCH_CHECK_VALUE(pair.size() == 2 && std::min(pair[0], pair[1]) >= least && std::max(pair[0], pair[1]) < SIZES, name,
                      " must be two numbers of at least ", least, " and below 2^31, got ", pair);
  }
  TORCH_CHECK_VALUE(x.size(2) < SIZES && x.size(3) < SIZES, "x must be below 2^31 high and wide, got ", x.sizes());
  const int64_t area = kernel[0] * kernel[1];
  TORCH_CHECK_VALUE(x.size(1) <= std::numeric_limits<int64_t>::max() / area, "channels * kernel must be below 2^63, got ",
                    x.size(1), " channels and kernel ", kernel);
  Sizes size;
  for (int d = 0; d < 2; ++d) {
    const int64_t room = x.size(2 + d) + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1;
    TORCH_CHECK_VALUE(room >= 0, "x must be at least as large as the kernel, got ", x.sizes(), " for kernel ", kernel,
                      ", padding ", padding, " and dilation ", dilation);
    size[d] = room / stride[d] + 1;
  }
  return size;
}

#include "bytes.h"

Tensor sparse_linear(const Tensor& x, const Tensor& values, const Tensor& columns, const Tensor& offsets,
                     const std::optional<Tensor>& scales, const std::optional<Tensor>& bias, int64_t outputs) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "x must be float32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must be (..., inputs), got a scalar");
  const Matrix m = check_matrix(values, columns, offsets, scales, outputs, x.size(-1), x, "x");
  if (bias) check_floats(*bias, "bias", {outputs}, x, "x");
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  Tensor y = fresh(sizes, x);
  if (y.numel() == 0) return y;
  const int64_t n = y.numel() / outputs, threads = threads_for(m, n);
  float* out = y.data_ptr<float>();
  if (n < FEW_COLUMNS) {
    if (bias) {
      y.copy_(bias->expand(sizes));
    } else {
      y.zero_();
    }
    const Tensor rows = padded(x, m.c);
    few_columns(m, rows.const_data_ptr<float>(), rows.size(-1), out, n);
    return y;
  }
  // Columns in panels whose inputs stay in the second cache while all outputs are made. From input to input there is an odd
  // number of cache lines: at a power of two all would want the same places in the first.
  const int64_t padded_inputs = round_up(m.inputs, m.c), most = std::max(PANEL / std::max<int64_t>(padded_inputs, 1), 4 * LINE);
  const int64_t panels = (n + most - 1) / most, panel = round_up((n + panels - 1) / panels, LINE);
  const int64_t width = panel / LINE % 2 ? panel : panel + LINE;
  const Tensor rows = x.contiguous(), turned = at::empty({padded_inputs, width}, x.options());  // (inputs, columns)
  float* in_turned = turned.data_ptr<float>();
  std::fill(in_turned + m.inputs * width, in_turned + padded_inputs * width, 0.0f);
  const std::vector<float> biases = padded_bias(bias, round_up(outputs, BAND));
  std::vector<int64_t> places(padded_inputs);
  for (int64_t i = 0; i < padded_inputs; ++i) places[i] = i * width;
  const auto begin = share_bands(m, threads);
  for (int64_t from = 0; from < n; from += panel) {
    const int64_t count = std::min(panel, n - from);
    const float* in = rows.const_data_ptr<float>() + from * m.inputs;
    at::parallel_for(0, (m.inputs + LINE - 1) / LINE, threads > 1 ? 8 : m.inputs, [&](int64_t first, int64_t last) {
      const int64_t i = first * LINE, end = std::min(last * LINE, m.inputs);
      kernels().transpose(in + i, m.inputs, count, end - i, in_turned + i * width, width);
      for (int64_t k = i; k < end; ++k) {  // the last vector of columns is read whole
        std::fill(in_turned + k * width + count, in_turned + k * width + round_up(count, LINE), 0.0f);
      }
    });
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      kernels().many_columns(m, in_turned, places.data(), biases.data(), out + from * outputs, count, begin[first],
                             begin[last]);
    });
  }
  return y;
}

// The inputs of an output are rows of the padded image, each shifted: input (channel, i, j) of output (y, x) is at row
// y * stride + i * dilation, column x * stride + j * dilation. So that columns are neighbours at any stride, those with
// one remainder by the stride lie together; then every input has its place, and all outputs of a row are one product.
Tensor sparse_conv2d(const Tensor& x, const Tensor& values, const Tensor& columns, const Tensor& offsets,
                     const std::optional<Tensor>& scales, const std::optional<Tensor>& bias, int64_t outputs,
                     at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const Sizes size = check_convolution(x, kernel, stride, padding, dilation);
  const int64_t batch = x.size(0), channels = x.size(1);
  const Matrix m = check_matrix(values, columns, offsets, scales, outputs, channels * kernel[0] * kernel[1], x, "x");
  if (bias) check_floats(*bias, "bias", {outputs}, x, "x");
  Tensor y = fresh({batch, outputs, size[0], size[1]}, x);
  if (y.numel() == 0) return y;

  const int64_t step = size[1] == 1 ? 1 : stride[1];  // a row's only output takes no step, however wide
  const int64_t height = x.size(2) + 2 * padding[0], part = (kernel[1] - 1) * dilation[1] / step +
                round_up(size[1], kernels().lanes), row = step * part;  // parts of a row: one for each remainder
  const Tensor image = fresh({batch, channels, height, step, part}, x).zero_();
  const Tensor given = x.contiguous();
  const auto* from = given.const_data_ptr<float>();
  auto* to = image.data_ptr<float>();
  const int64_t threads = threads_for(m, batch * size[0] * size[1]), wide = x.size(3);
  at::parallel_for(0, batch * channels, threads > 1 ? 1 : batch * channels, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      for (int64_t h = 0; h < x.size(2); ++h) {
        const float* in = from + (plane * x.size(2) + h) * wide;
        float* out = to + (plane * height + h + padding[0]) * row;
        for (int64_t remainder = 0; remainder < step; ++remainder) {
          // Column q * stride + remainder of the padded row goes to q of its part.
          const int64_t first = std::max<int64_t>(0, (padding[1] - remainder + step - 1) / step);
          const int64_t last = std::min(part, (wide + padding[1] - remainder + step - 1) / step);
          for (int64_t q = first; q < last; ++q) out[remainder * part + q] = in[q * step + remainder - padding[1]];
        }
      }
    }
  });
  std::vector<int64_t> places;
  for (int64_t channel = 0; channel < channels; ++channel) {
    for (int64_t i = 0; i < kernel[0]; ++i) {
      for (int64_t j = 0; j < kernel[1]; ++j) {
        const int64_t at = j * dilation[1];
        places.push_back((channel * height + i * dilation[0]) * row + at % step * part + at / step);
      }
    }
  }
  places.resize(round_up(m.inputs, m.c));  // what fills the last blocks up is 0 times the first input
  const std::vector<float> biases = padded_bias(bias, round_up(outputs, BAND));
  const int64_t rows = batch * size[0];
  at::parallel_for(0, rows, threads > 1 ? (rows + threads - 1) / threads : rows, [&](int64_t begin, int64_t end) {
    kernels().convolution(m, to, places.data(), kernel[1], channels * height * row, stride[0] * row, biases.data(),
                          y.data_ptr<float>(), size[0], size[1], begin, end);
  });
  return y;
}

#include "lstm.h"

}  // namespace

std::string sparse_instructions(const std::string& name) {
  const Kernels* wanted = kernels_named(name);
  TORCH_CHECK_VALUE(name == wanted->name && wanted->lanes <= kernels_named(at::get_cpu_capability())->lanes,
                    "instructions must be DEFAULT, AVX2 or AVX512 and what this processor has, got ", name);
  return chosen().exchange(wanted)->name;
}

int64_t byte_lanes() {
#ifdef AUDIO_LOTTERY_AVX512
  return has_vnni() ? 16 : kernels().lanes >= 8 ? 8 : 0;
#else
  return 0;
#endif
}

TORCH_LIBRARY_IMPL(audio_lottery, CPU, m) {
  m.impl("sparse_linear", &sparse_linear);
  m.impl("sparse_conv2d", &sparse_conv2d);
  m.impl("sparse_lstm", &sparse_lstm);
  m.impl("sparse_transducer", &sparse_transducer);
  m.impl("sparse_linear_in_bytes", &sparse_linear_in_bytes);
  m.impl("sparse_conv2d_in_bytes", &sparse_conv2d_in_bytes);
  m.impl("sparse_lstm_in_bytes", &sparse_lstm_in_bytes);
  m.impl("sparse_lstm_layer_in_bytes", &sparse_lstm_layer_in_bytes);
}

}  // namespace audio_lottery
