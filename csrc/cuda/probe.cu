#include <cuda_runtime.h>

#include "cuda/probe.h"

namespace rnn::cuda {
namespace {

// Compiled for the same cards as all the others.
__global__ void like_any_other() {}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace

std::string probe() {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);  // 0 where there is none
  cudaRuntimeGetVersion(&runtime);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&like_any_other));
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // reported here: the next caller shall not find it
  return std::string(cudaGetErrorString(error)) + " (the driver here knows CUDA " + version(driver) +
         ", and the kernels were built with " + version(runtime) + ")";
}

}  // namespace rnn::cuda
