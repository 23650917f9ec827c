// block_norms on CPU: one pass over the weights. A block is summed row by row; vectors run over neighbouring blocks.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../checks.h"
#include "huge_pages.h"
#include "vector.h"

namespace audio_lottery {
namespace {

constexpr int64_t CHUNK = 1 << 15;  // elements a task, about

// Adds one row of `blocks` neighbouring blocks to their norms. COLUMNS is known to the compiler, or 0.
template <int COLUMNS, typename T>
AUDIO_LOTTERY_INLINE void add_row(const T* __restrict w, double* __restrict norms, int64_t blocks, int64_t columns) {
  const int64_t width = COLUMNS ? COLUMNS : columns;
  for (int64_t b = 0; b < blocks; ++b) {
    double sum = norms[b];
    for (int64_t c = 0; c < width; ++c) sum += std::abs(static_cast<double>(w[b * width + c]));
    norms[b] = sum;
  }
}

// The norms of neighbouring blocks: `rows` rows of `size` columns, `stride` elements apart; the last may be narrower.
template <typename T>
AUDIO_LOTTERY_INLINE void sum_piece(const T* w, double* norms, int64_t rows, int64_t size, int64_t columns,
                                    int64_t stride) {
  const int64_t whole = size / columns, rest = size % columns;
  std::fill_n(norms, whole + (rest > 0), 0.0);
  for (int64_t r = 0; r < rows; ++r, w += stride) {
    switch (columns) {
      case 1: add_row<1>(w, norms, whole, 1); break;
      case 2: add_row<2>(w, norms, whole, 2); break;
      case 4: add_row<4>(w, norms, whole, 4); break;
      case 8: add_row<8>(w, norms, whole, 8); break;
      default: add_row<0>(w, norms, whole, columns);
    }
    if (rest) add_row<0>(w + whole * columns, norms + whole, 1, rest);
  }
}

#define SUM(T)                                                                                 \
  AUDIO_LOTTERY_CLONES void sum(const T* w, double* norms, int64_t rows, int64_t size,         \
                                int64_t columns, int64_t stride) {                             \
    sum_piece(w, norms, rows, size, columns, stride);                                          \
  }
SUM(float)
SUM(at::BFloat16)
SUM(at::Half)
SUM(double)
#undef SUM

template <typename T>
void sum_blocks(const T* w, double* norms, const Blocks& blocks) {
  int64_t height = blocks.height, width = blocks.width, strips = blocks.down, across = blocks.across;
  const int64_t rows = blocks.rows, columns = blocks.columns;
  if (rows == 1 && width % columns == 0) {  // the rows follow each other: one long row
    width *= height;
    across *= height;
    height = strips = 1;
  }
  const int64_t piece = std::max<int64_t>(1, CHUNK / (rows * columns));  // blocks of a strip that are a task
  const int64_t pieces = (across + piece - 1) / piece;
  const int64_t grain = std::max<int64_t>(1, CHUNK / (rows * columns * std::min(piece, across)));
  at::parallel_for(0, strips * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / pieces * rows, block = task % pieces * piece, column = block * columns;
      sum(w + row * width + column, norms + task / pieces * across + block, std::min(rows, height - row),
          std::min(piece * columns, width - column), columns, width);
    }
  });
}

std::vector<Tensor> block_norms(TensorList weights, int64_t rows, int64_t columns) {
  check_blocks(weights, rows, columns);
  std::vector<Tensor> all;
  for (const auto& given : weights) {
    const auto weight = given.contiguous();
    const Blocks blocks(weight, rows, columns);
    auto norms = at::empty({blocks.down, blocks.across}, weight.options().dtype(at::kDouble));
    all.push_back(norms);
    if (norms.numel() == 0) continue;
    advise_huge_pages(norms.data_ptr(), norms.numel() * sizeof(double));
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight.scalar_type(), "block_norms", [&] {
      sum_blocks(weight.const_data_ptr<scalar_t>(), norms.data_ptr<double>(), blocks);
    });
  }
  return all;
}

}  // namespace

TORCH_LIBRARY_IMPL(audio_lottery, CPU, m) { m.impl("block_norms", &block_norms); }

}  // namespace audio_lottery
