// One kernel for all steps: a warp takes 32 units of a row, a block a few rows.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/pointwise.h"
#include "cuda/storage.cuh"

namespace rnn::cuda {
namespace {

constexpr int kUnits = 32, kRows = 4;  // of a block
constexpr int kMinBlocks = 8;          // of a multiprocessor; without this bound ptxas spills to hold more of them
constexpr int64_t kMaxGridY = 65535;   // along x, CUDA takes more blocks than memory has units for

// The stride covers the rows that a grid of the largest size leaves over.
template <class Cell, class Step>
__global__ __launch_bounds__(kUnits* kRows, kMinBlocks) void for_each_unit(const __grid_constant__ Step step) {
  const Sequence& q = step.sequence();
  const int64_t i = int64_t(blockIdx.x) * kUnits + threadIdx.x, stride = int64_t(gridDim.y) * kRows;
  if (i >= step.width()) return;
  for (int64_t n = int64_t(blockIdx.y) * kRows + threadIdx.y; n < q.D * q.rows(); n += stride)
    step.template unit<Cell>(Slot(q, n), i);
}

int64_t blocks(int64_t n, int64_t per_block) { return (n + per_block - 1) / per_block; }

}  // namespace

template <class Step>
const char* launch(int cell, const Step& step, Stream stream) {
  const int64_t rows = step.sequence().D * step.sequence().rows();
  if (rows * step.width() == 0) return nullptr;  // CUDA knows no empty grid
  const dim3 block(kUnits, kRows);
  const dim3 grid(blocks(step.width(), kUnits), std::min(blocks(rows, kRows), kMaxGridY));
  cudaError_t error = cudaErrorInvalidValue;  // stays where there is no such cell
  dispatch_step<Step>(cell, [&](auto of) {
    void* arguments[] = {const_cast<Step*>(&step)};
    const auto kernel = reinterpret_cast<const void*>(&for_each_unit<decltype(of), Step>);
    error = cudaLaunchKernel(kernel, grid, block, arguments, 0, static_cast<cudaStream_t>(stream));
  });
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here: the next caller shall not find it
  return cudaGetErrorString(error);
}

#define RNN_LAUNCH(IO)                                                  \
  template const char* launch(int, const ForwardCell<IO>&, Stream);     \
  template const char* launch(int, const ForwardProject<IO>&, Stream);  \
  template const char* launch(int, const BackwardBegin<IO>&, Stream);   \
  template const char* launch(int, const BackwardProject<IO>&, Stream); \
  template const char* launch(int, const BackwardCell<IO>&, Stream);    \
  template const char* launch(int, const BackwardBound<IO>&, Stream);   \
  template const char* launch(int, const BackwardFinish<IO>&, Stream);
RNN_LAUNCH(float)
RNN_LAUNCH(double)
RNN_LAUNCH(BFloat16)
RNN_LAUNCH(Float16)
#undef RNN_LAUNCH

}  // namespace rnn::cuda
