// block_norms on CUDA: one thread sums one block, row by row, so that the norms equal the CPU's bit for bit.

#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"

namespace audio_lottery {
namespace {

constexpr int THREADS = 256;

template <typename T>
__global__ void __launch_bounds__(THREADS) norms_kernel(const T* weight, double* norms, const Blocks blocks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= blocks.down * blocks.across) return;
  const int64_t top = i / blocks.across * blocks.rows, left = i % blocks.across * blocks.columns;
  const int64_t bottom = min(top + blocks.rows, blocks.height), right = min(left + blocks.columns, blocks.width);
  double sum = 0;
  for (int64_t row = top; row < bottom; ++row) {
    for (int64_t column = left; column < right; ++column) {
      sum += fabs(static_cast<double>(weight[row * blocks.width + column]));
    }
  }
  norms[i] = sum;
}

std::vector<Tensor> block_norms(TensorList weights, int64_t rows, int64_t columns) {
  check_blocks(weights, rows, columns);
  std::vector<Tensor> all;
  if (weights.empty()) return all;
  const c10::cuda::CUDAGuard guard(weights[0].device());
  for (const auto& given : weights) {
    const auto weight = given.contiguous();
    const Blocks blocks(weight, rows, columns);
    auto norms = at::empty({blocks.down, blocks.across}, weight.options().dtype(at::kDouble));
    all.push_back(norms);
    if (norms.numel() == 0) continue;
    const auto grid = static_cast<unsigned>((norms.numel() + THREADS - 1) / THREADS);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight.scalar_type(), "block_norms", [&] {
      norms_kernel<<<grid, THREADS, 0, c10::cuda::getCurrentCUDAStream()>>>(
          weight.const_data_ptr<scalar_t>(), norms.data_ptr<double>(), blocks);
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return all;
}

}  // namespace

TORCH_LIBRARY_IMPL(audio_lottery, CUDA, m) { m.impl("block_norms", &block_norms); }

}  // namespace audio_lottery
