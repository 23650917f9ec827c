// Products in bytes, part of sparse.cpp: single weights of int8 with inputs that are rounded to eight bits too, column by
// column, each by its own scale, as dynamic int8 does. A step of some outputs, its lanes, has a window of neighbouring
// inputs, from which it takes four bytes for each of them. Sixteen lanes have windows of 64 inputs: AVX-512 VBMI takes them
// in one instruction (vpermb) and VNNI multiplies and adds them in another (vpdpbusd), 64 weights, where floats have
// sixteen. Eight lanes have windows of 32: AVX2 looks them up in both halves (vpshufb). Sums are of integers, so that every
// processor gets the same ones (of a matrix made by sparse.py).

struct Bytes {
  const int8_t* values;     // (steps, lanes, EACH): 0 where a lane takes less
  const uint8_t* places;    // the same: where in the step's window each input is
  const uint16_t* starts;   // (steps): the window's first input
  const int32_t* offsets;   // (groups + 1): each group's first step
  const int32_t* rows;      // (groups, lanes): each lane's output; behind the last output there is none
  const int32_t* sums;      // (groups, lanes): of each lane's values; for VNNI, whose inputs are 128 too large
  const float* scales;      // (groups, lanes): what they are multiplied by
  int64_t outputs, inputs, groups, lanes;

  static constexpr int64_t EACH = 4, LANES = 16, WINDOW = 64;  // the most lanes, and their window
  static constexpr int64_t ALIGN = 32;  // starts of such windows are multiples of it, or slower

  int64_t slots() const { return lanes * EACH; }  // of a step; as many as its window has inputs
};

Bytes check_bytes(at::TensorList t, int64_t outputs, int64_t inputs, const Tensor& x, const char* first,
                  const char* name = "bytes") {
  TORCH_CHECK_VALUE(outputs >= 0 && outputs < SIZES, "outputs must be at least 0 and below 2^31, got ", outputs);
  TORCH_CHECK_VALUE(inputs <= 1 << 16, name, ": inputs must be at most 65536, got ", inputs);
  const char* names[] = {"values", "places", "starts", "offsets", "rows", "sums", "scales"};
  TORCH_CHECK_VALUE(t.size() == 7, name, " must be values, places, starts, offsets, rows, sums and scales, got ", t.size(),
                    " tensors");
  const int64_t steps = t[0].dim() ? t[0].size(0) : 0, lanes = t[0].dim() == 3 && t[0].size(1) == 8 ? 8 : Bytes::LANES;
  const int64_t groups = (outputs + lanes - 1) / lanes;
  const at::ScalarType types[] = {at::kChar, at::kByte, at::kUInt16, at::kInt, at::kInt, at::kInt, at::kFloat};
  const std::vector<int64_t> slots{steps, lanes, Bytes::EACH}, of_lanes{groups, lanes};
  const std::vector<int64_t> sizes[] = {slots, slots, {steps}, {groups + 1}, of_lanes, of_lanes, of_lanes};
  for (int i = 0; i < 7; ++i) {
    check_device(t[i], name, x, first);
    TORCH_CHECK_TYPE(t[i].scalar_type() == types[i], name, ": ", names[i], " must be ", types[i], ", got ",
                     t[i].scalar_type());
    TORCH_CHECK_VALUE(t[i].sizes() == at::IntArrayRef(sizes[i]) && t[i].is_contiguous(), name, ": ", names[i], " must be ",
                      at::IntArrayRef(sizes[i]), ", got ", t[i].sizes());
  }
  const auto* starts = static_cast<const uint16_t*>(t[2].const_data_ptr());
  const auto *offsets = t[3].const_data_ptr<int32_t>(), *rows = t[4].const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(offsets[0] == 0 && offsets[groups] == steps && std::is_sorted(offsets, offsets + groups + 1),
                    name, ": offsets must rise from 0 to the ", steps, " steps");
  const int64_t most = steps ? kernels().largest(starts, steps) : 0;
  TORCH_CHECK_VALUE(most < std::max<int64_t>(inputs, 1), name, ": starts must be below the ", inputs, " inputs, got ", most);
  std::vector<bool> seen(outputs);
  for (int64_t i = 0; i < outputs; ++i) {
    const bool fits = rows[i] >= 0 && rows[i] < outputs && !seen[rows[i]];
    TORCH_CHECK_VALUE(fits, name, ": rows must have each of the ", outputs, " outputs once, got ", rows[i]);
    seen[rows[i]] = true;
  }
  return {t[0].const_data_ptr<int8_t>(), static_cast<const uint8_t*>(t[1].const_data_ptr()), starts, offsets, rows,
          t[5].const_data_ptr<int32_t>(), t[6].const_data_ptr<float>(), outputs, inputs, groups, lanes};
}

