// global_magnitude_masks on CPU: the exact `keep`-th largest |w| in about one pass over the weights.
//
// The bits of a finite |w| sort like its value, so magnitudes are compared as unsigned integers ("keys").
//   1. A sample gives a bracket low <= guess <= high about the wanted key.
//   2. One fused pass writes mask = survivor and key > high, counts, and lists the few keys inside the bracket
//      ("candidates"). Keys equal to the guess are counted, not listed: ties are usually at the threshold.
//   3. The threshold is selected among the candidates, and their masks and those of the ties are set in order.
// If the bracket missed or holds too much, radix_select finds the threshold from histograms of the bits, and step 2
// runs again with low = guess = high. The result does not depend on the sample or on the number of threads.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

#include "../checks.h"
#include "vector.h"

namespace audio_lottery {
namespace {

constexpr int64_t CHUNK = 1 << 15;            // elements a task; ties are counted by chunk
constexpr int64_t BLOCK = 1 << 11;            // elements whose flags fit the first-level cache
constexpr int64_t SAMPLE = 1 << 17;           // keys drawn
constexpr int64_t CANDIDATES = 3 << 19;       // listed at most: 12 MB
constexpr double DEVIATIONS = 5;              // half the bracket, in standard deviations of the sampled rank

template <typename Key>
constexpr Key SIGNLESS = std::numeric_limits<Key>::max() >> 1;

template <typename Key>
struct Bracket {
  Key low, guess, high;
};

struct Counts {
  int64_t survivors = 0, above = 0, tied = 0;  // tied: equal to the guess
  uint64_t largest = 0;                        // of all keys, pruned or not: finds NaN and infinity
};

template <typename Key>
struct Candidate {
  uint32_t offset;  // in its chunk
  Key key;
};

template <typename Key>
struct Chunk {
  const Key* weight;
  const uint8_t* mask;
  uint8_t* out;
  int64_t n;
  size_t tensor;
  Counts counts;
  std::vector<Candidate<Key>> candidates;
};

// One block of the fused pass: writes out, and flags (1 = candidate).
template <typename Key>
AUDIO_LOTTERY_INLINE void scan_block(const Key* __restrict weight, const uint8_t* __restrict mask,
                                     uint8_t* __restrict out, uint8_t* __restrict flags, int64_t n,
                                     const Bracket<Key>& bracket, Counts& counts) {
  const Key low = bracket.low, guess = bracket.guess, high = bracket.high;
  Key largest = 0, survivors = 0, above = 0, tied = 0;  // a block's counts fit 16 bits
  for (int64_t i = 0; i < n; ++i) {
    const Key key = weight[i] & SIGNLESS<Key>, m = mask[i];
    const Key is_above = m & (key > high), is_tied = m & (key == guess);
    out[i] = static_cast<uint8_t>(is_above);
    flags[i] = static_cast<uint8_t>(m & (key >= low) & (key <= high) & (key != guess));
    largest = std::max(largest, key);
    survivors += m;
    above += is_above;
    tied += is_tied;
  }
  counts.largest = std::max<uint64_t>(counts.largest, largest);
  counts.survivors += survivors;
  counts.above += above;
  counts.tied += tied;
}

using Scan16 = Bracket<uint16_t>;
using Scan32 = Bracket<uint32_t>;
using Scan64 = Bracket<uint64_t>;
AUDIO_LOTTERY_CLONES void scan(const uint16_t* w, const uint8_t* m, uint8_t* o, uint8_t* f, int64_t n, const Scan16& b,
                               Counts& c) {
  scan_block(w, m, o, f, n, b, c);
}
AUDIO_LOTTERY_CLONES void scan(const uint32_t* w, const uint8_t* m, uint8_t* o, uint8_t* f, int64_t n, const Scan32& b,
                               Counts& c) {
  scan_block(w, m, o, f, n, b, c);
}
AUDIO_LOTTERY_CLONES void scan(const uint64_t* w, const uint8_t* m, uint8_t* o, uint8_t* f, int64_t n, const Scan64& b,
                               Counts& c) {
  scan_block(w, m, o, f, n, b, c);
}

// The fused pass over one chunk. `room` is what may still be listed by all chunks together.
template <typename Key>
void scan_chunk(Chunk<Key>& chunk, const Bracket<Key>& bracket, std::atomic<int64_t>& room) {
  alignas(64) uint8_t flags[BLOCK];
  chunk.counts = {};
  chunk.candidates.clear();
  for (int64_t start = 0; start < chunk.n; start += BLOCK) {
    const int64_t n = std::min(BLOCK, chunk.n - start);
    if (n < BLOCK) std::memset(flags, 0, BLOCK);
    scan(chunk.weight + start, chunk.mask + start, chunk.out + start, flags, n, bracket, chunk.counts);
    if (bracket.low == bracket.high) continue;
    for (int64_t word = 0; word < n; word += 8) {  // eight flags at a time: nearly all are 0
      uint64_t eight;
      std::memcpy(&eight, flags + word, 8);
      if (eight == 0) continue;
      for (int64_t i = start + word; i < start + std::min(word + 8, n); ++i) {
        if (!flags[i - start]) continue;
        chunk.candidates.push_back({static_cast<uint32_t>(i), static_cast<Key>(chunk.weight[i] & SIGNLESS<Key>)});
      }
    }
  }
  room -= static_cast<int64_t>(chunk.candidates.size());
  if (room < 0) chunk.candidates.clear();
}

template <typename Key>
void scan_all(std::vector<Chunk<Key>>& chunks, const Bracket<Key>& bracket, std::atomic<int64_t>& room) {
  room = CANDIDATES;
  at::parallel_for(0, chunks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) scan_chunk(chunks[c], bracket, room);
  });
}

