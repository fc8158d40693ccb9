// The launch of a step for one cell, to be compiled by nvcc.
#pragma once

#include <cuda_runtime.h>

#include "cuda/pointwise.cuh"
#include "cuda/pointwise.h"
#include "cuda/storage.cuh"

namespace rnn::cuda {
namespace {

// Of a multiprocessor; without this bound ptxas spills to hold more of them. Half as many are twice the registers,
// which the statistics of rows need.
template <class Step>
constexpr int min_blocks() {
  return requires { Step::kNormed; } ? 4 : 8;
}

template <class Cell, class Step>
__global__ __launch_bounds__(PointwiseGrid::kUnits* PointwiseGrid::kRows,
                             min_blocks<Step>()) void for_each_unit(const __grid_constant__ Step step) {
  run_units<Cell>(step, {gridDim.x, gridDim.y}, blockIdx.x, blockIdx.y, int(threadIdx.x), int(threadIdx.y));
}

template <class Cell, class Step>
__global__ __launch_bounds__(PointwiseGrid::kUnits* PointwiseGrid::kRows,
                             min_blocks<Step>()) void for_each_row(const __grid_constant__ Step step) {
  run_rows<Cell>(step, {gridDim.x, gridDim.y}, blockIdx.y, int(threadIdx.x), int(threadIdx.y), [] { __syncthreads(); });
}

template <class Cell, class Step>
const void* kernel_of_step() {
  if constexpr (of_rows<Step>()) {
    return reinterpret_cast<const void*>(&for_each_row<Cell, Step>);
  } else {
    return reinterpret_cast<const void*>(&for_each_unit<Cell, Step>);
  }
}

// Returns null, or what CUDA has to say against it.
template <class Cell, class Step>
const char* launch_units(const Step& step, Stream stream) {
  const auto [x, y] = PointwiseGrid::of(step);
  if (x == 0) return nullptr;  // CUDA knows no empty grid
  const dim3 grid(x, y), block(PointwiseGrid::kUnits, PointwiseGrid::kRows);
  void* arguments[] = {const_cast<Step*>(&step)};
  const cudaError_t error =
      cudaLaunchKernel(kernel_of_step<Cell, Step>(), grid, block, arguments, 0, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here: the next caller shall not find it
  return cudaGetErrorString(error);
}

}  // namespace

template <class Step>
const char* launch(int cell, const Step& step, Stream stream) {
  const char* said = "no such cell";
  dispatch_step<Step>(cell, [&](auto of) { said = launch_units<decltype(of)>(step, stream); });
  return said;
}

}  // namespace rnn::cuda
