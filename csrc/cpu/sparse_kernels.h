// The inner loops of sparse.cpp, once an instruction set: instruction_sets.h says how.

namespace ISA {

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
  int32_t four;  // (_mm_loadu_si32 of gcc 11 puts them elsewhere)
  read(four, from);
  v = (Lanes<4>::Ints)_mm_cvtepi8_epi32(_mm_cvtsi32_si128(four));
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

// ---------------------------------------------------------------------------- one column, in windows

// inputs[i] = x[i-th of the last bits of places]; x is as many inputs as a window has.
KERNEL inline void pick(Lanes<8>::Floats& inputs, const float* x, const Lanes<8>::Ints& places) {
#if defined(__x86_64__) && LANES > 4
  __m256 window = _mm256_loadu_ps(x);
  asm("" : "+x"(window));  // loaded by itself: AMD takes twice as long where it is the shuffle's operand
  inputs = (Lanes<8>::Floats)_mm256_permutevar8x32_ps(window, (__m256i)places);
#else
  for (int i = 0; i < 8; ++i) inputs[i] = x[places[i] & 7];
#endif
}

KERNEL inline void pick(Lanes<16>::Floats& inputs, const float* x, const Lanes<16>::Ints& places) {
#if defined(__x86_64__) && LANES == 16
  __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
  asm("" : "+v"(low), "+v"(high));
  inputs = (Lanes<16>::Floats)_mm512_permutex2var_ps(low, (__m512i)places, high);
#else
  for (int i = 0; i < 16; ++i) inputs[i] = x[places[i] & 31];
#endif
}

template <int L, typename Value>
KERNEL void in_windows_of(const Windows& w, const float* x, const float* from, float* y, int64_t begin, int64_t end) {
  constexpr int STEPS = Steps<L>::A_BUNDLE, SOME = 32;
  float sums_of[SOME * L];  // of some groups: who goes to their rows at once need not wait for each group's sums
  for (int64_t first = begin; first < end; first += SOME) {
    const int64_t last = std::min(first + SOME, end);
    for (int64_t g = first; g < last; ++g) {
      typename Lanes<L>::Floats sums[4] = {}, v, inputs;
      for (int64_t b = w.offsets[g]; b < w.offsets[g + 1]; ++b) {
        const Value* values = static_cast<const Value*>(w.values) + b * STEPS * L;
        const uint16_t* starts = w.starts + b * STEPS;
        typename Lanes<L>::Ints places;
        read(places, w.places + b * L);
#pragma GCC unroll 8
        for (int step = 0; step < STEPS; ++step) {
          load<L>(v, values + step * L);
          pick(inputs, x + starts[step], places >> Steps<L>::BITS * step);
          sums[step % 4] += v * inputs;
        }
      }
      sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      std::memcpy(sums_of + (g - first) * L, sums, sizeof sums[0]);
    }
    const int32_t* rows = w.rows + first * L;
    for (int64_t i = 0; i < (last - first) * L; ++i) {
      const int64_t row = rows[i];
      if (row < w.outputs) y[row] = from[row] + (w.scales ? sums_of[i] * w.scales[row] : sums_of[i]);
    }
  }
}

template <int L>
KERNEL void in_windows_of(const Windows& w, const float* x, const float* from, float* y, int64_t begin, int64_t end) {
  if (w.type == at::kFloat) return in_windows_of<L, float>(w, x, from, y, begin, end);
  if (w.type == at::kBFloat16) return in_windows_of<L, Bfloat16>(w, x, from, y, begin, end);
  in_windows_of<L, int8_t>(w, x, from, y, begin, end);
}

// y = from + W x for groups [begin, end) of rows. x is readable for a window that begins with its last input.
KERNEL void in_windows(const Windows& w, const float* x, const float* from, float* y, int64_t begin, int64_t end) {
  if (w.lanes == 16) return in_windows_of<16>(w, x, from, y, begin, end);
  in_windows_of<8>(w, x, from, y, begin, end);
}

// ---------------------------------------------------------------------------- many columns

#ifndef SHUFFLED
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (Lanes<4>::Ints){__VA_ARGS__})
#endif
#endif

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
      half[0] = SHUFFLED(in[0], in[1], 0, 4, 1, 5);
      half[1] = SHUFFLED(in[2], in[3], 0, 4, 1, 5);
      half[2] = SHUFFLED(in[0], in[1], 2, 6, 3, 7);
      half[3] = SHUFFLED(in[2], in[3], 2, 6, 3, 7);
      out[0] = SHUFFLED(half[0], half[1], 0, 1, 4, 5);
      out[1] = SHUFFLED(half[0], half[1], 2, 3, 6, 7);
      out[2] = SHUFFLED(half[2], half[3], 0, 1, 4, 5);
      out[3] = SHUFFLED(half[2], half[3], 2, 3, 6, 7);
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

