// block_norms on CUDA: a thread a block, which sums along the block's rows, the first row first: the CPU's bits.

#include <ATen/Dispatch.h>
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

template <typename T>
__global__ void __launch_bounds__(THREADS) norms_kernel(const T* weight, double* norms, int64_t height, int64_t width,
                                                        int64_t down, int64_t across, int64_t rows, int64_t columns) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (block >= down * across) return;
  const int64_t top = block / across * rows, left = block % across * columns;
  const int64_t bottom = min(height, top + rows), right = min(width, left + columns);
  double sum = 0;
  for (int64_t i = top; i < bottom; ++i) {
    for (int64_t j = left; j < right; ++j) sum += fabs(static_cast<double>(weight[i * width + j]));
  }
  norms[block] = sum;
}

std::vector<Tensor> block_norms(TensorList weights, int64_t rows, int64_t columns) {
  check_blocks(weights, rows, columns);
  std::vector<Tensor> outs;
  for (const auto& given : weights) {
    const c10::cuda::CUDAGuard guard(given.device());
    const auto weight = given.contiguous().flatten(1);
    const int64_t height = weight.size(0), width = weight.size(1);
    const int64_t down = pieces(height, rows), across = pieces(width, columns);
    outs.push_back(at::zeros({down, across}, weight.options().dtype(at::kDouble)));
    if (weight.numel() == 0) continue;
    const auto grid = static_cast<unsigned>(pieces(down * across, THREADS));
    const int64_t r = std::min(rows, height), c = std::min(columns, width);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, weight.scalar_type(), "block_norms", [&] {
      norms_kernel<scalar_t><<<grid, THREADS, 0, c10::cuda::getCurrentCUDAStream()>>>(
          weight.const_data_ptr<scalar_t>(), outs.back().mutable_data_ptr<double>(), height, width, down, across, r, c);
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return outs;
}

}  // namespace

TORCH_LIBRARY_IMPL(audio_lottery, CUDA, m) { m.impl("block_norms", &block_norms); }

}  // namespace audio_lottery
