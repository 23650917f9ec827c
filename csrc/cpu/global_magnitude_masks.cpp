// global_magnitude_masks on CPU: the exact `keep`-th largest |w| in about one pass over the weights.
//
// The bits of a finite |w| sort like its value, so magnitudes are compared as unsigned integers ("keys"). The wanted key
// is the threshold; a bracket [low, high) is a range of keys about it.
//   1. A sample gives a bracket.
//   2. One pass writes mask = survivor and key >= high, counts, and lists the few survivors inside the bracket.
//   3. The threshold is selected among those candidates, and their masks are set.
// Heavy ties overflow the list. They are then almost surely at a key that the sample saw, so one more pass counts about
// the bracket's ends, which leaves one of them, the threshold, or the few keys between. The same with another sample
// where the first one misled. The result depends neither on the samples nor on the number of threads. Any byte of a mask
// but 0 is true.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../checks.h"
#include "huge_pages.h"
#include "vector.h"

namespace audio_lottery {
namespace {

constexpr int64_t CHUNK = 1 << 15;        // elements a task
constexpr int64_t BLOCK = 1 << 11;        // elements whose flags stay in the first-level cache
constexpr int64_t SAMPLE_MOST = 1 << 22;  // keys drawn
constexpr int64_t CANDIDATES = 3 << 19;   // listed at most (12 MB), and at most one in CANDIDATES_EVERY
constexpr int64_t CANDIDATES_EVERY = 8;
constexpr double DEVIATIONS = 3;          // half the bracket, in standard deviations of the sampled rank

template <typename Key>
constexpr Key SIGNLESS = std::numeric_limits<Key>::max() >> 1;

template <typename Key>
struct Bracket {
  Key low, high;
  int64_t above, inside;  // survivors with key >= high, and with low <= key < high
};

struct Counts {
  int64_t survivors = 0, above = 0, inside = 0;
  uint64_t largest = 0;  // of all keys, pruned or not: finds NaN and infinity
};

// Survivors inside the bracket: their places in the chunk, and their keys.
template <typename Key>
struct Candidates {
  std::vector<uint32_t> offsets;
  std::vector<Key> keys;
};

// A block's worth of them; vector code writes up to 16 beyond the last.
template <typename Key>
struct Found {
  uint32_t offsets[BLOCK + 16];
  Key keys[BLOCK + 16];
  int64_t count;
};

template <typename Key>
struct Chunk {
  const Key* weight;
  const uint8_t* mask;
  uint8_t* out;
  int64_t n;
  int64_t place;  // of its first element, among all
  size_t tensor;
  Counts counts;
  Candidates<Key> candidates;
};

template <typename Key>
using Chunks = std::vector<Chunk<Key>>;

// Eight keys, ascending, and how many survivors are as large or larger.
template <typename Key>
using Bounds = std::array<Key, 8>;
using AtLeast = std::array<int64_t, 8>;

// One block of the pass: writes out (survivor and key >= high), counts, and lists survivors with low <= key < high in
// `found` (places from `offset` on).
template <typename Key>
AUDIO_LOTTERY_INLINE void scan_block(const Key* __restrict weight, const uint8_t* __restrict mask,
                                     uint8_t* __restrict out, int64_t n, Key low, Key high, Counts& counts,
                                     Found<Key>& found, uint32_t offset) {
  alignas(64) uint8_t flags[BLOCK];
  using Signed = std::make_signed_t<Key>;  // keys fit, and signed comparisons vectorise at the baseline
  const Signed signed_low = low, signed_high = high;
  Signed largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Signed key = weight[i] & SIGNLESS<Key>;
    flags[i] = static_cast<uint8_t>((key >= signed_high) + (key >= signed_low));  // 0 below, 1 inside, 2 above
    largest = key > largest ? key : largest;
  }
  counts.largest = std::max<uint64_t>(counts.largest, largest);
  for (int64_t start = 0; start < n; start += 128) {  // counts of 128 fit a byte
    const int64_t end = std::min(n, start + 128);
    uint8_t survivors = 0, above = 0, inside = 0;
    for (int64_t i = start; i < end; ++i) {
      const uint8_t m = mask[i] != 0, is_above = m & (flags[i] >> 1), is_inside = m & flags[i];
      out[i] = is_above;
      flags[i] = is_inside;
      survivors += m;
      above += is_above;
      inside += is_inside;
    }
    counts.survivors += survivors;
    counts.above += above;
    counts.inside += inside;
  }
  if (low == high) return;
  for (int64_t word = 0; word < n; word += 8) {  // eight flags at a time: nearly all are 0
    uint64_t eight = 0;
    const int64_t end = std::min(n, word + 8);
    std::memcpy(&eight, flags + word, end - word);
    if (eight == 0) continue;
    for (int64_t i = word; i < end; ++i) {
      found.offsets[found.count] = offset + static_cast<uint32_t>(i);
      found.keys[found.count] = weight[i] & SIGNLESS<Key>;
      found.count += flags[i];
    }
  }
}

// Adds to at_least[k] the survivors with key >= bounds[k], and finds the largest of all keys.
template <typename Key>
AUDIO_LOTTERY_INLINE void count_block(const Key* __restrict weight, const uint8_t* __restrict mask, int64_t n,
                                      const Bounds<Key>& bounds, AtLeast& at_least, uint64_t& largest_key) {
  using Signed = std::make_signed_t<Key>;
  Signed keys[BLOCK], largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Signed key = weight[i] & SIGNLESS<Key>;
    keys[i] = key | static_cast<Signed>((mask[i] != 0) - 1);  // -1 where pruned
    largest = key > largest ? key : largest;
  }
  largest_key = std::max<uint64_t>(largest_key, largest);
  for (size_t k = 0; k < bounds.size(); ++k) {
    const Signed bound = bounds[k];
    Signed count = 0;  // a block's counts fit 16 bits
    for (int64_t i = 0; i < n; ++i) count += keys[i] >= bound;
    at_least[k] += count;
  }
}

