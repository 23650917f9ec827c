// Products in bytes, part of sparse.cpp: single weights of int8 with inputs that are rounded to eight bits too, column by
// column, each by its own scale, as dynamic int8 does. A step of sixteen outputs has a window of 64 inputs, from which one
// instruction takes four bytes for each of them (vpermb) and another multiplies and adds them (vpdpbusd): 64 weights, where
// floats have sixteen. Sums are of integers, so that every processor gets the same ones.

struct Bytes {
  const int8_t* values;     // (steps, LANES, EACH): 0 where a lane takes less
  const uint8_t* places;    // the same: where in the step's window each input is
  const uint16_t* starts;   // (steps): the window's first input
  const int32_t* offsets;   // (groups + 1): each group's first step
  const int32_t* rows;      // (groups, LANES): each lane's output; behind the last output there is none
  const int32_t* sums;      // (groups, LANES): of each lane's values
  const float* scales;      // (groups, LANES): what they are multiplied by
  int64_t outputs, inputs, groups;

  static constexpr int64_t LANES = 16, EACH = 4, SLOTS = LANES * EACH, WINDOW = 64;
  static constexpr int64_t ZERO = 128;  // what stands for an input of 0

  int64_t wide() const { return (inputs + WINDOW + 63) / 64 * 64; }  // of a column of bytes
};

