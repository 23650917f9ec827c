// The inner loops of sparse.cpp, which includes this file once an instruction set: LANES floats to a vector, every
// function in namespace SPARSE_ISA with the attribute KERNEL. (Not include-guarded. Clones of one function would not do:
// the compiler cuts vectors to the baseline's width before it clones.)

namespace SPARSE_ISA {

// Vectors of N.
template <int N>
struct Lanes {
  typedef float Floats __attribute__((vector_size(4 * N)));
  typedef int32_t Ints __attribute__((vector_size(4 * N)));
};
typedef Lanes<LANES>::Floats Floats;
typedef Lanes<LANES>::Ints Ints;

template <typename To, typename From>
KERNEL inline void read(To& to, const From* from) {
  std::memcpy(&to, from, sizeof(To));
}

// Small integers to 32 bits.
template <typename To, typename From>
KERNEL inline void widen(To& v, const From* from) {
  for (size_t i = 0; i < sizeof(To) / 4; ++i) v[i] = from[i];
}

#if defined(__x86_64__) && LANES > 4  // one instruction where compilers make a dozen
KERNEL inline void widen(Lanes<4>::Ints& v, const uint16_t* from) {
  v = (Lanes<4>::Ints)_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)from));
}
KERNEL inline void widen(Lanes<4>::Ints& v, const int8_t* from) {
  v = (Lanes<4>::Ints)_mm_cvtepi8_epi32(_mm_loadu_si32(from));
}
KERNEL inline void widen(Lanes<8>::Ints& v, const uint16_t* from) {
  v = (Lanes<8>::Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
}
KERNEL inline void widen(Lanes<8>::Ints& v, const int8_t* from) {
  v = (Lanes<8>::Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
}
#endif
#if defined(__x86_64__) && LANES == 16
KERNEL inline void widen(Lanes<16>::Ints& v, const uint16_t* from) {
  v = (Lanes<16>::Ints)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)from));
}
KERNEL inline void widen(Lanes<16>::Ints& v, const int8_t* from) {
  v = (Lanes<16>::Ints)_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)from));
}
#endif

template <int N>
KERNEL inline void load(typename Lanes<N>::Floats& v, const float* from) {
  read(v, from);
}

template <int N>
KERNEL inline void load(typename Lanes<N>::Floats& v, const Bfloat16* from) {
  typename Lanes<N>::Ints bits;
  widen(bits, &from->bits);
  v = (typename Lanes<N>::Floats)(bits << 16);
}

template <int N>
KERNEL inline void load(typename Lanes<N>::Floats& v, const int8_t* from) {
  typename Lanes<N>::Ints ints;
  widen(ints, from);
  v = __builtin_convertvector(ints, typename Lanes<N>::Floats);
}

KERNEL inline float decode(float value) { return value; }
KERNEL inline float decode(int8_t value) { return value; }
KERNEL inline float decode(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float v;
  read(v, &bits);
  return v;
}

// ---------------------------------------------------------------------------- one column

// Blocks R x 1: a block is a vector over R outputs, and its input is one number.
template <int R, typename Value>
KERNEL void one_column_tall(const Matrix& m, const Value* values, const float* x, float* y, int64_t begin, int64_t end) {
  typedef typename Lanes<R>::Floats Block;
  for (int64_t g = begin; g < end; ++g) {
    Block sums[4] = {}, v;
    int64_t k = m.offsets[g];
    const int64_t last = m.offsets[g + 1];
    for (; k + 4 <= last; k += 4) {  // four sums, so that an addition need not wait for the one before
      for (int i = 0; i < 4; ++i) {
        load<R>(v, values + (k + i) * R);
        sums[i] += v * x[m.columns[k + i]];
      }
    }
    for (; k < last; ++k) {
      load<R>(v, values + k * R);
      sums[0] += v * x[m.columns[k]];
    }
    const Block sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    const int64_t rows = std::min<int64_t>(R, m.outputs - g * R);
    for (int64_t i = 0; i < rows; ++i) y[g * R + i] += m.scales ? sum[i] * m.scales[g * R + i] : sum[i];
  }
}

// Blocks 1 x C: a block is a vector over C inputs of one output.
template <int C, typename Value>
KERNEL void one_column_wide(const Matrix& m, const Value* values, const float* x, float* y, int64_t begin, int64_t end) {
  typedef typename Lanes<C>::Floats Block;
  for (int64_t row = begin; row < end; ++row) {
    Block sums[4] = {}, v, inputs;
    int64_t k = m.offsets[row];
    const int64_t last = m.offsets[row + 1];
    for (; k + 4 <= last; k += 4) {
      for (int i = 0; i < 4; ++i) {
        load<C>(v, values + (k + i) * C);
        load<C>(inputs, x + m.columns[k + i] * C);
        sums[i] += v * inputs;
      }
    }
    for (; k < last; ++k) {
      load<C>(v, values + k * C);
      load<C>(inputs, x + m.columns[k] * C);
      sums[0] += v * inputs;
    }
    const Block sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float total = 0;
    for (int i = 0; i < C; ++i) total += sum[i];
    y[row] += m.scales ? total * m.scales[row] : total;
  }
}

