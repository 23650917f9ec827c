// global_magnitude_masks on CUDA: radix select over the bits of |w|, then one pass that writes the masks.
//
// For each digit of the key, most significant first: a histogram over all tensors of the survivors that share the digits
// found so far, and one block that picks the digit. Then ties at the threshold are counted by chunk, scanned in order,
// and the masks are written. The host waits once, at the end, for the checks. Masks equal the CPU's bit for bit.

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../checks.h"

namespace audio_lottery {
namespace {

constexpr int THREADS = 256;
constexpr int64_t CHUNK = 1 << 14;  // elements a block
constexpr int DIGIT = 11;           // bits; a histogram of 2,048 counts fits shared memory
constexpr int BINS = 1 << DIGIT;

using Count = unsigned long long;

// One block's share of one tensor.
struct Chunk {
  const void* weight;
  const uint8_t* mask;
  uint8_t* out;
  int64_t n;
  int64_t tensor;
};

// What the kernels hand to each other; starts as zeros but for wanted and first_bad.
struct State {
  Count prefix;     // digits found so far; at the end the threshold
  Count wanted;     // the rank that is looked for among the keys with that prefix; at the end: ties kept
  Count survivors;
  Count first_bad;  // the earliest tensor with a NaN or infinity
};

template <typename Key>
__device__ Key key_of(const Chunk& chunk, int64_t i) {
  return static_cast<const Key*>(chunk.weight)[i] & (static_cast<Key>(~Key{0}) >> 1);
}

template <typename Key>
__device__ Key digits_above(int shift) {
  return shift + DIGIT >= static_cast<int>(8 * sizeof(Key)) ? Key{0} : static_cast<Key>(~Key{0} << (shift + DIGIT));
}

template <typename Key>
__global__ void __launch_bounds__(THREADS)
    histogram_kernel(const Chunk* chunks, State* state, Count* histogram, int shift, bool first, Key infinity) {
  __shared__ unsigned counts[BINS];
  __shared__ unsigned survivors, bad;
  for (int b = threadIdx.x; b < BINS; b += THREADS) counts[b] = 0;
  if (threadIdx.x == 0) survivors = bad = 0;
  __syncthreads();
  const Chunk chunk = chunks[blockIdx.x];
  const Key prefix = static_cast<Key>(state->prefix), above = digits_above<Key>(shift);
  unsigned mine = 0;
  bool mine_bad = false;
  for (int64_t i = threadIdx.x; i < chunk.n; i += THREADS) {
    const Key key = key_of<Key>(chunk, i);
    mine_bad |= key >= infinity;
    if (!chunk.mask[i]) continue;
    ++mine;
    if ((key & above) == prefix) atomicAdd(&counts[(key >> shift) & (BINS - 1)], 1u);
  }
  if (first) {
    atomicAdd(&survivors, mine);
    if (mine_bad) bad = 1;
  }
  __syncthreads();
  for (int b = threadIdx.x; b < BINS; b += THREADS) {
    if (counts[b]) atomicAdd(&histogram[b], static_cast<Count>(counts[b]));
  }
  if (first && threadIdx.x == 0) {
    atomicAdd(&state->survivors, static_cast<Count>(survivors));
    if (bad) atomicMin(&state->first_bad, static_cast<Count>(chunk.tensor));
  }
}

// One block sums the histogram from the largest digit down and takes the digit where the sum reaches the rank.
__global__ void __launch_bounds__(BINS / 2) pick_kernel(State* state, Count* histogram, int shift) {
  __shared__ Count at_least[BINS];  // keys whose digit is b or larger
  const int low = threadIdx.x, high = threadIdx.x + BINS / 2;
  at_least[low] = histogram[low];
  at_least[high] = histogram[high];
  histogram[low] = histogram[high] = 0;  // for the next digit
  const Count wanted = state->wanted;
  __syncthreads();
  for (int step = 1; step < BINS; step *= 2) {
    const Count more_low = low + step < BINS ? at_least[low + step] : 0;
    const Count more_high = high + step < BINS ? at_least[high + step] : 0;
    __syncthreads();
    at_least[low] += more_low;
    at_least[high] += more_high;
    __syncthreads();
  }
  for (const int bin : {low, high}) {
    const Count larger = bin + 1 < BINS ? at_least[bin + 1] : 0;
    if (at_least[bin] >= wanted && (bin == BINS - 1 || larger < wanted)) {  // one bin, or none if keep is impossible
      state->wanted = wanted - larger;
      state->prefix |= static_cast<Count>(bin) << shift;
    }
  }
}

template <typename Key>
__global__ void __launch_bounds__(THREADS) count_ties_kernel(const Chunk* chunks, const State* state, int64_t* ties) {
  __shared__ unsigned total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  const Chunk chunk = chunks[blockIdx.x];
  const Key threshold = static_cast<Key>(state->prefix);
  unsigned mine = 0;
  for (int64_t i = threadIdx.x; i < chunk.n; i += THREADS) mine += chunk.mask[i] && key_of<Key>(chunk, i) == threshold;
  atomicAdd(&total, mine);
  __syncthreads();
  if (threadIdx.x == 0) ties[blockIdx.x] = total;
}

// ties_through: inclusive sums of the chunks' ties, so that each knows how many of its own are kept.
template <typename Key>
__global__ void __launch_bounds__(THREADS)
    write_kernel(const Chunk* chunks, const State* state, const int64_t* ties_through) {
  const Chunk chunk = chunks[blockIdx.x];
  const Key threshold = static_cast<Key>(state->prefix);
  const int64_t before = blockIdx.x ? ties_through[blockIdx.x - 1] : 0;
  const int64_t own = ties_through[blockIdx.x] - before, wanted = static_cast<int64_t>(state->wanted);
  const int64_t left = min(max(wanted - before, int64_t{0}), own);
  const bool some = left > 0 && left < own;  // the one chunk where the ties run out
  for (int64_t i = threadIdx.x; i < chunk.n; i += THREADS) {
    const Key key = key_of<Key>(chunk, i);
    chunk.out[i] = chunk.mask[i] && (key > threshold || (key == threshold && left == own && own > 0));
  }
  if (!some) return;
  __shared__ int warp_ties[THREADS / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t kept = 0;
  for (int64_t start = 0; start < chunk.n && kept < left; start += THREADS) {
    const int64_t i = start + threadIdx.x;
    const bool tie = i < chunk.n && chunk.mask[i] && key_of<Key>(chunk, i) == threshold;
    const unsigned ballot = __ballot_sync(~0u, tie);
    if (lane == 0) warp_ties[warp] = __popc(ballot);
    __syncthreads();
    int earlier = __popc(ballot & ((1u << lane) - 1)), all = 0;
    for (int w = 0; w < THREADS / 32; ++w) {
      if (w < warp) earlier += warp_ties[w];
      all += warp_ties[w];
    }
    if (tie && kept + earlier < left) chunk.out[i] = 1;
    kept += all;
    __syncthreads();
  }
}

template <typename Key>
void select_masks(const std::vector<Chunk>& chunks, const at::Device& device, int64_t keep, Key infinity) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto blocks = static_cast<unsigned>(chunks.size());
  const auto bytes = at::TensorOptions().dtype(at::kByte);
  auto on_host = at::empty({static_cast<int64_t>(chunks.size() * sizeof(Chunk))}, bytes);
  std::copy(chunks.begin(), chunks.end(), reinterpret_cast<Chunk*>(on_host.data_ptr()));
  const auto on_device = on_host.to(device);
  auto state = at::tensor({int64_t{0}, keep, int64_t{0}, INT64_MAX}, at::kLong).to(device);
  auto histogram = at::zeros({BINS}, at::TensorOptions().dtype(at::kLong).device(device));
  auto ties = at::empty({static_cast<int64_t>(blocks)}, at::TensorOptions().dtype(at::kLong).device(device));
  auto* chunk_pointer = reinterpret_cast<const Chunk*>(on_device.const_data_ptr());
  auto* state_pointer = reinterpret_cast<State*>(state.data_ptr());
  auto* histogram_pointer = reinterpret_cast<Count*>(histogram.data_ptr());
  constexpr int BITS = 8 * sizeof(Key) - 1;
  for (int shift = ((BITS - 1) / DIGIT) * DIGIT, first = true; shift >= 0; shift -= DIGIT, first = false) {
    histogram_kernel<Key><<<blocks, THREADS, 0, stream>>>(chunk_pointer, state_pointer, histogram_pointer, shift, first,
                                                          infinity);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    pick_kernel<<<1, BINS / 2, 0, stream>>>(state_pointer, histogram_pointer, shift);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  count_ties_kernel<Key><<<blocks, THREADS, 0, stream>>>(chunk_pointer, state_pointer, ties.data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const auto ties_through = ties.cumsum(0);
  write_kernel<Key><<<blocks, THREADS, 0, stream>>>(chunk_pointer, state_pointer, ties_through.data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const auto end = state.cpu();  // waits for the kernels
  const int64_t* values = end.const_data_ptr<int64_t>();
  check_finite(values[3] == INT64_MAX, static_cast<size_t>(values[3]));
  check_keep(keep, values[2]);
}

std::vector<Tensor> global_magnitude_masks(TensorList weights, TensorList masks, int64_t keep) {
  check_masks(weights, masks);
  check_one_dtype(weights);
  if (weights.empty()) {
    check_keep(keep, 0);
    return {};
  }
  const c10::cuda::CUDAGuard guard(weights[0].device());
  std::vector<Tensor> dense, outs;  // dense keeps copies of non-contiguous tensors alive
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto weight = weights[i].contiguous(), mask = masks[i].contiguous();
    outs.push_back(at::empty_like(mask));
    dense.insert(dense.end(), {weight, mask});
    const auto* bytes = static_cast<const char*>(weight.const_data_ptr());
    const auto* mask_bytes = static_cast<const uint8_t*>(mask.const_data_ptr());
    auto* out_bytes = static_cast<uint8_t*>(outs.back().data_ptr());
    for (int64_t start = 0; start < weight.numel(); start += CHUNK) {
      chunks.push_back({bytes + start * weight.element_size(), mask_bytes + start, out_bytes + start,
                        std::min(CHUNK, weight.numel() - start), static_cast<int64_t>(i)});
    }
  }
  if (chunks.empty()) {
    check_keep(keep, 0);
    return outs;
  }
  const auto device = weights[0].device();
  switch (weights[0].scalar_type()) {
    case at::kFloat: select_masks<uint32_t>(chunks, device, keep, 0x7f800000u); break;
    case at::kBFloat16: select_masks<uint16_t>(chunks, device, keep, uint16_t{0x7f80}); break;
    case at::kHalf: select_masks<uint16_t>(chunks, device, keep, uint16_t{0x7c00}); break;
    default: select_masks<uint64_t>(chunks, device, keep, uint64_t{0x7ff0000000000000});
  }
  return outs;
}

}  // namespace

TORCH_LIBRARY_IMPL(audio_lottery, CUDA, m) { m.impl("global_magnitude_masks", &global_magnitude_masks); }

}  // namespace audio_lottery
