// Vectors and products of dense matrices, in transducer_loss_kernels.h and conformer_kernels.h: instruction_sets.h says how.

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

KERNEL inline void read(Floats& to, const float* from) { std::memcpy(&to, from, sizeof to); }
KERNEL inline void write(float* to, const Floats& from) { std::memcpy(to, &from, sizeof from); }

#include "exponential.h"

// c (R rows, V vectors, rows `wide` apart) = start, or c where it is null, + a times b (k rows, `wide` apart); a (R, k)
// has its rows `row` and its columns `column` apart.
template <int R, int V>
KERNEL inline void tile(const float* a, int64_t row, int64_t column, const float* b, int64_t k, const float* start,
                        float* c, int64_t wide) {
  Floats sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) read(sum[r][v], (start ? start : c + r * wide) + v * LANES);
  }
  for (int64_t i = 0; i < k; ++i) {
    Floats x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) read(x[v], b + i * wide + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float scale = a[r * row + i * column];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] += x[v] * scale;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) write(c + r * wide + v * LANES, sum[r][v]);
  }
}

template <int V>
KERNEL void band(const float* a, int64_t row, int64_t column, const float* b, int64_t k, const float* start, float* c,
                 int64_t wide, int64_t rows) {
  constexpr int R = LANES == 16 ? 8 : LANES == 8 ? 3 : 1;  // with two lines of columns in 32 or 16 registers
  int64_t r = 0;
  for (; r + R <= rows; r += R) tile<R, V>(a + r * row, row, column, b, k, start, c + r * wide, wide);
  for (; r < rows; ++r) tile<1, V>(a + r * row, row, column, b, k, start, c + r * wide, wide);
}

// c (rows, wide) = start (wide,), or c where it is null, + a (rows, k) times b (k, wide); wide is a multiple of LINE.
KERNEL void multiply(const float* a, int64_t row, int64_t column, const float* b, int64_t k, const float* start,
                     float* c, int64_t wide, int64_t rows) {
  constexpr int V = LINE / LANES;
  int64_t at = 0;
  for (; at + 2 * LINE <= wide; at += 2 * LINE) {
    band<2 * V>(a, row, column, b + at, k, start ? start + at : nullptr, c + at, wide, rows);
  }
  if (at < wide) band<V>(a, row, column, b + at, k, start ? start + at : nullptr, c + at, wide, rows);
}
