// One kernel for all steps.
#include <cuda_runtime.h>

#include "cuda/pointwise.cuh"
#include "cuda/pointwise.h"
#include "cuda/storage.cuh"

namespace rnn::cuda {
namespace {

constexpr int kMinBlocks = 8;  // of a multiprocessor; without this bound ptxas spills to hold more of them

template <class Cell, class Step>
__global__ __launch_bounds__(PointwiseGrid::kUnits* PointwiseGrid::kRows,
                             kMinBlocks) void for_each_unit(const __grid_constant__ Step step) {
  run_units<Cell>(step, {gridDim.x, gridDim.y}, blockIdx.x, blockIdx.y, int(threadIdx.x), int(threadIdx.y));
}

}  // namespace

template <class Step>
const char* launch(int cell, const Step& step, Stream stream) {
  const auto [x, y] = PointwiseGrid::of(step);
  if (x == 0) return nullptr;  // CUDA knows no empty grid
  const dim3 grid(x, y), block(PointwiseGrid::kUnits, PointwiseGrid::kRows);
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
