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

// All ones where the mask is false, which is only at byte 0, and 0 where it is true. Compared as bytes, then widened.
template <typename Bits>
AUDIO_LOTTERY_INLINE Bits pruned(uint8_t mask) {
  return static_cast<Bits>(static_cast<int8_t>(-(mask == 0)));
}

// Bits is the unsigned integer of the element's width: AND-ing with 0 or ~0 vectorises, keeps signs and payloads where
// the mask is true, and makes NaN 0 where it is false. A block with nothing to clear is read, not written: that is the
// rule for weights, which were zeroed the step before.
template <typename Bits>
AUDIO_LOTTERY_INLINE void hold(Bits* __restrict x, const uint8_t* __restrict mask, int64_t n) {
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t end = std::min(n, start + BLOCK);
    Bits dirty = 0;
    for (int64_t i = start; i < end; ++i) dirty |= x[i] & pruned<Bits>(mask[i]);
    if (dirty) {
      for (int64_t i = start; i < end; ++i) x[i] &= static_cast<Bits>(~pruned<Bits>(mask[i]));
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

bool runs_along(const Tensor& x, const Tensor& mask) {
  return x.strides() == mask.strides() && x.is_non_overlapping_and_dense();
}

void hold_ticket_(TensorList weights, TensorList grads, TensorList masks) {
  check_masks(weights, masks);
  check_grads(weights, grads);
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < weights.size(); ++i) {
    std::vector<Tensor> dense;
    for (const auto& list : {weights, grads}) {
      if (list.empty()) continue;
      if (runs_along(list[i], masks[i])) {
        dense.push_back(list[i]);
        list[i].unsafeGetTensorImpl()->bump_version();  // autograd must see that it was written
      } else {
        list[i].masked_fill_(masks[i].view(at::kByte).eq(0), 0);
      }
    }
    const auto* mask = static_cast<const uint8_t*>(masks[i].const_data_ptr());
    for (int64_t start = 0; start < masks[i].numel(); start += CHUNK) {
      for (const auto& x : dense) {  // weight, then gradient, while the mask is in the cache
        const auto width = static_cast<int64_t>(x.element_size());
        auto* data = static_cast<char*>(x.data_ptr()) + start * width;
        chunks.push_back({data, mask + start, std::min(CHUNK, x.numel() - start), width});
      }
    }
  }
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 2, [&](int64_t begin, int64_t end) {
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
