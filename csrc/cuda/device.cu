#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>

#include "cuda/launch.h"

namespace rnn::cuda {
namespace {

// What plans may take of a device at most: RNNKERNELS_CUDA_MULTIPROCESSORS leaves the rest to others whose blocks have
// to run at the same time too. 0 where it is not set, -1 where it is no number.
int most_multiprocessors() {
  static const int most = [] {
    const char* text = std::getenv("RNNKERNELS_CUDA_MULTIPROCESSORS");
    if (!text || !*text) return 0;
    char* end = nullptr;
    const long number = std::strtol(text, &end, 10);
    return *end || number < 1 ? -1 : int(std::min(number, 1L << 20));
  }();
  return most;
}

}  // namespace

const char* query(Device& device) {
  int number = 0;
  cudaError_t error = cudaGetDevice(&number);
  const auto get = [&](int& to, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&to, attribute, number);
  };
  get(device.major, cudaDevAttrComputeCapabilityMajor);
  get(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  const int most = most_multiprocessors();
  if (most < 0) return "RNNKERNELS_CUDA_MULTIPROCESSORS: expected a number of at least 1";
  if (most > 0) device.multiprocessors = std::min(device.multiprocessors, most);
  get(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.most_blocks = most_blocks_of(device.major);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here: the next caller shall not find it
  return cudaGetErrorString(error);
}

}  // namespace rnn::cuda