Bytes check_bytes(at::TensorList t, int64_t outputs, int64_t inputs, const Tensor& x, const char* first) {
  TORCH_CHECK_VALUE(outputs >= 0 && outputs < SIZES, "outputs must be at least 0 and below 2^31, got ", outputs);
  TORCH_CHECK_VALUE(inputs <= 1 << 16, "inputs must be at most 65536 for products in bytes, got ", inputs);
  const char* names[] = {"values", "places", "starts", "offsets", "rows", "sums", "scales"};
  TORCH_CHECK_VALUE(t.size() == 7, "bytes must be values, places, starts, offsets, rows, sums and scales, got ", t.size(),
                    " tensors");
  const int64_t steps = t[0].dim() ? t[0].size(0) : 0, lanes = Bytes::LANES, groups = (outputs + lanes - 1) / lanes;
  const at::ScalarType types[] = {at::kChar, at::kByte, at::kUInt16, at::kInt, at::kInt, at::kInt, at::kFloat};
  const std::vector<int64_t> slots{steps, lanes, Bytes::EACH}, of_lanes{groups, lanes};
  const std::vector<int64_t> sizes[] = {slots, slots, {steps}, {groups + 1}, of_lanes, of_lanes, of_lanes};
  for (int i = 0; i < 7; ++i) {
    check_device(t[i], "bytes", x, first);
    TORCH_CHECK_TYPE(t[i].scalar_type() == types[i], "bytes: ", names[i], " must be ", types[i], ", got ",
                     t[i].scalar_type());
    TORCH_CHECK_VALUE(t[i].sizes() == at::IntArrayRef(sizes[i]) && t[i].is_contiguous(), "bytes: ", names[i], " must be ",
                      at::IntArrayRef(sizes[i]), ", got ", t[i].sizes());
  }
  const auto* starts = static_cast<const uint16_t*>(t[2].const_data_ptr());
  const auto *offsets = t[3].const_data_ptr<int32_t>(), *rows = t[4].const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(offsets[0] == 0 && offsets[groups] == steps && std::is_sorted(offsets, offsets + groups + 1),
                    "bytes: offsets must rise from 0 to the ", steps, " steps");
  const int64_t most = steps ? kernels().largest(starts, steps) : 0;
  TORCH_CHECK_VALUE(most < std::max<int64_t>(inputs, 1), "bytes: starts must be below the ", inputs, " inputs, got ", most);
  std::vector<bool> seen(outputs);
  for (int64_t i = 0; i < outputs; ++i) {
    const bool fits = rows[i] >= 0 && rows[i] < outputs && !seen[rows[i]];
    TORCH_CHECK_VALUE(fits, "bytes: rows must have each of the ", outputs, " outputs once, got ", rows[i]);
    seen[rows[i]] = true;
  }
  return {t[0].const_data_ptr<int8_t>(), static_cast<const uint8_t*>(t[1].const_data_ptr()), starts, offsets, rows,
          t[5].const_data_ptr<int32_t>(), t[6].const_data_ptr<float>(), outputs, inputs, groups};
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

// The column in bytes. Returns its scale.
float to_bytes(const float* x, int64_t n, uint8_t* to) {
  const float scale = scale_of(x, n);
  if (!(scale > 0)) {
    std::memset(to, Bytes::ZERO, n);
    return scale;
  }
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<uint8_t>(std::lrintf(x[i] / scale) + Bytes::ZERO);
  return scale;
}

struct Columns {
  const uint8_t* x;          // each in bytes, `wide` apart
  const float* scales;       // of each
  const float* const* from;  // what is added to each, (outputs)
  float* const* to;          // (outputs)
};

// Outputs of one group and column, from its sums.
inline void put_lanes(const Bytes& m, int64_t group, const float* products, const float* from, float* to) {
  const int32_t* rows = m.rows + group * Bytes::LANES;
  const int64_t lanes = std::min(Bytes::LANES, m.outputs - group * Bytes::LANES);
  for (int64_t lane = 0; lane < lanes; ++lane) to[rows[lane]] = from[rows[lane]] + products[lane];
}

void columns_in_bytes(const Bytes& m, const Columns& c, int64_t n, int64_t first, int64_t last) {
  for (int64_t group = first; group < last; ++group) {
    for (int64_t i = 0; i < n; ++i) {
      uint32_t sums[Bytes::LANES] = {};  // as int32, but that they may overflow, as crafted values can
      for (int64_t step = m.offsets[group]; step < m.offsets[group + 1]; ++step) {
        const uint8_t* window = c.x + i * m.wide() + m.starts[step];
        for (int64_t slot = 0; slot < Bytes::SLOTS; ++slot) {
          const int64_t at = step * Bytes::SLOTS + slot;
          sums[slot / Bytes::EACH] += static_cast<uint32_t>(m.values[at] * window[m.places[at] % Bytes::WINDOW]);
        }
      }
      float products[Bytes::LANES];
      for (int64_t lane = 0; lane < Bytes::LANES; ++lane) {
        const int64_t at = group * Bytes::LANES + lane;
        const auto zero = static_cast<uint32_t>(m.sums[at]) * static_cast<uint32_t>(Bytes::ZERO);
        products[lane] = static_cast<float>(static_cast<int32_t>(sums[lane] - zero)) * m.scales[at] * c.scales[i];
      }
      put_lanes(m, group, products, c.from[i], c.to[i]);
    }
  }
}

#ifdef AUDIO_LOTTERY_AVX512
#define VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")))

bool has_vnni() {
  static const bool has = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  return has && kernels().lanes == 16;
}

VNNI float to_bytes_by_vnni(const float* x, int64_t n, uint8_t* to) {
  __m512i most = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 in = n - i < 16 ? (1u << (n - i)) - 1 : 0xffff;
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_maskz_loadu_epi32(in, x + i), magnitude));
  }
  const uint32_t bits = _mm512_reduce_max_epu32(most);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  const float scale = scale_of(&largest, 1);
  if (!(scale > 0)) {
    std::memset(to, Bytes::ZERO, n);
    return scale;
  }
  const __m512 by = _mm512_set1_ps(scale);
  const __m512i zero = _mm512_set1_epi32(Bytes::ZERO);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 in = n - i < 16 ? (1u << (n - i)) - 1 : 0xffff;
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_maskz_loadu_ps(in, x + i), by));
    _mm_mask_storeu_epi8(to + i, in, _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, zero)));
  }
  return scale;
}