// Step 1. Pruned weights take part as -1, so `keep` of all N places is the rank that is looked for.
template <typename Key>
Bracket<Key> sample_bracket(const std::vector<Chunk<Key>>& chunks, int64_t total, int64_t keep) {
  std::vector<int64_t> sample;  // keys; float64's fit too, as the sign is gone
  const int64_t stride = std::max<int64_t>(1, total / SAMPLE);
  sample.reserve(total / stride + 1);
  int64_t base = 0;  // of the chunk, among all places
  uint32_t random = 1;
  int64_t place = 0;
  for (const auto& chunk : chunks) {
    for (; place < base + chunk.n; place += stride) {
      random = random * 1664525u + 1013904223u;  // one place a stride, not always the same, so that rows do not alias
      const int64_t i = std::min(place + (random >> 8) % stride, base + chunk.n - 1) - base;
      sample.push_back(chunk.mask[i] ? static_cast<int64_t>(chunk.weight[i] & SIGNLESS<Key>) : -1);
    }
    base += chunk.n;
  }
  const double n = static_cast<double>(sample.size()), share = static_cast<double>(keep) / total;
  const int64_t spread = static_cast<int64_t>(DEVIATIONS * std::sqrt(n * share * (1 - share))) + 2;
  const int64_t rank = static_cast<int64_t>(n * share), last = static_cast<int64_t>(sample.size()) - 1;
  const auto key_at = [&](int64_t r, int64_t outside) {  // r-th largest of the sample, 0 first
    if (r < 0 || r > last) return outside;
    std::nth_element(sample.begin(), sample.begin() + r, sample.end(), std::greater<>());
    return std::max<int64_t>(sample[r], 0);
  };
  const int64_t most = static_cast<int64_t>(SIGNLESS<Key>);
  const Key guess = static_cast<Key>(key_at(std::min(rank, last), 0));
  return {static_cast<Key>(key_at(rank + spread, 0)), guess, static_cast<Key>(key_at(rank - spread, most))};
}

// The keep-th largest key from histograms of the bits, most significant digit first. Four histograms a task in turn, so
// that runs of equal keys do not wait for each other's increment.
template <typename Key>
Key radix_select(const std::vector<Chunk<Key>>& chunks, int64_t keep) {
  constexpr int BITS = 8 * sizeof(Key) - 1, DIGIT = 16;
  Key prefix = 0;
  for (int shift = ((BITS - 1) / DIGIT) * DIGIT;; shift -= DIGIT) {
    const int64_t bins = int64_t{1} << std::min(DIGIT, BITS - shift);
    const Key high_bits = shift + DIGIT >= BITS ? 0 : static_cast<Key>(~Key{0} << (shift + DIGIT)) & SIGNLESS<Key>;
    std::vector<int64_t> histogram(bins);
    std::mutex merge;
    const int64_t grain = std::max<int64_t>(1, (chunks.size() + at::get_num_threads() - 1) / at::get_num_threads());
    at::parallel_for(0, chunks.size(), grain, [&](int64_t begin, int64_t end) {
      std::vector<uint32_t> local(4 * bins);
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t i = 0; i < chunks[c].n; ++i) {
          const Key key = chunks[c].weight[i] & SIGNLESS<Key>;
          const bool counts = chunks[c].mask[i] & ((key & high_bits) == prefix);
          local[(i & 3) * bins + ((key >> shift) & (bins - 1))] += counts;
        }
      }
      std::lock_guard<std::mutex> lock(merge);
      for (int64_t b = 0; b < 4 * bins; ++b) histogram[b & (bins - 1)] += local[b];
    });
    int64_t bin = bins - 1;
    while (histogram[bin] < keep) keep -= histogram[bin--];
    prefix |= static_cast<Key>(bin) << shift;
    if (shift == 0) return prefix;
  }
}