// sums (R outputs, N vectors of columns) += a block times its inputs; input i is at x + places[i].
template <int R, int C, int N>
KERNEL inline void add_block(Floats (&sums)[R][N], const float* block, const float* x, const int64_t* places) {
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    const float* input = x + places[c];
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

// R outputs by N vectors of columns stay in registers while blocks of a row pass by; a block's values are `stride` apart
// from the next one's, y is (R, width). The sums begin with the bias, or with y where there is none. Few sums are kept
// several times, so that an addition need not wait for the one before.
template <int R, int C, int N>
KERNEL void tile(const float* values, int64_t stride, const uint16_t* columns, int64_t count, const float* x,
                 const int64_t* places, const float* bias, float* y, int64_t width) {
  constexpr int CHAINS = std::clamp(8 / (R * N), 1, 4);
  Floats sums[CHAINS][R][N] = {};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      if (bias) {
        sums[0][r][n] += bias[r];
      } else {
        read(sums[0][r][n], y + r * width + n * LANES);
      }
    }
  }
  int64_t k = 0;
  for (; k + CHAINS <= count; k += CHAINS) {
#pragma GCC unroll 4
    for (int s = 0; s < CHAINS; ++s) {
      add_block<R, C, N>(sums[s], values + (k + s) * stride, x, places + columns[k + s] * C);
    }
  }
  for (; k < count; ++k) add_block<R, C, N>(sums[0], values + k * stride, x, places + columns[k] * C);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
      for (int s = 1; s < CHAINS; ++s) sums[0][r][n] += sums[s][r][n];
      std::memcpy(y + r * width + n * LANES, &sums[0][r][n], sizeof(Floats));
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

// Floats of a panel that were fastest on processors with AVX-512 (second cache) and without (first cache).
constexpr int64_t NEAR = LANES == 16 ? 65536 : 12288;

// Rows of y (outputs, width) that block rows [begin, end) make, R outputs at a time. values and bias begin with theirs.
// Inputs pass in panels, so that what a tile's columns need of them stays near for all rows; `overlap` neighbouring inputs
// share their places.
template <int R, int C>
KERNEL void block_rows_of(const Matrix& m, const float* values, int64_t begin, int64_t end, const float* x,
                          const int64_t* places, int64_t overlap, const float* bias, float* y, int64_t width) {
  constexpr int N = std::min(8, (LANES == 16 ? 24 : 12) / R);  // of 32 registers, or of 16
  const int64_t panel = NEAR / (N * LANES) * overlap / C, last = (m.inputs + C - 1) / C;
  const int64_t panels = std::max<int64_t>((last + panel - 1) / panel, 1), rows = end - begin;
  std::vector<int32_t> from((panels + 1) * rows);  // each panel's first block of each row
  for (int64_t g = 0; g < rows; ++g) {
    const int32_t first = m.offsets[begin + g], behind = m.offsets[begin + g + 1];
    for (int64_t p = 0; p < panels; ++p) {
      const auto limit = static_cast<int32_t>(std::min(p * panel, last));
      int32_t before = 0;
      for (int32_t k = first; k < behind; ++k) before += m.columns[k] < limit;
      from[p * rows + g] = first + before;
    }
    from[panels * rows + g] = behind;
  }
  const int64_t vectors = width / LANES, tiles = (vectors + N - 1) / N;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t start = vectors * t / tiles, n = vectors * (t + 1) / tiles - start;
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t g = 0; g < rows; ++g) {
        const int32_t k = from[p * rows + g], count = from[(p + 1) * rows + g] - k;
        const float* block = values + (k - m.offsets[begin]) * m.r * C;
        for (int64_t r = 0; r < m.r && (count || p == 0); r += R) {
          tile_of<R, C, N>(n, block + r * C, m.r * C, m.columns + k, count, x + start * LANES, places,
                           p ? nullptr : bias + g * m.r + r, y + (g * m.r + r) * width + start * LANES, width);
        }
      }
    }
  }
}