#define AUDIO_LOTTERY_VERSIONS(Key)                                                                                    \
  AUDIO_LOTTERY_CLONES void scan(const Key* weight, const uint8_t* mask, uint8_t* out, int64_t n, Key low, Key high,   \
                                 Counts& counts, Found<Key>& found, uint32_t offset) {                                 \
    scan_block(weight, mask, out, n, low, high, counts, found, offset);                                                \
  }                                                                                                                    \
  AUDIO_LOTTERY_CLONES void count(const Key* weight, const uint8_t* mask, int64_t n, const Bounds<Key>& bounds,        \
                                  AtLeast& at_least, uint64_t& largest) {                                              \
    count_block(weight, mask, n, bounds, at_least, largest);                                                           \
  }
AUDIO_LOTTERY_VERSIONS(uint16_t)
AUDIO_LOTTERY_VERSIONS(uint32_t)
AUDIO_LOTTERY_VERSIONS(uint64_t)

// What the passes call.
template <typename Key>
void scan_best(const Key* weight, const uint8_t* mask, uint8_t* out, int64_t n, Key low, Key high, Counts& counts,
               Found<Key>& found, uint32_t offset) {
  scan(weight, mask, out, n, low, high, counts, found, offset);
}

template <typename Key>
void count_best(const Key* weight, const uint8_t* mask, int64_t n, const Bounds<Key>& bounds, AtLeast& at_least,
                uint64_t& largest) {
  count(weight, mask, n, bounds, at_least, largest);
}

#ifdef AUDIO_LOTTERY_AVX512
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 means its own header, which leaves vectors undefined