// Step 3. False if the bracket does not hold the threshold or holds too much.
template <typename Key>
bool settle(std::vector<Chunk<Key>>& chunks, const Key guess, int64_t keep, int64_t room) {
  int64_t want = keep, tied = 0;  // want: how many of the candidates and of the keys equal to the guess are kept
  for (const auto& chunk : chunks) want -= chunk.counts.above, tied += chunk.counts.tied;
  if (room < 0 || want < 0 || want > CANDIDATES - room + tied) return false;
  if (want == 0) return true;
  std::vector<Key> keys;
  keys.reserve(CANDIDATES - room);
  for (const auto& chunk : chunks) {
    for (const auto& candidate : chunk.candidates) keys.push_back(candidate.key);
  }
  const auto larger_than = [&keys](Key bound) {
    return std::count_if(keys.begin(), keys.end(), [bound](Key key) { return key > bound; });
  };
  const auto largest = [&keys](int64_t rank) {  // 1 is the largest
    std::nth_element(keys.begin(), keys.begin() + rank - 1, keys.end(), std::greater<>());
    return keys[rank - 1];
  };
  const int64_t over = larger_than(guess);
  const Key threshold = want <= over ? largest(want) : want <= over + tied ? guess : largest(want - tied);
  // At the threshold, the earlier chunk and then the lower offset is kept.
  int64_t ties_left = want - larger_than(threshold) - (guess > threshold ? tied : 0);
  std::vector<int64_t> guesses_kept(chunks.size());
  for (size_t c = 0; c < chunks.size(); ++c) {
    for (const auto& [offset, key] : chunks[c].candidates) {
      if (key > threshold || (key == threshold && ties_left-- > 0)) chunks[c].out[offset] = 1;
    }
    if (guess > threshold) guesses_kept[c] = chunks[c].counts.tied;
    if (guess == threshold) {
      guesses_kept[c] = std::min(ties_left, chunks[c].counts.tied);
      ties_left -= guesses_kept[c];
    }
  }
  at::parallel_for(0, chunks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t i = 0, left = guesses_kept[c]; left > 0; ++i) {
        const bool hit = chunks[c].mask[i] && (chunks[c].weight[i] & SIGNLESS<Key>) == guess;
        chunks[c].out[i] |= hit;
        left -= hit;
      }
    }
  });
  return true;
}

template <typename Key>
void select_masks(const std::vector<Tensor>& weights, const std::vector<Tensor>& masks, const std::vector<Tensor>& outs,
                  int64_t keep, uint64_t infinity) {
  std::vector<Chunk<Key>> chunks;
  int64_t total = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    auto* weight = static_cast<const Key*>(weights[i].const_data_ptr());
    auto* mask = static_cast<const uint8_t*>(masks[i].const_data_ptr());
    auto* out = static_cast<uint8_t*>(outs[i].data_ptr());
    for (int64_t start = 0; start < weights[i].numel(); start += CHUNK) {
      const int64_t n = std::min(CHUNK, weights[i].numel() - start);
      chunks.push_back({weight + start, mask + start, out + start, n, i, {}, {}});
    }
    total += weights[i].numel();
  }
  std::atomic<int64_t> room;
  Bracket<Key> bracket = total ? sample_bracket(chunks, total, std::clamp<int64_t>(keep, 0, total)) : Bracket<Key>{};
  scan_all(chunks, bracket, room);
  int64_t survivors = 0;
  for (const auto& chunk : chunks) {
    check_finite(chunk.counts.largest < infinity, chunk.tensor);
    survivors += chunk.counts.survivors;
  }
  check_keep(keep, survivors);
  if (total == 0 || settle(chunks, bracket.guess, keep, room)) return;
  bracket.low = bracket.guess = bracket.high = radix_select(chunks, keep);
  scan_all(chunks, bracket, room);
  TORCH_INTERNAL_ASSERT(settle(chunks, bracket.guess, keep, room));
}

std::vector<Tensor> global_magnitude_masks(TensorList weights, TensorList masks, int64_t keep) {
  check_masks(weights, masks);
  check_one_dtype(weights);
  if (weights.empty()) {
    check_keep(keep, 0);
    return {};
  }
  std::vector<Tensor> dense_weights, dense_masks, outs;
  for (size_t i = 0; i < weights.size(); ++i) {
    dense_weights.push_back(weights[i].contiguous());
    dense_masks.push_back(masks[i].contiguous());
    outs.push_back(at::empty(masks[i].sizes(), masks[i].options()));
  }
  switch (weights[0].scalar_type()) {
    case at::kFloat: select_masks<uint32_t>(dense_weights, dense_masks, outs, keep, 0x7f800000u); break;
    case at::kBFloat16: select_masks<uint16_t>(dense_weights, dense_masks, outs, keep, 0x7f80u); break;
    case at::kHalf: select_masks<uint16_t>(dense_weights, dense_masks, outs, keep, 0x7c00u); break;
    default: select_masks<uint64_t>(dense_weights, dense_masks, outs, keep, 0x7ff0000000000000u);
  }
  return outs;
}

}  // namespace

TORCH_LIBRARY_IMPL(audio_lottery, CPU, m) { m.impl("global_magnitude_masks", &global_magnitude_masks); }

}  // namespace audio_lottery