// A column's scale: its largest magnitude is 127. NaN where not all are finite; 0 where that is too small to divide by.
float scale_of(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    most = std::max(most, bits & 0x7fffffffu);  // as integers, in which a NaN is above infinity
  }
  float largest;
  std::memcpy(&largest, &most, sizeof largest);
  if (most >= 0x7f800000u) return std::numeric_limits<float>::quiet_NaN();
  return largest / 127 < std::numeric_limits<float>::min() ? 0.0f : largest / 127;
}

void round_to_bytes(const float* x, int64_t n, float by, int8_t* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<int8_t>(std::lrintf(x[i] * by));
}

struct Columns {
  const int8_t* x;           // each in bytes
  int64_t apart;             // from one to the next; of a convolution they overlap
  const float* scales;       // of each
  const float* const* from;  // what is added to each, (outputs)
  float* const* to;          // (outputs)
};

// Outputs of one group and column, from its sums.
inline void put_lanes(const Bytes& m, int64_t group, const float* products, const float* from, float* to) {
  const int32_t* rows = m.rows + group * m.lanes;
  const int64_t lanes = std::min(m.lanes, m.outputs - group * m.lanes);
  for (int64_t lane = 0; lane < lanes; ++lane) to[rows[lane]] = from[rows[lane]] + products[lane];
}

// place(step): where the step's window is in a column, as it stands in memory: Standing, or InImage.
template <typename Place>
void columns_in_bytes(const Bytes& m, const Place& place, const Columns& c, int64_t n, int64_t first, int64_t last) {
  for (int64_t group = first; group < last; ++group) {
    for (int64_t i = 0; i < n; ++i) {
      uint32_t sums[Bytes::LANES] = {};  // as int32, but that they may overflow, as crafted values can
      for (int64_t step = m.offsets[group]; step < m.offsets[group + 1]; ++step) {
        const int8_t* window = c.x + i * c.apart + place(step);
        for (int64_t slot = 0; slot < m.slots(); ++slot) {
          const int64_t at = step * m.slots() + slot;
          sums[slot / Bytes::EACH] += static_cast<uint32_t>(m.values[at] * window[m.places[at] & (m.slots() - 1)]);
        }
      }
      float products[Bytes::LANES];
      for (int64_t lane = 0; lane < m.lanes; ++lane) {
        const float scale = m.scales[group * m.lanes + lane];
        products[lane] = static_cast<float>(static_cast<int32_t>(sums[lane])) * scale * c.scales[i];
      }
      put_lanes(m, group, products, c.from[i], c.to[i]);
    }
  }
}

#ifdef AUDIO_LOTTERY_AVX512
#define BY_AVX2 __attribute__((target("avx2,fma")))

bool by_avx2(const Bytes& m) { return m.lanes == 8 && kernels().lanes >= 8; }

BY_AVX2 float scale_by_avx2(const float* x, int64_t n) {
  __m256i most = _mm256_setzero_si256();
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  const int64_t whole = n / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    most = _mm256_max_epu32(most, _mm256_and_si256(bits, magnitude));
  }
  float largest[8 + 7];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(largest), most);
  std::copy(x + whole, x + n, largest + 8);
  return scale_of(largest, 8 + n - whole);
}

BY_AVX2 void round_by_avx2(const float* x, int64_t n, float by, int8_t* to) {
  const __m256 factor = _mm256_set1_ps(by);
  const int64_t whole = n / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), factor));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + i), _mm_packs_epi16(words, words));
  }
  round_to_bytes(x + whole, n - whole, by, to + whole);
}