// scan for float32 with comparisons into mask registers and compressing stores: half the time of what compilers make.
AUDIO_LOTTERY_AVX512 void scan_avx512(const uint32_t* weight, const uint8_t* mask, uint8_t* out, int64_t n,
                                      uint32_t low, uint32_t high, Counts& counts, Found<uint32_t>& found,
                                      uint32_t offset) {
  const __m512i lows = _mm512_set1_epi32(low), highs = _mm512_set1_epi32(high), signless = _mm512_set1_epi32(0x7fffffff);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i largest = _mm512_setzero_si512();
  Counts sum;
  int64_t count = found.count;
  for (int64_t i = 0; i < n; i += 64) {
    const uint64_t valid = n - i >= 64 ? ~uint64_t{0} : (uint64_t{1} << (n - i)) - 1;
    const __m512i bytes = _mm512_maskz_loadu_epi8(valid, mask + i);
    const uint64_t survivors = _mm512_test_epi8_mask(bytes, bytes);
    __m512i keys[4];
    uint64_t at_least_low = 0, at_least_high = 0;
    for (int part = 0; part < 64; part += 16) {
      const __m512i key = _mm512_and_si512(_mm512_maskz_loadu_epi32(valid >> part, weight + i + part), signless);
      at_least_low |= static_cast<uint64_t>(_mm512_cmpge_epu32_mask(key, lows)) << part;
      at_least_high |= static_cast<uint64_t>(_mm512_cmpge_epu32_mask(key, highs)) << part;
      largest = _mm512_max_epu32(largest, key);
      keys[part / 16] = key;
    }
    const uint64_t above = survivors & at_least_high, inside = survivors & at_least_low & ~at_least_high;
    _mm512_mask_storeu_epi8(out + i, valid, _mm512_maskz_set1_epi8(above, 1));
    sum.survivors += __builtin_popcountll(survivors);
    sum.above += __builtin_popcountll(above);
    if (inside == 0) continue;
    sum.inside += __builtin_popcountll(inside);
    for (int part = 0; part < 64; part += 16) {
      const auto listed = static_cast<__mmask16>(inside >> part);
      const __m512i places = _mm512_add_epi32(lanes, _mm512_set1_epi32(offset + static_cast<uint32_t>(i + part)));
      _mm512_storeu_si512(found.offsets + count, _mm512_maskz_compress_epi32(listed, places));
      _mm512_storeu_si512(found.keys + count, _mm512_maskz_compress_epi32(listed, keys[part / 16]));
      count += __builtin_popcount(listed);
    }
  }
  found.count = count;
  counts.survivors += sum.survivors;
  counts.above += sum.above;
  counts.inside += sum.inside;
  uint32_t each[16];
  _mm512_storeu_si512(each, largest);
  counts.largest = std::max<uint64_t>(counts.largest, *std::max_element(each, each + 16));
}

// count for float32, with all eight counts in registers.
AUDIO_LOTTERY_AVX512 void count_avx512(const uint32_t* weight, const uint8_t* mask, int64_t n,
                                       const Bounds<uint32_t>& bounds, AtLeast& at_least, uint64_t& largest_key) {
  const __m512i signless = _mm512_set1_epi32(0x7fffffff), one = _mm512_set1_epi32(1);
  __m512i largest = _mm512_setzero_si512(), bound[8], sum[8];
  for (int k = 0; k < 8; ++k) {
    bound[k] = _mm512_set1_epi32(bounds[k]);
    sum[k] = _mm512_setzero_si512();
  }
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 valid = n - i >= 16 ? 0xffff : (1u << (n - i)) - 1;
    const __m512i key = _mm512_and_si512(_mm512_maskz_loadu_epi32(valid, weight + i), signless);
    const __m128i bytes = _mm_maskz_loadu_epi8(valid, mask + i);
    const __mmask16 survivors = _mm_test_epi8_mask(bytes, bytes);
    largest = _mm512_max_epu32(largest, key);
    for (int k = 0; k < 8; ++k) {
      sum[k] = _mm512_mask_add_epi32(sum[k], _mm512_mask_cmpge_epu32_mask(survivors, key, bound[k]), sum[k], one);
    }
  }
  uint32_t each[16];
  _mm512_storeu_si512(each, largest);
  largest_key = std::max<uint64_t>(largest_key, *std::max_element(each, each + 16));
  for (int k = 0; k < 8; ++k) {
    _mm512_storeu_si512(each, sum[k]);
    for (const uint32_t lane : each) at_least[k] += lane;
  }
}