KERNEL inline void gather(Floats& v, const float* x, const uint16_t* columns) {
#if defined(__x86_64__) && LANES > 4
  Ints places;
  widen(places, columns);
#if LANES == 16
  __mmask16 all = 0xffff;
  asm("" : "+Yk"(all));  // may be anything, so the target is zeroed first: a gather waits for what its target held
  v = (Floats)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), all, (__m512i)places, x, 4);
#else
  v = (Floats)_mm256_i32gather_ps(x, (__m256i)places, 4);
#endif
#else
  for (int i = 0; i < LANES; ++i) v[i] = x[columns[i]];
#endif
}

// Single weights: LANES inputs are gathered. A row's last few are read together with those before them, whose products
// are struck out, so that nothing behind the last weight is touched.
template <typename Value>
KERNEL void one_column_single(const Matrix& m, const Value* values, const float* x, float* y, int64_t begin,
                              int64_t end) {
  Ints lanes;
  for (int i = 0; i < LANES; ++i) lanes[i] = i;
  const uint16_t* const columns = m.columns;
  for (int64_t row = begin; row < end; ++row) {
    Floats sums[2] = {}, v, inputs = {};
    int64_t k = m.offsets[row];
    const int64_t last = m.offsets[row + 1];
    for (; k + 2 * LANES <= last; k += 2 * LANES) {
      for (int i = 0; i < 2; ++i) {
        load<LANES>(v, values + k + i * LANES);
        gather(inputs, x, columns + k + i * LANES);
        sums[i] += v * inputs;
      }
    }
    if (k + LANES <= last) {
      load<LANES>(v, values + k);
      gather(inputs, x, columns + k);
      sums[0] += v * inputs;
      k += LANES;
    }
    if (k < last && last >= LANES) {
      load<LANES>(v, values + last - LANES);
      gather(inputs, x, columns + last - LANES);
      const Floats product = v * inputs;
      sums[1] += (Floats)((Ints)product & (lanes >= static_cast<int32_t>(LANES - (last - k))));
      k = last;
    }
    const Floats sum = sums[0] + sums[1];
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += sum[i];
    for (; k < last; ++k) total += decode(values[k]) * x[columns[k]];  // the first rows of a tiny matrix
    y[row] += m.scales ? total * m.scales[row] : total;
  }
}

template <typename Value>
KERNEL void one_column_of(const Matrix& m, const float* x, float* y, int64_t begin, int64_t end) {
  const auto* values = static_cast<const Value*>(m.values);
  if (m.r == 16) return one_column_tall<16>(m, values, x, y, begin, end);
  if (m.r == 8) return one_column_tall<8>(m, values, x, y, begin, end);
  if (m.r == 4) return one_column_tall<4>(m, values, x, y, begin, end);
  if (m.c == 4) return one_column_wide<4>(m, values, x, y, begin, end);
  one_column_single(m, values, x, y, begin, end);
}

// y += W x for block rows [begin, end). x is readable up to a multiple of c.
KERNEL void one_column(const Matrix& m, const float* x, float* y, int64_t begin, int64_t end) {
  if (m.type == at::kFloat) return one_column_of<float>(m, x, y, begin, end);
  if (m.type == at::kBFloat16) return one_column_of<Bfloat16>(m, x, y, begin, end);
  one_column_of<int8_t>(m, x, y, begin, end);
}

// ---------------------------------------------------------------------------- many columns