// C columns, each read of the weights for all of them.
template <int C, typename Place>
BY_AVX2 void columns_by_avx2(const Bytes& m, const Place& place, const Columns& c, int64_t first, int64_t last) {
  const __m256i ones = _mm256_set1_epi16(1), without_sign = _mm256_set1_epi8(0x7f);
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t group = first; group < last; ++group) {
    __m256i sums[C];
    for (int i = 0; i < C; ++i) sums[i] = _mm256_setzero_si256();
    for (int64_t step = m.offsets[group]; step < m.offsets[group + 1]; ++step) {
      const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(m.values) + step);
      const __m256i given = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(m.places) + step);
      const __m256i places = _mm256_and_si256(given, without_sign), magnitudes = _mm256_abs_epi8(values);
      const __m256i upper = _mm256_slli_epi16(places, 3);  // whether in the upper half, as each byte's first bit
      const int8_t* window = c.x + place(step);
#pragma GCC unroll 8
      for (int i = 0; i < C; ++i) {
        const auto* halves = reinterpret_cast<const __m128i*>(window + i * c.apart);
        const __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128(halves));
        const __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128(halves + 1));
        const __m256i taken =
            _mm256_blendv_epi8(_mm256_shuffle_epi8(low, places), _mm256_shuffle_epi8(high, places), upper);
        // pairs are 2 * 128 * 127 at most: they do not saturate
        const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(taken, values));
        sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, ones));
      }
    }
    const __m256 scales = _mm256_loadu_ps(m.scales + group * 8);
    const int32_t* rows = m.rows + group * 8;
    const __m256i in_order = _mm256_add_epi32(_mm256_set1_epi32(rows[0]), lanes);
    const __m256i same = _mm256_cmpeq_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows)), in_order);
    const bool neighbours = _mm256_movemask_epi8(same) == -1 && (group + 1) * 8 <= m.outputs;
    for (int i = 0; i < C; ++i) {
      const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[i]), scales);
      const __m256 product = _mm256_mul_ps(scaled, _mm256_set1_ps(c.scales[i]));
      if (neighbours) {
        _mm256_storeu_ps(c.to[i] + rows[0], _mm256_add_ps(_mm256_loadu_ps(c.from[i] + rows[0]), product));
      } else {
        alignas(32) float products[8];
        _mm256_store_ps(products, product);
        put_lanes(m, group, products, c.from[i], c.to[i]);
      }
    }
  }
}

#define VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")))

bool has_vnni() {
  static const bool has = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  return has && kernels().lanes == 16;
}

bool by_vnni(const Bytes& m) { return m.lanes == 16 && has_vnni(); }

constexpr int32_t ZERO = 128;  // what stands for an input of 0: one factor of the instruction has no sign

VNNI float scale_by_vnni(const float* x, int64_t n) {
  __m512i most = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 in = n - i < 16 ? (1u << (n - i)) - 1 : 0xffff;
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_maskz_loadu_epi32(in, x + i), magnitude));
  }
  const uint32_t bits = _mm512_reduce_max_epu32(most);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  return scale_of(&largest, 1);
}

VNNI void round_by_vnni(const float* x, int64_t n, float by, int8_t* to) {
  const __m512 factor = _mm512_set1_ps(by);
  const __m512i zero = _mm512_set1_epi32(ZERO);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 in = n - i < 16 ? (1u << (n - i)) - 1 : 0xffff;
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(in, x + i), factor));
    _mm_mask_storeu_epi8(to + i, in, _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, zero)));
  }
}