// The same with 256-bit vectors, for processors without AVX-512: a third of the time of what compilers make.
__attribute__((target("avx2,popcnt"))) void scan_avx2(const uint32_t* weight, const uint8_t* mask, uint8_t* out, int64_t n,
                                                      uint32_t low, uint32_t high, Counts& counts,
                                                      Found<uint32_t>& found, uint32_t offset) {
  const __m256i below_low = _mm256_set1_epi32(low - 1), below_high = _mm256_set1_epi32(high - 1);  // > for >=
  const __m256i signless = _mm256_set1_epi32(0x7fffffff), zero = _mm256_setzero_si256(), one = _mm256_set1_epi8(1);
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // after two packs, which go by halves
  __m256i largest = zero;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    __m256i at_least_low[4], at_least_high[4];
    for (int part = 0; part < 4; ++part) {
      const __m256i key = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(weight + i + 8 * part)), signless);
      at_least_low[part] = _mm256_cmpgt_epi32(key, below_low);
      at_least_high[part] = _mm256_cmpgt_epi32(key, below_high);
      largest = _mm256_max_epi32(largest, key);
    }
    __m256i bytes[2];
    for (int which = 0; which < 2; ++which) {
      const __m256i* words = which ? at_least_high : at_least_low;
      bytes[which] = _mm256_packs_epi16(_mm256_packs_epi32(words[0], words[1]), _mm256_packs_epi32(words[2], words[3]));
      bytes[which] = _mm256_permutevar8x32_epi32(bytes[which], in_order);
    }
    const __m256i pruned = _mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i*)(mask + i)), zero);
    const __m256i above = _mm256_andnot_si256(pruned, bytes[1]);
    _mm256_storeu_si256((__m256i*)(out + i), _mm256_and_si256(above, one));
    counts.survivors += 32 - __builtin_popcount(_mm256_movemask_epi8(pruned));
    counts.above += __builtin_popcount(_mm256_movemask_epi8(above));
    uint32_t inside = _mm256_movemask_epi8(_mm256_andnot_si256(bytes[1], _mm256_andnot_si256(pruned, bytes[0])));
    counts.inside += __builtin_popcount(inside);
    for (; inside; inside &= inside - 1) {
      const uint32_t place = static_cast<uint32_t>(i) + __builtin_ctz(inside);
      found.offsets[found.count] = offset + place;
      found.keys[found.count++] = weight[place] & 0x7fffffff;
    }
  }
  uint32_t each[8];
  _mm256_storeu_si256((__m256i*)each, largest);
  counts.largest = std::max<uint64_t>(counts.largest, *std::max_element(each, each + 8));
  scan(weight + i, mask + i, out + i, n - i, low, high, counts, found, offset + static_cast<uint32_t>(i));
}

template <>
void scan_best(const uint32_t* weight, const uint8_t* mask, uint8_t* out, int64_t n, uint32_t low, uint32_t high,
               Counts& counts, Found<uint32_t>& found, uint32_t offset) {
  static const auto best = has_avx512()                    ? scan_avx512
                           : __builtin_cpu_supports("avx2") ? scan_avx2
                                                            : static_cast<decltype(&scan_avx512)>(scan);
  best(weight, mask, out, n, low, high, counts, found, offset);
}

template <>
void count_best(const uint32_t* weight, const uint8_t* mask, int64_t n, const Bounds<uint32_t>& bounds,
                AtLeast& at_least, uint64_t& largest) {
  static const bool available = has_avx512();
  (available ? count_avx512 : static_cast<decltype(&count_avx512)>(count))(weight, mask, n, bounds, at_least, largest);
}
#pragma GCC diagnostic pop
#endif

template <typename Chunks, typename Function>
void for_each_chunk(Chunks& chunks, const Function& function) {
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) function(chunks[c], c);
  });
}

