// global_magnitude_masks on CPU: the exact `keep`-th largest |w| in about one pass over the weights.
//
// The bits of a finite |w| sort like its value, so magnitudes are compared as unsigned integers ("keys").
//   1. A sample gives a bracket [low, high] about the wanted key.
//   2. One pass writes mask = survivor and key > high, counts, and lists the few survivors inside the bracket.
//   3. The threshold is selected among those candidates, and their masks are set.
// Heavy ties overflow the list. They are then almost surely at a key that the sample saw, so one more pass counts those
// keys; if none of them is the threshold, or if the sample misled, histograms of the bits find it. Step 2 runs again
// with low = high = threshold. The result depends neither on the sample nor on the number of threads.

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
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "huge_pages.h"
#include "vector.h"

namespace audio_lottery {
namespace {

constexpr int64_t CHUNK = 1 << 15;        // elements a task
constexpr int64_t BLOCK = 1 << 11;        // elements whose flags stay in the first-level cache
constexpr int64_t SAMPLE = 1 << 17;       // keys drawn at most, and one in SAMPLE_EVERY
constexpr int64_t SAMPLE_EVERY = 128;
constexpr int64_t CANDIDATES = 3 << 19;   // listed at most (12 MB), and at most one in CANDIDATES_EVERY
constexpr int64_t CANDIDATES_EVERY = 8;
constexpr double DEVIATIONS = 4;          // half the bracket, in standard deviations of the sampled rank

template <typename Key>
constexpr Key SIGNLESS = std::numeric_limits<Key>::max() >> 1;

template <typename Key>
struct Bracket {
  Key low, guess, high;
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

// One block of the pass: writes out (survivor and key > high), counts, and lists survivors with low <= key <= high in
// `found` (places from `offset` on) unless low = high.
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
    flags[i] = static_cast<uint8_t>((key > signed_high) + (key >= signed_low));  // 0 below, 1 inside, 2 above
    largest = key > largest ? key : largest;
  }
  counts.largest = std::max<uint64_t>(counts.largest, largest);
  for (int64_t start = 0; start < n; start += 128) {  // counts of 128 fit a byte
    const int64_t end = std::min(n, start + 128);
    uint8_t survivors = 0, above = 0, inside = 0;
    for (int64_t i = start; i < end; ++i) {
      const uint8_t m = mask[i], is_above = m & (flags[i] >> 1), is_inside = m & flags[i];
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

// How many survivors are larger than each of three keys, how many equal it, and how many there are: [larger, equal] * 3
// and survivors.
template <typename Key>
AUDIO_LOTTERY_INLINE void count_block(const Key* __restrict weight, const uint8_t* __restrict mask, int64_t n,
                                      const std::array<Key, 3>& keys, std::array<int64_t, 7>& counts) {
  for (int k = 0; k < 3; ++k) {
    const Key bound = keys[k];
    Key larger = 0, equal = 0;  // a block's counts fit 16 bits
    for (int64_t i = 0; i < n; ++i) {
      const Key key = weight[i] & SIGNLESS<Key>;
      larger += mask[i] & (key > bound);
      equal += mask[i] & (key == bound);
    }
    counts[2 * k] += larger;
    counts[2 * k + 1] += equal;
  }
  Key survivors = 0;
  for (int64_t i = 0; i < n; ++i) survivors += mask[i];
  counts[6] += survivors;
}

// Keeps every survivor that equals the threshold.
template <typename Key>
AUDIO_LOTTERY_INLINE void keep_equal(const Key* __restrict weight, const uint8_t* __restrict mask,
                                     uint8_t* __restrict out, int64_t n, Key threshold) {
  for (int64_t i = 0; i < n; ++i) out[i] |= static_cast<uint8_t>((weight[i] & SIGNLESS<Key>) == threshold) & mask[i];
}

#define AUDIO_LOTTERY_VERSIONS(Key)                                                                                    \
  AUDIO_LOTTERY_CLONES void scan(const Key* weight, const uint8_t* mask, uint8_t* out, int64_t n, Key low, Key high,   \
                                 Counts& counts, Found<Key>& found, uint32_t offset) {                                 \
    scan_block(weight, mask, out, n, low, high, counts, found, offset);                                                \
  }                                                                                                                    \
  AUDIO_LOTTERY_CLONES void count(const Key* weight, const uint8_t* mask, int64_t n, const std::array<Key, 3>& keys,   \
                                  std::array<int64_t, 7>& counts) {                                                    \
    count_block(weight, mask, n, keys, counts);                                                                        \
  }                                                                                                                    \
  AUDIO_LOTTERY_CLONES void keep(const Key* weight, const uint8_t* mask, uint8_t* out, int64_t n, Key threshold) {     \
    keep_equal(weight, mask, out, n, threshold);                                                                       \
  }
AUDIO_LOTTERY_VERSIONS(uint16_t)
AUDIO_LOTTERY_VERSIONS(uint32_t)
AUDIO_LOTTERY_VERSIONS(uint64_t)

// What the pass calls.
template <typename Key>
void scan_best(const Key* weight, const uint8_t* mask, uint8_t* out, int64_t n, Key low, Key high, Counts& counts,
               Found<Key>& found, uint32_t offset) {
  scan(weight, mask, out, n, low, high, counts, found, offset);
}

#ifdef AUDIO_LOTTERY_AVX512
// scan for float32 with comparisons into mask registers and compressing stores: half the time of what compilers make.
AUDIO_LOTTERY_AVX512 void scan_avx512(const uint32_t* weight, const uint8_t* mask, uint8_t* out, int64_t n,
                                      uint32_t low, uint32_t high, Counts& counts, Found<uint32_t>& found,
                                      uint32_t offset) {
  const __m512i lows = _mm512_set1_epi32(low), highs = _mm512_set1_epi32(high), signless = _mm512_set1_epi32(0x7fffffff);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m128i ones = _mm_set1_epi8(1);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 valid = n - i >= 16 ? 0xffff : (1u << (n - i)) - 1;
    const __m512i keys = _mm512_and_si512(_mm512_maskz_loadu_epi32(valid, weight + i), signless);
    const __m128i bytes = _mm_maskz_loadu_epi8(valid, mask + i);
    const __mmask16 survivors = _mm_test_epi8_mask(bytes, bytes);
    const __mmask16 above = _mm512_mask_cmpgt_epu32_mask(survivors, keys, highs);
    const __mmask16 inside = _mm512_mask_cmpge_epu32_mask(survivors, keys, lows) & ~above;
    largest = _mm512_max_epu32(largest, keys);
    _mm_mask_storeu_epi8(out + i, valid, _mm_maskz_mov_epi8(above, ones));
    counts.survivors += __builtin_popcount(survivors);
    counts.above += __builtin_popcount(above);
    counts.inside += __builtin_popcount(inside);
    if (inside == 0 || low == high) continue;
    const __m512i places = _mm512_add_epi32(lanes, _mm512_set1_epi32(offset + static_cast<uint32_t>(i)));
    _mm512_storeu_si512(found.offsets + found.count, _mm512_maskz_compress_epi32(inside, places));
    _mm512_storeu_si512(found.keys + found.count, _mm512_maskz_compress_epi32(inside, keys));
    found.count += __builtin_popcount(inside);
  }
  counts.largest = std::max<uint64_t>(counts.largest, _mm512_reduce_max_epu32(largest));
}

template <>
void scan_best(const uint32_t* weight, const uint8_t* mask, uint8_t* out, int64_t n, uint32_t low, uint32_t high,
               Counts& counts, Found<uint32_t>& found, uint32_t offset) {
  static const bool available = has_avx512();
  (available ? scan_avx512 : static_cast<decltype(&scan_avx512)>(scan))(weight, mask, out, n, low, high, counts, found,
                                                                        offset);
}
#endif

template <typename Key, typename Function>
void for_each_chunk(Chunks<Key>& chunks, const Function& function) {
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) function(chunks[c], c);
  });
}