// C columns, each read of the weights for all of them. A single one has two chains of sums, which wait for each other less.
template <int C, typename Place>
VNNI void columns_by_vnni(const Bytes& m, const Place& place, const Columns& c, int64_t first, int64_t last) {
  constexpr int CHAINS = C == 1 ? 2 : 1, AHEAD = 4, SLOTS = Bytes::LANES * Bytes::EACH;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t group = first; group < last; ++group) {
    __m512i sums[C * CHAINS];
    for (int i = 0; i < C * CHAINS; ++i) sums[i] = _mm512_setzero_si512();
    const int64_t end = m.offsets[group + 1], ahead = std::min(group + AHEAD, m.groups - 1) * Bytes::LANES;
    for (int i = 0; i < C; ++i) __builtin_prefetch(c.from[i] + m.rows[ahead]);  // so many rows no processor fetches by itself
    for (int64_t step = m.offsets[group]; step < end; step += CHAINS) {
      for (int chain = 0; chain < CHAINS && step + chain < end; ++chain) {
        const __m512i places = _mm512_loadu_si512(m.places + (step + chain) * SLOTS);
        const __m512i values = _mm512_loadu_si512(m.values + (step + chain) * SLOTS);
        const int8_t* window = c.x + place(step + chain);
        for (int i = 0; i < C; ++i) {
          const __m512i taken = _mm512_permutexvar_epi8(places, _mm512_loadu_si512(window + i * c.apart));
          __m512i sum = sums[i + chain];
          asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(taken), "v"(values));  // GCC 12 would move each sum twice
          sums[i + chain] = sum;
        }
      }
    }
    if (CHAINS == 2) sums[0] = _mm512_add_epi32(sums[0], sums[CHAINS - 1]);
    const __m512i zero = _mm512_slli_epi32(_mm512_loadu_si512(m.sums + group * Bytes::LANES), 7);  // ZERO times
    const __m512 scales = _mm512_loadu_ps(m.scales + group * Bytes::LANES);
    const int32_t* rows = m.rows + group * Bytes::LANES;
    const __m512i in_order = _mm512_add_epi32(_mm512_set1_epi32(rows[0]), lanes);
    const bool neighbours = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(rows), in_order) == 0xffff;
    for (int i = 0; i < C; ++i) {
      const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums[i], zero)), scales);
      const __m512 product = _mm512_mul_ps(scaled, _mm512_set1_ps(c.scales[i]));
      if (neighbours && (group + 1) * Bytes::LANES <= m.outputs) {
        _mm512_storeu_ps(c.to[i] + rows[0], _mm512_add_ps(_mm512_loadu_ps(c.from[i] + rows[0]), product));
      } else {
        alignas(64) float products[Bytes::LANES];
        _mm512_store_ps(products, product);
        put_lanes(m, group, products, c.from[i], c.to[i]);
      }
    }
  }
}

// `by`, C columns at a time, while there are so many.
template <int C, typename Place>
void some_columns(void (*by)(const Bytes&, const Place&, const Columns&, int64_t, int64_t), const Bytes& m,
                  const Place& place, Columns& c, int64_t& n, int64_t first, int64_t last) {
  for (; n >= C; n -= C) {
    by(m, place, c, first, last);
    c = {c.x + C * c.apart, c.apart, c.scales + C, c.from + C, c.to + C};
  }
}
#endif

template <typename Place>
void some_groups(const Bytes& m, const Place& place, Columns c, int64_t n, int64_t first, int64_t last) {
#ifdef AUDIO_LOTTERY_AVX512
  if (by_vnni(m)) {
    constexpr int64_t NEARBY = 36 << 10;  // bytes, of the first cache: sixteen columns there read weights half as often
    if (16 * c.apart <= NEARBY) some_columns<16>(columns_by_vnni<16, Place>, m, place, c, n, first, last);
    some_columns<8>(columns_by_vnni<8, Place>, m, place, c, n, first, last);
    some_columns<4>(columns_by_vnni<4, Place>, m, place, c, n, first, last);
    some_columns<2>(columns_by_vnni<2, Place>, m, place, c, n, first, last);
    some_columns<1>(columns_by_vnni<1, Place>, m, place, c, n, first, last);
    return;
  }
  if (by_avx2(m)) {
    some_columns<4>(columns_by_avx2<4, Place>, m, place, c, n, first, last);
    some_columns<2>(columns_by_avx2<2, Place>, m, place, c, n, first, last);
    some_columns<1>(columns_by_avx2<1, Place>, m, place, c, n, first, last);
    return;
  }
#endif
  columns_in_bytes(m, place, c, n, first, last);
}

// Y = X W^T and what is added, of n columns in bytes and groups [first, last): as many groups at a time as stay near while
// the columns pass by.
template <typename Place>
void in_bytes(const Bytes& m, const Place& place, const Columns& c, int64_t n, int64_t first, int64_t last) {
  constexpr int64_t NEAR = 1 << 17;  // bytes, of the second cache
  const int64_t some = n == 1 ? m.offsets[m.groups] : NEAR / (2 * m.slots());  // steps
  while (first < last) {
    const int64_t most = m.offsets[first] + some;
    const int32_t* beyond = std::upper_bound(m.offsets + first + 2, m.offsets + last + 1, most);
    const int64_t next = beyond - m.offsets - 1;
    some_groups(m, place, c, n, first, next);
    first = next;
  }
}

// What an input of 0 is in bytes, as in_bytes takes them.
int8_t zero_of(const Bytes& m) {
#ifdef AUDIO_LOTTERY_AVX512
  if (by_vnni(m)) return static_cast<int8_t>(ZERO);
#endif
  return 0;
}