// Step 1. Pruned weights take part as 0 and keys as key + 1, so `keep` of all N places is the rank that is looked for. A
// sample of n puts up to N * DEVIATIONS / sqrt(n) keys into the bracket: n makes sampling and listing together cheapest,
// as far as they fit the list. Each seed draws other places.
template <typename Key>
std::pair<Key, Key> sample_bracket(const Chunks<Key>& chunks, int64_t total, int64_t keep, uint32_t seed) {
  const double cheapest = 0.7 * std::pow(total, 2.0 / 3), fits = std::pow(DEVIATIONS * total / (0.7 * CANDIDATES), 2);
  const auto wanted = static_cast<int64_t>(std::min<double>(std::max(cheapest, fits) + 1, SAMPLE_MOST));
  const int64_t stride = total / std::min(wanted, total), n = total / stride;
  std::vector<Key> sample(n);
  for_each_chunk(chunks, [&](const Chunk<Key>& chunk, int64_t) {
    for (int64_t j = chunk.place / stride; j < n && j * stride < chunk.place + chunk.n; ++j) {
      const uint64_t random = static_cast<uint32_t>(j + seed) * 2654435761u;  // so that rows do not alias
      const int64_t i = j * stride + static_cast<int64_t>(random * stride >> 32) - chunk.place;
      if (i < 0 || i >= chunk.n) continue;  // in a neighbouring chunk
      sample[j] = chunk.mask[i] ? static_cast<Key>((chunk.weight[i] & SIGNLESS<Key>) + 1) : Key{0};
    }
  });
  const double share = static_cast<double>(keep) / static_cast<double>(total);
  const auto spread = static_cast<int64_t>(DEVIATIONS * std::sqrt(n * share * (1 - share))) + 2;
  const auto rank = static_cast<int64_t>(n * share);
  const auto begin = sample.begin(), end = sample.end();
  auto middle = begin;
  Key low = 0, high = SIGNLESS<Key>;
  if (rank >= spread) {
    middle += rank - spread;
    std::nth_element(begin, middle, end, std::greater<>());
    high = std::max<Key>(*middle, 1);
  }
  if (rank + spread < n) {
    std::nth_element(middle, begin + rank + spread, end, std::greater<>());
    low = std::max<Key>(*(begin + rank + spread), 1) - 1;
  }
  return {low, high};
}

// Step 2. False, and stopped early, if more than `room` would be listed.
template <typename Key>
bool scan_all(Chunks<Key>& chunks, Key low, Key high, std::atomic<int64_t> room) {
  for_each_chunk(chunks, [&](Chunk<Key>& chunk, int64_t) {
    Found<Key> found;
    chunk.counts = {};
    for (int64_t start = 0; start < chunk.n && room >= 0; start += BLOCK) {
      found.count = 0;
      scan_best(chunk.weight + start, chunk.mask + start, chunk.out + start, std::min(BLOCK, chunk.n - start), low, high,
                chunk.counts, found, static_cast<uint32_t>(start));
      if (found.count == 0) continue;
      room -= found.count;
      auto& [offsets, keys] = chunk.candidates;
      offsets.insert(offsets.end(), found.offsets, found.offsets + found.count);
      keys.insert(keys.end(), found.keys, found.keys + found.count);
    }
  });
  if (room >= 0) return true;
  for (auto& chunk : chunks) chunk.candidates = {};
  return false;
}

// How many of its ties each chunk keeps, if the first `ties` are kept in the order of chunks.
std::vector<int64_t> share_out(int64_t ties, std::vector<int64_t> in_chunk) {
  for (int64_t& n : in_chunk) {
    n = std::min(n, ties);
    ties -= n;
  }
  return in_chunk;
}