KERNEL void block_rows(const Matrix& m, const float* values, int64_t begin, int64_t end, const float* x,
                       const int64_t* places, int64_t overlap, const float* bias, float* y, int64_t width) {
  if (m.r >= 8) return block_rows_of<8, 1>(m, values, begin, end, x, places, overlap, bias, y, width);
  if (m.r == 4) return block_rows_of<4, 1>(m, values, begin, end, x, places, overlap, bias, y, width);
  if (m.c == 4) return block_rows_of<1, 4>(m, values, begin, end, x, places, overlap, bias, y, width);
  block_rows_of<1, 1>(m, values, begin, end, x, places, overlap, bias, y, width);
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

// Values of block rows [begin, end) as floats: where they are, or decoded into `buffer`.
KERNEL const float* all_as_floats(const Matrix& m, int64_t begin, int64_t end, std::vector<float>& buffer) {
  const int64_t size = m.r * m.c, first = m.offsets[begin];
  if (m.type == at::kFloat) return static_cast<const float*>(m.values) + first * size;
  buffer.resize((m.offsets[end] - first) * size);
  for (int64_t g = begin; g < end; ++g) as_floats(m, g, buffer.data() + (m.offsets[g] - first) * size);
  return buffer.data();
}

// Y = X W^T + bias for bands [begin, end) of BAND outputs. Input i is at x + places[i], readable up to whole vectors of
// columns, and 0 from the last input to a multiple of c; y is (columns, outputs); bias holds zeros up to a whole band.
KERNEL void many_columns(const Matrix& m, const float* x, const int64_t* places, const float* bias, float* y,
                         int64_t columns, int64_t begin, int64_t end) {
  const int64_t width = (columns + LANES - 1) / LANES * LANES, size = BAND / m.r;
  std::vector<float> buffer, band(BAND * width);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * size, last = std::min(first + size, m.groups), rows = std::min(BAND, m.outputs - b * BAND);
    const float* values = all_as_floats(m, first, last, buffer);
    block_rows(m, values, first, last, x, places, 1, bias + b * BAND, band.data(), width);
    transpose(band.data(), width, rows, columns, y + b * BAND, m.outputs);
  }
}

// Rows [begin, end) of all images' rows of a convolution: row i of image b is W x + bias, where x begins at
// b * image + i * step; y is (images, outputs, rows, columns). `overlap` neighbouring inputs share their places.
KERNEL void convolution(const Matrix& m, const float* x, const int64_t* places, int64_t overlap, int64_t image,
                        int64_t step, const float* bias, float* y, int64_t rows, int64_t columns, int64_t begin,
                        int64_t end) {
  const int64_t width = (columns + LANES - 1) / LANES * LANES, size = BAND / m.r;
  std::vector<float> band(BAND * width), decoded;
  const float* values = all_as_floats(m, 0, m.groups, decoded);
  for (int64_t at = begin; at < end; ++at) {  // what a row needs of x stays in the caches for all block rows
    const int64_t b = at / rows, i = at % rows;
    for (int64_t g = 0; g < m.groups; g += size) {
      const float* own = values + m.offsets[g] * m.r * m.c;
      block_rows(m, own, g, std::min(g + size, m.groups), x + b * image + i * step, places, overlap, bias + g * m.r,
                 band.data(), width);
      for (int64_t r = 0; r < std::min(BAND, m.outputs - g * m.r); ++r) {
        float* to = y + ((b * m.outputs + g * m.r + r) * rows + i) * columns;
        std::memcpy(to, band.data() + r * width, columns * sizeof(float));
      }
    }
  }
}

// ---------------------------------------------------------------------------- the LSTM cell

#include "exponential.h"

// Units [begin, end), begin a multiple of LANES: gates (4, hidden) in the order i, f, g, o. gates and the states are
// readable and writable up to the next multiple of LANES. Some vectors at a time go as far as the cell's state, and then on:
// the exponentials of one gate need not wait for another's.
KERNEL void lstm_cell(const float* gates, float* c, float* h, int64_t hidden, int64_t begin, int64_t end) {
  constexpr int64_t SOME = 8;
  Floats cells[SOME], outs[SOME];
  for (int64_t first = begin; first < end; first += SOME * LANES) {
    const int64_t vectors = std::min((end - first + LANES - 1) / LANES, SOME);
    for (int64_t i = 0; i < vectors; ++i) {
      const int64_t u = first + i * LANES;
      Floats in, forget, candidate, cell;
      read(in, gates + u);
      read(forget, gates + hidden + u);
      read(candidate, gates + 2 * hidden + u);
      read(outs[i], gates + 3 * hidden + u);
      read(cell, c + u);
      candidate *= 2.0f;  // tanh(x) = 2 sigmoid(2 x) - 1
      sigmoid(in);
      sigmoid(forget);
      sigmoid(candidate);
      sigmoid(outs[i]);
      cells[i] = forget * cell + in * (2.0f * candidate - 1.0f);
      std::memcpy(c + u, &cells[i], sizeof cell);
    }
    for (int64_t i = 0; i < vectors; ++i) {
      cells[i] *= 2.0f;
      sigmoid(cells[i]);
      outs[i] *= 2.0f * cells[i] - 1.0f;
      std::memcpy(h + first + i * LANES, &outs[i], sizeof outs[i]);
    }
  }
}

KERNEL uint16_t largest(const uint16_t* columns, int64_t n) {
  uint16_t most = 0;
  for (int64_t i = 0; i < n; ++i) most = columns[i] > most ? columns[i] : most;
  return most;
}

constexpr Kernels KERNELS{NAME, LANES, one_column, in_windows, many_columns, convolution, transpose, lstm_cell, largest};

}  // namespace ISA