float scale_of(const Bytes& m, const float* x, int64_t n) {
#ifdef AUDIO_LOTTERY_AVX512
  if (by_vnni(m)) return scale_by_vnni(x, n);
  if (by_avx2(m)) return scale_by_avx2(x, n);
#endif
  return scale_of(x, n);
}

// n floats in bytes by a scale of theirs, as in_bytes takes them.
void in_eight_bits(const Bytes& m, const float* x, int64_t n, float scale, int8_t* to) {
  if (!(scale > 0)) {
    std::memset(to, zero_of(m), n);
    return;
  }
  const float by = 1 / scale;  // a division takes four times as long
#ifdef AUDIO_LOTTERY_AVX512
  if (by_vnni(m)) return round_by_vnni(x, n, by, to);
  if (by_avx2(m)) return round_by_avx2(x, n, by, to);
#endif
  round_to_bytes(x, n, by, to);
}

// How a column stands in memory. For VNNI it stands there twice, the second time ALIGN inputs further on: so a window that
// starts at a multiple of ALIGN is a cache line of one or the other. (To read from two lines takes half as long again.)
struct Standing {
  const uint16_t* starts;
  int64_t wide;         // bytes of a copy
  uint32_t second = 0;  // how much further on the second one has a window, if there is one

  explicit Standing(const Bytes& m) : starts(m.starts), wide((m.inputs + m.WINDOW + 63) / 64 * 64) {
#ifdef AUDIO_LOTTERY_AVX512
    if (by_vnni(m)) second = wide - m.ALIGN;
#endif
  }

  int64_t bytes() const { return second ? 2 * wide : wide; }

  uint32_t operator()(int64_t step) const {
    const uint32_t start = starts[step];
    return start + (-(start / static_cast<uint32_t>(Bytes::ALIGN) & 1) & second);
  }

  // Of n columns, each at a cache line of its own.
  Tensor room(int64_t n, const Tensor& like) const { return at::empty({n, bytes()}, like.options().dtype(at::kChar)); }

  // Puts a column there. Returns its scale.
  float put(const Bytes& m, const float* x, int8_t* to) const {
    const float scale = scale_of(m, x, m.inputs);
    in_eight_bits(m, x, m.inputs, scale, to);
    std::memset(to + m.inputs, 0, wide - m.inputs);  // windows read it, for values of 0
    if (second) std::memcpy(to + wide, to + m.ALIGN, wide - m.ALIGN);
    return scale;
  }
};

int64_t threads_for(const Bytes& m, int64_t columns) {
  const int64_t work = m.offsets[m.groups] * m.slots() * columns / (4 * THREAD_VALUES);
  return at::in_parallel_region() ? 1 : std::clamp<int64_t>(work, 1, at::get_num_threads());
}

Tensor sparse_linear_in_bytes(const Tensor& x, at::TensorList bytes, const std::optional<Tensor>& bias, int64_t outputs) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "x must be float32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must be (..., inputs), got a scalar");
  const Bytes m = check_bytes(bytes, outputs, x.size(-1), x, "x");
  if (bias) check_floats(*bias, "bias", {outputs}, x, "x");
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  Tensor y = fresh(sizes, x);
  if (y.numel() == 0) return y;
  const int64_t n = y.numel() / outputs, threads = threads_for(m, n);
  const int64_t most = std::min<int64_t>(n, 256), grain = (most + threads - 1) / threads;  // columns that stay near
  const Standing standing(m);
  const Tensor given = x.contiguous(), columns = standing.room(most, x);
  const auto* in = given.const_data_ptr<float>();
  auto* const at_columns = columns.data_ptr<int8_t>();
  std::vector<float> scales(most);
  const std::vector<float> biases = padded_bias(bias, outputs);
  const std::vector<const float*> from(most, biases.data());
  std::vector<float*> to(most);
  const Columns these{at_columns, standing.bytes(), scales.data(), from.data(), to.data()};
  const auto begin = share(m.offsets, m.groups, threads);
  for (int64_t at = 0; at < n; at += most) {
    const int64_t some = std::min(most, n - at);
    at::parallel_for(0, some, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        scales[i] = standing.put(m, in + (at + i) * m.inputs, at_columns + i * standing.bytes());
        to[i] = y.data_ptr<float>() + (at + i) * outputs;
      }
    });
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      in_bytes(m, standing, these, some, begin[first], begin[last]);
    });
  }
  return y;
}

