// hold_ticket_ on CUDA: one launch for as many tensors as fit the argument limit.

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
constexpr int TENSORS = 100;        // a launch: 3,608 of the 4,096 bytes that every device takes as arguments

struct Arguments {
  void* data[TENSORS];
  const uint8_t* mask[TENSORS];
  int64_t size[TENSORS];
  int64_t first_block[TENSORS];  // of the tensor, in the grid
  int32_t width[TENSORS];        // bytes an element
  int32_t tensors;
};

template <typename Bits>
__device__ void hold(Bits* x, const uint8_t* mask, int64_t n) {
  // 16 bytes of weights at a time where both run aligned, as they do in whole tensors.
  constexpr int WIDE = 16 / sizeof(Bits);
  struct alignas(16) Weights { Bits at[WIDE]; };
  struct alignas(WIDE) Masks { uint8_t at[WIDE]; };
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && reinterpret_cast<uintptr_t>(mask) % WIDE == 0;
  const int64_t wide = aligned ? n / WIDE : 0;
  for (int64_t i = threadIdx.x; i < wide; i += THREADS) {
    Weights w = reinterpret_cast<Weights*>(x)[i];
    const Masks m = reinterpret_cast<const Masks*>(mask)[i];
    Bits dirty = 0;
#pragma unroll
    for (int k = 0; k < WIDE; ++k) {
      dirty |= m.at[k] ? Bits{0} : w.at[k];
      w.at[k] = m.at[k] ? w.at[k] : Bits{0};
    }
    if (dirty) reinterpret_cast<Weights*>(x)[i] = w;  // held weights are read, not written
  }
  for (int64_t i = wide * WIDE + threadIdx.x; i < n; i += THREADS) {
    if (!mask[i]) x[i] = 0;
  }
}

__global__ void __launch_bounds__(THREADS) hold_kernel(const __grid_constant__ Arguments arguments) {
  int low = 0, high = arguments.tensors - 1;  // the last tensor whose first block is not behind this one
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (arguments.first_block[middle] <= blockIdx.x) low = middle; else high = middle - 1;
  }
  const int64_t start = (blockIdx.x - arguments.first_block[low]) * CHUNK;
  const int64_t n = min(CHUNK, arguments.size[low] - start);
  const uint8_t* mask = arguments.mask[low] + start;
  if (arguments.width[low] == 2) hold(static_cast<uint16_t*>(arguments.data[low]) + start, mask, n);
  if (arguments.width[low] == 4) hold(static_cast<uint32_t*>(arguments.data[low]) + start, mask, n);
  if (arguments.width[low] == 8) hold(static_cast<unsigned long long*>(arguments.data[low]) + start, mask, n);
}

class Launcher {
 public:
  void add(const Tensor& x, const Tensor& mask) {
    const int64_t blocks = (x.numel() + CHUNK - 1) / CHUNK;
    if (arguments_.tensors == TENSORS || blocks_ + blocks > INT32_MAX) launch();
    const int i = arguments_.tensors++;
    arguments_.data[i] = x.data_ptr();
    arguments_.mask[i] = static_cast<const uint8_t*>(mask.const_data_ptr());
    arguments_.size[i] = x.numel();
    arguments_.first_block[i] = blocks_;
    arguments_.width[i] = static_cast<int32_t>(x.element_size());
    blocks_ += blocks;
  }

  void launch() {
    if (arguments_.tensors == 0) return;
    hold_kernel<<<static_cast<unsigned>(blocks_), THREADS, 0, c10::cuda::getCurrentCUDAStream()>>>(arguments_);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    arguments_.tensors = 0;
    blocks_ = 0;
  }

 private:
  Arguments arguments_{};
  int64_t blocks_ = 0;
};

void hold_ticket_(TensorList weights, TensorList grads, TensorList masks) {
  check_masks(weights, masks);
  check_grads(weights, grads);
  if (weights.empty()) return;
  const c10::cuda::CUDAGuard guard(weights[0].device());
  Launcher launcher;
  for (size_t i = 0; i < weights.size(); ++i) {
    for (const auto& list : {weights, grads}) {
      if (list.empty() || list[i].numel() == 0) continue;
      if (list[i].strides() == masks[i].strides() && list[i].is_non_overlapping_and_dense()) {
        launcher.add(list[i], masks[i]);
        list[i].unsafeGetTensorImpl()->bump_version();  // autograd must see that it was written
      } else {
        list[i].masked_fill_(masks[i].view(at::kByte).eq(0), 0);
      }
    }
  }
  launcher.launch();
}

}  // namespace

TORCH_LIBRARY_IMPL(audio_lottery, CUDA, m) { m.impl("hold_ticket_", &hold_ticket_); }

}  // namespace audio_lottery