// Step 1. Pruned weights take part as 0 and keys as key + 1, so `keep` of all N places is the rank that is looked for.
template <typename Key>
Bracket<Key> sample_bracket(Chunks<Key>& chunks, int64_t total, int64_t keep) {
  const int64_t stride = std::max(SAMPLE_EVERY, total / SAMPLE);
  std::vector<Key> sample((total + stride - 1) / stride);
  for_each_chunk(chunks, [&](const Chunk<Key>& chunk, int64_t) {
    for (int64_t j = (chunk.place + stride - 1) / stride; j * stride < chunk.place + chunk.n; ++j) {
      const int64_t jitter = (static_cast<uint32_t>(j) * 2654435761u >> 8) % stride;  // so that rows do not alias
      const int64_t i = std::min(j * stride + jitter - chunk.place, chunk.n - 1);
      sample[j] = chunk.mask[i] ? static_cast<Key>((chunk.weight[i] & SIGNLESS<Key>) + 1) : Key{0};
    }
  });
  const auto n = static_cast<int64_t>(sample.size());
  const double share = static_cast<double>(keep) / static_cast<double>(total);
  const auto spread = static_cast<int64_t>(DEVIATIONS * std::sqrt(n * share * (1 - share))) + 2;
  const int64_t rank = std::min(static_cast<int64_t>(n * share), n - 1);
  const auto begin = sample.begin(), middle = begin + rank;
  std::nth_element(begin, middle, sample.end(), std::greater<>());
  Bracket<Key> bracket{0, *middle, SIGNLESS<Key>};
  if (rank >= spread) {
    std::nth_element(begin, middle - spread, middle, std::greater<>());
    bracket.high = std::max<Key>(*(middle - spread), 1) - 1;
  }
  if (rank + spread < n) {
    std::nth_element(middle + 1, middle + spread, sample.end(), std::greater<>());
    bracket.low = std::max<Key>(*(middle + spread), 1) - 1;
  }
  bracket.guess = std::max<Key>(bracket.guess, 1) - 1;
  return bracket;
}