struct InImage {
  const int64_t* starts;  // (steps)

  int64_t operator()(int64_t step) const { return starts[step]; }
};

// Columns of a convolution are parts of an image whose pixels hold their channels: kernel[0] rows of `pixels`.
// Among its inputs there are WINDOW more behind each, so that no step reaches from one row into the next.
Tensor sparse_conv2d_in_bytes(const Tensor& x, at::TensorList bytes, const std::optional<Tensor>& bias, int64_t outputs,
                              at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                              at::IntArrayRef dilation) {
  const Sizes size = check_convolution(x, kernel, stride, padding, dilation);
  const int64_t batch = x.size(0), channels = x.size(1), high = x.size(2), wide = x.size(3);
  const int64_t pixels = dilation[1] * (kernel[1] - 1) + 1, most = 1 << 16;
  TORCH_CHECK_VALUE(channels <= most / pixels && pixels * channels + Bytes::WINDOW <= most / kernel[0],
                    "a kernel in bytes must have at most 65536 inputs, with 64 behind each row, got ", kernel, " of ",
                    channels, " channels and dilation ", dilation);
  const int64_t pitch = pixels * channels + Bytes::WINDOW, row = std::max<int64_t>((wide + 2 * padding[1]) * channels, 1);
  const Bytes m = check_bytes(bytes, outputs, kernel[0] * pitch, x, "x");
  if (bias) check_floats(*bias, "bias", {outputs}, x, "x");
  Tensor y = fresh({batch, outputs, size[0], size[1]}, x);
  if (y.numel() == 0) return y;

  const int64_t behind = (pitch + Bytes::WINDOW) / row + 1;  // rows that the last window may read
  const Tensor images = at::full({batch, high + 2 * padding[0] + behind, row}, zero_of(m), x.options().dtype(at::kChar));
  const Tensor given = x.contiguous();
  std::vector<float> scales(batch * size[1]);
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> turned(wide * channels);  // a row of pixels
    for (int64_t b = begin; b < end; ++b) {
      const float* image = given.const_data_ptr<float>() + b * channels * high * wide;
      const float scale = scale_of(m, image, channels * high * wide);
      std::fill_n(&scales[b * size[1]], size[1], scale);
      for (int64_t h = 0; h < high; ++h) {
        int8_t* to = images.data_ptr<int8_t>() + b * images.stride(0) + (h + padding[0]) * row + padding[1] * channels;
        for (int64_t c = 0; c < channels; c += LINE) {  // a cache line of each pixel: of more channels pages would be too many
          const int64_t some = std::min(LINE, channels - c);
          kernels().transpose(image + (c * high + h) * wide, high * wide, some, wide, turned.data() + c, channels);
        }
        in_eight_bits(m, turned.data(), wide * channels, scale, to);
      }
    }
  });
  std::vector<int64_t> starts(m.offsets[m.groups]);
  for (size_t i = 0; i < starts.size(); ++i) starts[i] = m.starts[i] / pitch * dilation[0] * row + m.starts[i] % pitch;
  const std::vector<float> biases = padded_bias(bias, outputs);
  const std::vector<const float*> from(size[1], biases.data());
  const int64_t rows = batch * size[0], threads = threads_for(m, rows * size[1]);
  at::parallel_for(0, rows, threads > 1 ? (rows + threads - 1) / threads : rows, [&](int64_t begin, int64_t end) {
    std::vector<float> band(size[1] * outputs);
    std::vector<float*> to(size[1]);
    for (int64_t i = 0; i < size[1]; ++i) to[i] = &band[i * outputs];
    for (int64_t at = begin; at < end; ++at) {
      const int64_t b = at / size[0], i = at % size[0];
      const int8_t* in = images.const_data_ptr<int8_t>() + b * images.stride(0) + i * stride[0] * row;
      const Columns columns{in, stride[1] * channels, &scales[b * size[1]], from.data(), to.data()};
      in_bytes(m, InImage{starts.data()}, columns, size[1], 0, m.groups);
      float* out = y.data_ptr<float>() + (b * outputs * size[0] + i) * size[1];
      kernels().transpose(band.data(), outputs, size[1], outputs, out, size[0] * size[1]);
    }
  });
  return y;
}