// Step 3: keeps the `want` largest candidates, all of them in [low, high).
template <typename Key>
void keep_candidates(Chunks<Key>& chunks, Key low, Key high, int64_t want) {
  if (want == 0) return;
  constexpr int BINS = 1024;  // the threshold's bin first, so that few keys remain to be ordered
  int shift = 0;
  while (((high - 1 - low) >> shift) >= BINS) ++shift;
  std::vector<int64_t> histogram(BINS);
  std::mutex merge;
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 64, [&](int64_t begin, int64_t end) {
    std::array<int64_t, BINS> own{};
    for (int64_t c = begin; c < end; ++c) {
      for (const Key key : chunks[c].candidates.keys) ++own[(key - low) >> shift];
    }
    std::lock_guard<std::mutex> lock(merge);
    for (int b = 0; b < BINS; ++b) histogram[b] += own[b];
  });
  int bin = BINS - 1;
  int64_t rank = want;
  while (bin > 0 && histogram[bin] < rank) rank -= histogram[bin--];
  std::vector<Key> keys;
  for (const auto& chunk : chunks) {
    for (const Key key : chunk.candidates.keys) {
      if (((key - low) >> shift) == static_cast<Key>(bin)) keys.push_back(key);
    }
  }
  std::nth_element(keys.begin(), keys.begin() + rank - 1, keys.end(), std::greater<>());
  const Key threshold = keys[rank - 1];
  const auto larger = std::count_if(keys.begin(), keys.begin() + rank, [&](Key key) { return key > threshold; });
  std::vector<int64_t> ties(chunks.size());
  for_each_chunk(chunks, [&](const Chunk<Key>& chunk, int64_t c) {
    ties[c] = std::count(chunk.candidates.keys.begin(), chunk.candidates.keys.end(), threshold);
  });
  const auto kept = share_out(rank - larger, std::move(ties));
  for_each_chunk(chunks, [&](Chunk<Key>& chunk, int64_t c) {
    const auto& [offsets, chunk_keys] = chunk.candidates;
    int64_t left = kept[c];
    for (size_t k = 0; k < offsets.size(); ++k) {
      const bool tie_kept = chunk_keys[k] == threshold && left > 0;
      chunk.out[offsets[k]] = chunk_keys[k] > threshold || tie_kept;
      left -= tie_kept;
    }
  });
}

// NaN and infinity are refused before an impossible keep, as in the reference.
template <typename Key>
Counts checked_sum(const Chunks<Key>& chunks, int64_t keep, uint64_t infinity) {
  Counts sum;
  for (const auto& chunk : chunks) {
    check_finite(chunk.counts.largest < infinity, chunk.tensor);
    sum.survivors += chunk.counts.survivors;
    sum.above += chunk.counts.above;
    sum.inside += chunk.counts.inside;
  }
  check_keep(keep, sum.survivors);
  return sum;
}

// Narrows the bracket, all keys at first, to what is left of it about the ends and between the ends of another; at least
// to half. The chunks' counts are of the result then.
template <typename Key>
void narrow(Chunks<Key>& chunks, Bracket<Key>& bracket, Key low, Key high, int64_t keep, uint64_t infinity) {
  const Key half = bracket.low + (bracket.high - bracket.low) / 2, last = high - 1, after = low + 1;
  Bounds<Key> bounds{0, bracket.low, low, after, half, last, high, bracket.high};
  std::sort(bounds.begin(), bounds.end());
  std::vector<AtLeast> at_least(chunks.size());
  for_each_chunk(chunks, [&](Chunk<Key>& chunk, int64_t c) {
    chunk.counts = {};
    for (int64_t start = 0; start < chunk.n; start += BLOCK) {
      count_best(chunk.weight + start, chunk.mask + start, std::min(BLOCK, chunk.n - start), bounds, at_least[c],
                 chunk.counts.largest);
    }
    chunk.counts.survivors = at_least[c][0];
  });
  checked_sum(chunks, keep, infinity);
  AtLeast sum{};
  for (const auto& own : at_least) {
    for (size_t k = 0; k < sum.size(); ++k) sum[k] += own[k];
  }
  int k = 6;
  while (sum[k] < keep) --k;  // ends at 0, where all survivors are counted
  for (size_t c = 0; c < chunks.size(); ++c) {
    chunks[c].counts.above = at_least[c][k + 1];
    chunks[c].counts.inside = at_least[c][k] - at_least[c][k + 1];
  }
  bracket = {bounds[k], bounds[k + 1], sum[k + 1], sum[k] - sum[k + 1]};
}