// to[j * to_stride + i] = from[i * from_stride + j]
KERNEL void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                      int64_t to_stride) {
  typedef Lanes<4>::Floats Four;
  int64_t j = 0;
  for (; j + 4 <= columns; j += 4) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
      Four in[4], half[4], out[4];
      for (int k = 0; k < 4; ++k) read(in[k], from + (i + k) * from_stride + j);
      half[0] = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5);
      half[1] = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
      half[2] = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7);
      half[3] = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
      out[0] = __builtin_shufflevector(half[0], half[1], 0, 1, 4, 5);
      out[1] = __builtin_shufflevector(half[0], half[1], 2, 3, 6, 7);
      out[2] = __builtin_shufflevector(half[2], half[3], 0, 1, 4, 5);
      out[3] = __builtin_shufflevector(half[2], half[3], 2, 3, 6, 7);
      for (int k = 0; k < 4; ++k) std::memcpy(to + (j + k) * to_stride + i, &out[k], sizeof(Four));
    }
    for (; i < rows; ++i) {
      for (int k = 0; k < 4; ++k) to[(j + k) * to_stride + i] = from[i * from_stride + j + k];
    }
  }
  for (; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

// R outputs by N vectors of columns stay in registers while the blocks of a row pass by; a block's values are `stride`
// apart from the next one's, input i is at x + places[i], y is (R, width).
template <int R, int C, int N>
KERNEL void tile(const float* values, int64_t stride, const uint16_t* columns, int64_t count, const float* x,
                 const int64_t* places, const float* bias, float* y, int64_t width) {
  Floats sums[R][N] = {};
  for (int64_t k = 0; k < count; ++k) {
    const int64_t* own_places = places + columns[k] * C;
    const float* block = values + k * stride;
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const float* input = x + own_places[c];
      Floats v[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) read(v[n], input + n * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[r][n] += v[n] * block[r * C + c];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      sums[r][n] += bias[r];
      std::memcpy(y + r * width + n * LANES, &sums[r][n], sizeof(Floats));
    }
  }
}

// tile<R, C, n> for n <= N known at run time.
template <int R, int C, int N>
KERNEL void tile_of(int64_t n, const float* values, int64_t stride, const uint16_t* columns, int64_t count,
                    const float* x, const int64_t* places, const float* bias, float* y, int64_t width) {
  if constexpr (N > 1) {
    if (n < N) return tile_of<R, C, N - 1>(n, values, stride, columns, count, x, places, bias, y, width);
  }
  tile<R, C, N>(values, stride, columns, count, x, places, bias, y, width);
}

// Rows of y (r, width) that block row g makes, R outputs at a time.
template <int R, int C>
KERNEL void block_row_of(const Matrix& m, const float* values, int64_t g, const float* x, const int64_t* places,
                         const float* bias, float* y, int64_t width) {
  constexpr int N = std::min(8, (LANES == 16 ? 24 : 12) / R);  // of 32 registers, or of 16
  const int64_t count = m.offsets[g + 1] - m.offsets[g], vectors = width / LANES, tiles = (vectors + N - 1) / N;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t from = vectors * t / tiles, n = vectors * (t + 1) / tiles - from;
    for (int64_t r = 0; r < m.r; r += R) {
      tile_of<R, C, N>(n, values + r * C, m.r * C, m.columns + m.offsets[g], count, x + from * LANES, places, bias + r,
                       y + r * width + from * LANES, width);
    }
  }
}

KERNEL void block_row(const Matrix& m, const float* values, int64_t g, const float* x, const int64_t* places,
                      const float* bias, float* y, int64_t width) {
  if (m.r >= 8) return block_row_of<8, 1>(m, values, g, x, places, bias, y, width);
  if (m.r == 4) return block_row_of<4, 1>(m, values, g, x, places, bias, y, width);
  if (m.c == 4) return block_row_of<1, 4>(m, values, g, x, places, bias, y, width);
  block_row_of<1, 1>(m, values, g, x, places, bias, y, width);
}

// The values of block row g as floats: where they are, or decoded into `buffer`.
template <typename Value>
KERNEL const float* decoded(const Matrix& m, const Value* values, int64_t g, float* buffer) {
  const int64_t size = m.r * m.c, n = (m.offsets[g + 1] - m.offsets[g]) * size;
  values += m.offsets[g] * size;
  for (int64_t i = 0; i < n; ++i) buffer[i] = decode(values[i]);
  if (!m.scales) return buffer;
  const float* scales = m.scales + g * m.r;
  if (m.r == 1) {
    for (int64_t i = 0; i < n; ++i) buffer[i] *= scales[0];
  } else {
    const int64_t rows = std::min(m.r, m.outputs - g * m.r);
    for (int64_t i = 0; i < n; i += m.r) {
      for (int64_t r = 0; r < rows; ++r) buffer[i + r] *= scales[r];
    }
  }
  return buffer;
}

KERNEL const float* as_floats(const Matrix& m, int64_t g, float* buffer) {
  if (m.type == at::kFloat) return static_cast<const float*>(m.values) + m.offsets[g] * m.r * m.c;
  if (m.type == at::kBFloat16) return decoded(m, static_cast<const Bfloat16*>(m.values), g, buffer);
  return decoded(m, static_cast<const int8_t*>(m.values), g, buffer);
}

