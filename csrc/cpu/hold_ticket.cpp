// hold_ticket_ on CPU: one pass over weights, gradients and masks.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../checks.h"
#include "vector.h"

namespace audio_lottery {
namespace {

constexpr int64_t CHUNK = 1 << 15;  // elements a task
constexpr int64_t BLOCK = 512;      // elements that are looked at before they are written

// Bits is the unsigned integer of the element's width: AND-ing with 0 or ~0 vectorises, keeps signs and payloads where
// the mask is true, and makes NaN 0 where it is false. A block with nothing to clear is read, not written: that is the
// rule for weights, which were zeroed the step before.
template <typename Bits>
AUDIO_LOTTERY_INLINE void hold(Bits* __restrict x, const uint8_t* __restrict mask, int64_t n) {
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t end = std::min(n, start + BLOCK);
    Bits dirty = 0;
    for (int64_t i = start; i < end; ++i) dirty |= x[i] & static_cast<Bits>(mask[i] - 1);
    if (dirty) {
      for (int64_t i = start; i < end; ++i) x[i] &= static_cast<Bits>(-static_cast<Bits>(mask[i]));
    }
  }
}

AUDIO_LOTTERY_CLONES void hold16(uint16_t* x, const uint8_t* mask, int64_t n) { hold(x, mask, n); }
AUDIO_LOTTERY_CLONES void hold32(uint32_t* x, const uint8_t* mask, int64_t n) { hold(x, mask, n); }
AUDIO_LOTTERY_CLONES void hold64(uint64_t* x, const uint8_t* mask, int64_t n) { hold(x, mask, n); }

struct Chunk {
  void* data;
  const uint8_t* mask;
  int64_t n;
  int64_t width;
};

// Appends the chunks of one tensor; false if its memory does not run along with the mask's.
bool add_chunks(std::vector<Chunk>& chunks, const Tensor& x, const Tensor& mask) {
  if (x.strides() != mask.strides() || !x.is_non_overlapping_and_dense()) return false;
  auto* data = static_cast<char*>(x.data_ptr());
  auto* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  for (int64_t start = 0; start < x.numel(); start += CHUNK) {
    chunks.push_back({data + start * x.element_size(), bits + start, std::min(CHUNK, x.numel() - start),
                      static_cast<int64_t>(x.element_size())});
  }
  return true;
}

void hold_ticket_(TensorList weights, TensorList grads, TensorList masks) {
  check_masks(weights, masks);
  check_grads(weights, grads);
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < weights.size(); ++i) {
    for (const auto& list : {weights, grads}) {
      if (list.empty()) continue;
      if (add_chunks(chunks, list[i], masks[i])) {
        list[i].unsafeGetTensorImpl()->bump_version();  // autograd must see that it was written
      } else {
        list[i].masked_fill_(masks[i].logical_not(), 0);
      }
    }
  }
  at::parallel_for(0, chunks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const auto& [data, mask, n, width] = chunks[c];
      if (width == 2) hold16(static_cast<uint16_t*>(data), mask, n);
      if (width == 4) hold32(static_cast<uint32_t*>(data), mask, n);
      if (width == 8) hold64(static_cast<uint64_t*>(data), mask, n);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(audio_lottery, CPU, m) { m.impl("hold_ticket_", &hold_ticket_); }

}  // namespace audio_lottery