// Writes the masks where the threshold and the chunks' ties are known.
template <typename Key>
void keep_threshold(Chunks<Key>& chunks, Key threshold, int64_t ties) {
  std::vector<int64_t> in_chunk;
  for (const auto& chunk : chunks) in_chunk.push_back(chunk.counts.inside);
  const auto kept = share_out(ties, in_chunk);
  for_each_chunk(chunks, [&](Chunk<Key>& chunk, int64_t c) {
    const Key high = threshold + (kept[c] < in_chunk[c]);
    Found<Key> none;
    for (int64_t start = 0; start < chunk.n; start += BLOCK) {
      scan_best(chunk.weight + start, chunk.mask + start, chunk.out + start, std::min(BLOCK, chunk.n - start), high, high,
                chunk.counts, none, 0u);
    }
    if (kept[c] == in_chunk[c]) return;
    int64_t left = kept[c];
    for (int64_t i = 0; i < chunk.n && left > 0; ++i) {  // the one chunk where they run out
      const bool hit = chunk.mask[i] && (chunk.weight[i] & SIGNLESS<Key>) == threshold;
      chunk.out[i] |= hit;
      left -= hit;
    }
  });
}

template <typename Key>
void select_masks(Chunks<Key>& chunks, int64_t total, int64_t keep, uint64_t infinity) {
  const int64_t room = std::clamp(total / CANDIDATES_EVERY, BLOCK, CANDIDATES);
  const int64_t rank = std::clamp<int64_t>(keep, 0, total);
  uint32_t seed = 0;
  auto [low, high] = sample_bracket(chunks, total, rank, seed);
  if (scan_all(chunks, low, high, room)) {
    const Counts sum = checked_sum(chunks, keep, infinity);
    const int64_t want = keep - sum.above;
    if (want >= 0 && want <= sum.inside) return keep_candidates(chunks, low, high, want);
    for (auto& chunk : chunks) chunk.candidates = {};
    std::tie(low, high) = sample_bracket(chunks, total, rank, ++seed);
  }
  Bracket<Key> bracket{0, SIGNLESS<Key>, 0, total};
  while (true) {
    narrow(chunks, bracket, low, high, keep, infinity);
    if (bracket.high - bracket.low <= 1) return keep_threshold(chunks, bracket.low, keep - bracket.above);
    if (bracket.inside <= room) break;
    std::tie(low, high) = sample_bracket(chunks, total, rank, ++seed);
  }
  TORCH_INTERNAL_ASSERT(scan_all(chunks, bracket.low, bracket.high, room));
  keep_candidates(chunks, bracket.low, bracket.high, keep - bracket.above);
}

std::vector<Tensor> global_magnitude_masks(TensorList weights, TensorList masks, int64_t keep) {
  check_masks(weights, masks);
  check_one_dtype(weights);
  std::vector<Tensor> dense_weights, dense_masks, outs;
  int64_t total = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    dense_weights.push_back(weights[i].contiguous());
    dense_masks.push_back(masks[i].contiguous());
    outs.push_back(at::empty(masks[i].sizes(), masks[i].options()));
    advise_huge_pages(outs[i].data_ptr(), outs[i].numel());
    total += weights[i].numel();
  }
  if (total == 0) {
    check_keep(keep, 0);
    return outs;
  }
  const auto run = [&](auto key, uint64_t infinity) {
    using Key = decltype(key);
    Chunks<Key> chunks;
    int64_t place = 0;
    for (size_t i = 0; i < outs.size(); ++i) {
      const auto* weight = static_cast<const Key*>(dense_weights[i].const_data_ptr());
      const auto* mask = static_cast<const uint8_t*>(dense_masks[i].const_data_ptr());
      auto* out = static_cast<uint8_t*>(outs[i].data_ptr());
      for (int64_t start = 0; start < outs[i].numel(); start += CHUNK) {
        const int64_t n = std::min(CHUNK, outs[i].numel() - start);
        chunks.push_back({weight + start, mask + start, out + start, n, place + start, i, {}, {}});
      }
      place += outs[i].numel();
    }
    select_masks(chunks, total, keep, infinity);
  };
  switch (weights[0].scalar_type()) {
    case at::kFloat: run(uint32_t{}, 0x7f800000u); break;
    case at::kBFloat16: run(uint16_t{}, 0x7f80u); break;
    case at::kHalf: run(uint16_t{}, 0x7c00u); break;
    default: run(uint64_t{}, 0x7ff0000000000000u);
  }
  return outs;
}

}  // namespace

TORCH_LIBRARY_IMPL(audio_lottery, CPU, m) { m.impl("global_magnitude_masks", &global_magnitude_masks); }

}  // namespace audio_lottery
