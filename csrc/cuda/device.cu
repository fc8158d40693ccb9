#include <cuda_runtime.h>

#include "cuda/launch.h"

namespace rnn::cuda {

const char* query(Device& device) {
  int number = 0;
  cudaError_t error = cudaGetDevice(&number);
  const auto get = [&](int& to, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&to, attribute, number);
  };
  get(device.major, cudaDevAttrComputeCapabilityMajor);
  get(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  get(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.most_blocks = most_blocks_of(device.major);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here: the next caller shall not find it
  return cudaGetErrorString(error);
}

}  // namespace rnn::cuda