// C columns, each read of the weights for all of them. A single one has two chains of sums, which wait for each other less.
template <int C>
VNNI void columns_by_vnni(const Bytes& m, const Columns& c, int64_t first, int64_t last) {
  constexpr int CHAINS = C == 1 ? 2 : 1, AHEAD = 4;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const int64_t wide = m.wide();
  for (int64_t group = first; group < last; ++group) {
    __m512i sums[C * CHAINS];
    for (int i = 0; i < C * CHAINS; ++i) sums[i] = _mm512_setzero_si512();
    const int64_t end = m.offsets[group + 1], ahead = std::min(group + AHEAD, m.groups - 1) * Bytes::LANES;
    for (int i = 0; i < C; ++i) __builtin_prefetch(c.from[i] + m.rows[ahead]);  // so many rows no processor fetches by itself
    for (int64_t step = m.offsets[group]; step < end; step += CHAINS) {
      for (int chain = 0; chain < CHAINS && step + chain < end; ++chain) {
        const __m512i places = _mm512_loadu_si512(m.places + (step + chain) * Bytes::SLOTS);
        const __m512i values = _mm512_loadu_si512(m.values + (step + chain) * Bytes::SLOTS);
        const uint8_t* window = c.x + m.starts[step + chain];
        for (int i = 0; i < C; ++i) {
          const __m512i taken = _mm512_permutexvar_epi8(places, _mm512_loadu_si512(window + i * wide));
          sums[i + chain] = _mm512_dpbusd_epi32(sums[i + chain], taken, values);
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

template <int C>
void some_columns_by_vnni(const Bytes& m, Columns& c, int64_t& n, int64_t first, int64_t last) {
  for (; n >= C; n -= C) {
    columns_by_vnni<C>(m, c, first, last);
    c = {c.x + C * m.wide(), c.scales + C, c.from + C, c.to + C};
  }
}
#endif

// Y = X W^T and what is added, of n columns in bytes and groups [first, last).
void in_bytes(const Bytes& m, Columns c, int64_t n, int64_t first, int64_t last) {
#ifdef AUDIO_LOTTERY_AVX512
  if (has_vnni()) {
    some_columns_by_vnni<16>(m, c, n, first, last);
    some_columns_by_vnni<8>(m, c, n, first, last);
    some_columns_by_vnni<4>(m, c, n, first, last);
    some_columns_by_vnni<2>(m, c, n, first, last);
    some_columns_by_vnni<1>(m, c, n, first, last);
    return;
  }
#endif
  columns_in_bytes(m, c, n, first, last);
}

float column_to_bytes(const float* x, int64_t n, uint8_t* to) {
#ifdef AUDIO_LOTTERY_AVX512
  if (has_vnni()) return to_bytes_by_vnni(x, n, to);
#endif
  return to_bytes(x, n, to);
}

int64_t threads_for(const Bytes& m, int64_t columns) {
  const int64_t work = m.offsets[m.groups] * Bytes::SLOTS * columns / (4 * THREAD_VALUES);
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
  const int64_t n = y.numel() / outputs, wide = m.wide(), threads = threads_for(m, n);
  const Tensor given = x.contiguous();
  const auto* in = given.const_data_ptr<float>();
  std::vector<uint8_t> columns(n * wide);
  std::vector<float> scales(n);
  at::parallel_for(0, n, threads > 1 ? (n + threads - 1) / threads : n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) scales[i] = column_to_bytes(in + i * m.inputs, m.inputs, &columns[i * wide]);
  });
  const std::vector<float> biases = padded_bias(bias, outputs);
  const std::vector<const float*> from(n, biases.data());
  std::vector<float*> to(n);
  for (int64_t i = 0; i < n; ++i) to[i] = y.data_ptr<float>() + i * outputs;
  const auto begin = share(m.offsets, m.groups, threads);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    in_bytes(m, {columns.data(), scales.data(), from.data(), to.data()}, n, begin[first], begin[last]);
  });
  return y;
}
