// block_norms on CPU: one pass. A row of blocks is a task; its sums are added up row by row, so that each block's own
// order is along its rows, the first row first, as in the reference.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "vector.h"

namespace audio_lottery {
namespace {

// sums[j] += |row[j * Columns]| + ... of `count` whole blocks; across blocks this vectorises. Columns 0: `columns`, known
// only now.
template <int Columns, typename T>
AUDIO_LOTTERY_INLINE void add_row(const T* __restrict row, double* __restrict sums, int64_t count, int64_t columns) {
  const int64_t width = Columns ? Columns : columns;
  for (int64_t j = 0; j < count; ++j) {
    double sum = sums[j];
    for (int64_t k = 0; k < width; ++k) sum += std::abs(static_cast<double>(row[j * width + k]));
    sums[j] = sum;
  }
}

template <typename T>
AUDIO_LOTTERY_INLINE void add_any(const T* row, double* sums, int64_t count, int64_t columns) {
  if (columns == 1) return add_row<1>(row, sums, count, columns);
  if (columns == 2) return add_row<2>(row, sums, count, columns);
  if (columns == 4) return add_row<4>(row, sums, count, columns);
  if (columns == 8) return add_row<8>(row, sums, count, columns);
  add_row<0>(row, sums, count, columns);
}

AUDIO_LOTTERY_CLONES void add_float(const float* row, double* sums, int64_t n, int64_t c) { add_any(row, sums, n, c); }
AUDIO_LOTTERY_CLONES void add_double(const double* row, double* sums, int64_t n, int64_t c) { add_any(row, sums, n, c); }

template <typename T>
void add(const T* row, double* sums, int64_t count, int64_t columns) {
  if constexpr (std::is_same_v<T, float>) {
    add_float(row, sums, count, columns);
  } else if constexpr (std::is_same_v<T, double>) {
    add_double(row, sums, count, columns);
  } else {
    add_row<0>(row, sums, count, columns);
  }
}

template <typename T>
void norms_of(const Tensor& weight, const Tensor& out, int64_t rows, int64_t columns) {
  const int64_t height = weight.size(0), width = weight.numel() / height, across = out.size(1);
  const int64_t whole = width / columns;
  const T* data = weight.const_data_ptr<T>();
  auto* norms = out.mutable_data_ptr<double>();
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, rows * width));
  at::parallel_for(0, out.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      double* sums = norms + b * across;
      for (int64_t i = b * rows; i < std::min(height, (b + 1) * rows); ++i) {
        const T* row = data + i * width;
        add(row, sums, whole, columns);
        if (whole < across) add(row + whole * columns, sums + whole, 1, width - whole * columns);  // the far edge
      }
    }
  });
}

std::vector<Tensor> block_norms(TensorList weights, int64_t rows, int64_t columns) {
  check_blocks(weights, rows, columns);
  std::vector<Tensor> outs;
  for (const auto& given : weights) {
    const auto weight = given.contiguous().flatten(1);
    const auto double_options = weight.options().dtype(at::kDouble);
    outs.push_back(at::zeros({pieces(weight.size(0), rows), pieces(weight.size(1), columns)}, double_options));
    if (weight.numel() == 0) continue;
    const int64_t r = std::min(rows, weight.size(0)), c = std::min(columns, weight.size(1));
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, weight.scalar_type(), "block_norms",
                                    [&] { norms_of<scalar_t>(weight, outs.back(), r, c); });
  }
  return outs;
}

}  // namespace

TORCH_LIBRARY_IMPL(audio_lottery, CPU, m) { m.impl("block_norms", &block_norms); }

}  // namespace audio_lottery