// Step 2. Stops early, with a negative `room`, once too many are listed.
template <typename Key>
void scan_all(Chunks<Key>& chunks, Key low, Key high, int64_t total, std::atomic<int64_t>& room) {
  room = std::clamp(total / CANDIDATES_EVERY, BLOCK, CANDIDATES);
  for_each_chunk(chunks, [&](Chunk<Key>& chunk, int64_t) {
    Found<Key> found;
    chunk.counts = {};
    chunk.candidates = {};
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
}

// Keeps the first `ties` survivors that equal the threshold, in the order of chunks; in_chunk: how many each chunk has.
template <typename Key>
void keep_ties(Chunks<Key>& chunks, Key threshold, int64_t ties, const std::vector<int64_t>& in_chunk) {
  std::vector<int64_t> before(chunks.size());  // ties in earlier chunks
  for (size_t c = 1; c < chunks.size(); ++c) before[c] = before[c - 1] + in_chunk[c - 1];
  for_each_chunk(chunks, [&](Chunk<Key>& chunk, int64_t c) {
    int64_t left = std::min(ties - before[c], in_chunk[c]);
    if (left == in_chunk[c] && left > 0) {
      keep(chunk.weight, chunk.mask, chunk.out, chunk.n, threshold);
      return;
    }
    for (int64_t i = 0; left > 0; ++i) {  // the one chunk where they run out
      const bool hit = chunk.mask[i] && (chunk.weight[i] & SIGNLESS<Key>) == threshold;
      chunk.out[i] |= hit;
      left -= hit;
    }
  });
}

// Step 3: keeps the `want` largest candidates, all of them in [low, high].
template <typename Key>
void keep_candidates(Chunks<Key>& chunks, Key low, Key high, int64_t want) {
  if (want == 0) return;
  constexpr int BINS = 1024;  // the threshold's bin first, so that few keys remain to be ordered
  int shift = 0;
  while (((high - low) >> shift) >= BINS) ++shift;
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
  while (histogram[bin] < rank) rank -= histogram[bin--];
  std::vector<Key> keys;
  for (const auto& chunk : chunks) {
    for (const Key key : chunk.candidates.keys) {
      if (((key - low) >> shift) == static_cast<Key>(bin)) keys.push_back(key);
    }
  }
  std::nth_element(keys.begin(), keys.begin() + rank - 1, keys.end(), std::greater<>());
  const Key threshold = keys[rank - 1];
  const int64_t tied_and_kept = rank - std::count_if(keys.begin(), keys.begin() + rank, [&](Key k) { return k > threshold; });
  std::vector<int64_t> ties(chunks.size());
  for_each_chunk(chunks, [&](Chunk<Key>& chunk, int64_t c) {
    const auto& [offsets, chunk_keys] = chunk.candidates;
    for (size_t k = 0; k < offsets.size(); ++k) {
      chunk.out[offsets[k]] = chunk_keys[k] > threshold;
      ties[c] += chunk_keys[k] == threshold;
    }
  });
  keep_ties(chunks, threshold, tied_and_kept, ties);
}

// The threshold if it is one of the bracket's keys. Refuses an impossible keep.
template <typename Key>
std::optional<Key> find_among(Chunks<Key>& chunks, const Bracket<Key>& bracket, int64_t keep) {
  const std::array<Key, 3> keys{bracket.low, bracket.guess, bracket.high};
  std::array<int64_t, 7> counts{};
  std::mutex merge;
  for_each_chunk(chunks, [&](Chunk<Key>& chunk, int64_t) {
    std::array<int64_t, 7> own{};
    for (int64_t start = 0; start < chunk.n; start += BLOCK) {
      count(chunk.weight + start, chunk.mask + start, std::min(BLOCK, chunk.n - start), keys, own);
    }
    std::lock_guard<std::mutex> lock(merge);
    for (int k = 0; k < 7; ++k) counts[k] += own[k];
  });
  check_keep(keep, counts[6]);
  for (int k = 0; k < 3; ++k) {
    if (counts[2 * k] < keep && keep <= counts[2 * k] + counts[2 * k + 1]) return keys[k];
  }
  return std::nullopt;
}

// The keep-th largest key from histograms of the bits, most significant digit first; keep >= 1. Four histograms a task
// in turn, so that runs of equal keys do not wait for each other's increment.
template <typename Key>
Key radix_select(const Chunks<Key>& chunks, int64_t keep) {
  constexpr int BITS = 8 * sizeof(Key) - 1, DIGIT = 16;
  constexpr int64_t APART = 16;  // counts between two histograms, so that their bins do not share cache sets
  Key prefix = 0;
  for (int shift = ((BITS - 1) / DIGIT) * DIGIT;; shift -= DIGIT) {
    const int64_t bins = int64_t{1} << std::min(DIGIT, BITS - shift);
    const Key digits_above = shift + DIGIT >= BITS ? 0 : static_cast<Key>(SIGNLESS<Key> >> (shift + DIGIT) << (shift + DIGIT));
    std::vector<int64_t> histogram(bins);
    std::mutex merge;
    const auto tasks = static_cast<int64_t>(chunks.size());
    const int64_t grain = std::max<int64_t>(1, (tasks + at::get_num_threads() - 1) / at::get_num_threads());
    at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      std::vector<uint32_t> local(4 * (bins + APART));
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t i = 0; i < chunks[c].n; ++i) {
          const Key key = chunks[c].weight[i] & SIGNLESS<Key>;
          local[(i & 3) * (bins + APART) + ((key >> shift) & (bins - 1))] +=
              chunks[c].mask[i] & ((key & digits_above) == prefix);
        }
      }
      std::lock_guard<std::mutex> lock(merge);
      for (int k = 0; k < 4; ++k) {
        for (int64_t b = 0; b < bins; ++b) histogram[b] += local[k * (bins + APART) + b];
      }
    });
    int64_t bin = bins - 1;
    while (histogram[bin] < keep) keep -= histogram[bin--];
    prefix |= static_cast<Key>(bin) << shift;
    if (shift == 0) return prefix;
  }
}