// Y = X W^T + bias for bands [begin, end) of BAND outputs. Input i is at x + places[i], readable up to whole vectors of
// columns, and 0 from the last input to a multiple of c; y is (columns, outputs); bias holds zeros up to a whole band.
KERNEL void many_columns(const Matrix& m, const float* x, const int64_t* places, const float* bias, float* y,
                         int64_t columns, int64_t begin, int64_t end) {
  const int64_t width = (columns + LANES - 1) / LANES * LANES;
  int64_t longest = 0;
  for (int64_t g = begin * BAND / m.r; g < std::min(end * BAND / m.r, m.groups); ++g) {
    longest = std::max<int64_t>(longest, m.offsets[g + 1] - m.offsets[g]);
  }
  std::vector<float> buffer(m.type == at::kFloat ? 0 : longest * m.r * m.c), band(BAND * width);
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t g = b * BAND / m.r; g < std::min((b + 1) * BAND / m.r, m.groups); ++g) {
      const float* values = as_floats(m, g, buffer.data());
      block_row(m, values, g, x, places, bias + g * m.r, band.data() + (g * m.r - b * BAND) * width, width);
    }
    const int64_t rows = std::min(BAND, m.outputs - b * BAND);
    transpose(band.data(), width, rows, columns, y + b * BAND, m.outputs);
  }
}

// Rows [begin, end) of all images' rows of a convolution: row i of image b is W x + bias, where x begins at
// b * image + i * step; y is (images, outputs, rows, columns).
KERNEL void convolution(const Matrix& m, const float* x, const int64_t* places, int64_t image, int64_t step,
                        const float* bias, float* y, int64_t rows, int64_t columns, int64_t begin, int64_t end) {
  const int64_t width = (columns + LANES - 1) / LANES * LANES, size = m.r * m.c;
  std::vector<float> made(m.r * width), decoded(m.type == at::kFloat ? 0 : m.offsets[m.groups] * size);
  const auto* values = m.type == at::kFloat ? static_cast<const float*>(m.values) : decoded.data();
  for (int64_t g = 0; g < m.groups && !decoded.empty(); ++g) as_floats(m, g, decoded.data() + m.offsets[g] * size);
  for (int64_t at = begin; at < end; ++at) {  // what a row needs of x stays in the caches for all block rows
    const int64_t b = at / rows, i = at % rows;
    for (int64_t g = 0; g < m.groups; ++g) {
      block_row(m, values + m.offsets[g] * size, g, x + b * image + i * step, places, bias + g * m.r, made.data(), width);
      for (int64_t r = 0; r < std::min(m.r, m.outputs - g * m.r); ++r) {
        float* to = y + ((b * m.outputs + g * m.r + r) * rows + i) * columns;
        std::memcpy(to, made.data() + r * width, columns * sizeof(float));
      }
    }
  }
}

// ---------------------------------------------------------------------------- the LSTM cell

// 1 / (1 + exp(-x)), within 2e-7; exp as in Cephes: a power of 2 times a polynomial.
KERNEL inline void sigmoid(Floats& x) {
  Floats y = -x;
  y = y > 87.0f ? Floats{} + 87.0f : y;
  y = y < -87.0f ? Floats{} - 87.0f : y;
  const Floats shifted = y * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: its last bits hold the rounded exponent
  const Floats n = shifted - 12582912.0f, f = y - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  x = 1.0f / (1.0f + p * (Floats)(((Ints)shifted << 23) + 0x3f800000));
}

// Units [begin, end), begin a multiple of LANES: gates (4, hidden) in the order i, f, g, o. gates and the states are
// readable and writable up to the next multiple of LANES.
KERNEL void lstm_cell(const float* gates, float* c, float* h, int64_t hidden, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; u += LANES) {
    Floats in, forget, candidate, out, cell;
    read(in, gates + u);
    read(forget, gates + hidden + u);
    read(candidate, gates + 2 * hidden + u);
    read(out, gates + 3 * hidden + u);
    read(cell, c + u);
    candidate *= 2.0f;  // tanh(x) = 2 sigmoid(2 x) - 1
    sigmoid(in);
    sigmoid(forget);
    sigmoid(candidate);
    sigmoid(out);
    cell = forget * cell + in * (2.0f * candidate - 1.0f);
    std::memcpy(c + u, &cell, sizeof cell);
    cell *= 2.0f;
    sigmoid(cell);
    out *= 2.0f * cell - 1.0f;
    std::memcpy(h + u, &out, sizeof out);
  }
}

KERNEL uint16_t largest(const uint16_t* columns, int64_t n) {
  uint16_t most = 0;
  for (int64_t i = 0; i < n; ++i) most = columns[i] > most ? columns[i] : most;
  return most;
}

constexpr Kernels KERNELS{NAME, LANES, one_column, many_columns, convolution, transpose, lstm_cell, largest};

}  // namespace SPARSE_ISA

#undef SPARSE_ISA
#undef NAME
#undef KERNEL
#undef LANES