template <typename Key>
Counts sum_counts(const Chunks<Key>& chunks, uint64_t infinity) {
  Counts sum;
  for (const auto& chunk : chunks) {
    check_finite(chunk.counts.largest < infinity, chunk.tensor);
    sum.survivors += chunk.counts.survivors;
    sum.above += chunk.counts.above;
    sum.inside += chunk.counts.inside;
  }
  return sum;
}

// False if the threshold does not lie in what was scanned.
template <typename Key>
bool settle(Chunks<Key>& chunks, Key low, Key high, int64_t want, int64_t inside) {
  if (want < 0 || want > inside) return false;
  if (low < high) {
    keep_candidates(chunks, low, high, want);
  } else {
    std::vector<int64_t> in_chunk;
    for (const auto& chunk : chunks) in_chunk.push_back(chunk.counts.inside);
    keep_ties(chunks, low, want, in_chunk);
  }
  return true;
}

template <typename Key>
void select_masks(Chunks<Key>& chunks, int64_t total, int64_t keep, uint64_t infinity) {
  std::atomic<int64_t> room;
  const auto bracket = sample_bracket(chunks, total, std::clamp<int64_t>(keep, 0, total));
  scan_all(chunks, bracket.low, bracket.high, total, room);
  if (room >= 0) {
    const Counts sum = sum_counts(chunks, infinity);
    check_keep(keep, sum.survivors);
    if (settle(chunks, bracket.low, bracket.high, keep - sum.above, sum.inside)) return;
  }
  const auto found = find_among(chunks, bracket, keep);
  const Key threshold = found ? *found : radix_select(chunks, keep);
  scan_all(chunks, threshold, threshold, total, room);
  const Counts sum = sum_counts(chunks, infinity);
  TORCH_INTERNAL_ASSERT(settle(chunks, threshold, threshold, keep - sum.above, sum.inside));
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
