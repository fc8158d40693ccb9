#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>

#include "cuda/fault.h"
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

const char* text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here: the next caller shall not find it
  return cudaGetErrorString(error);
}

std::array<std::atomic<uint64_t*>, kMostDevices> records;  // on the host
std::mutex records_mutex;

// Memory for the record of a device. It is never freed: a kernel may still write to it.
cudaError_t make_record(int device) {
  const std::lock_guard lock(records_mutex);
  if (records[size_t(device)]) return cudaSuccess;
  // A graph that this thread captures has nothing to do with it.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return error;
  void* memory = nullptr;
  error = cudaHostAlloc(&memory, sizeof(uint64_t), cudaHostAllocMapped | cudaHostAllocPortable);
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return error;
  auto* record = static_cast<uint64_t*>(memory);
  *record = 0;
  records[size_t(device)] = record;
  return cudaSuccess;
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
  return text(error);
}

const char* fault_record(FaultRecord& record) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device >= kMostDevices) return "a device of a number above 63";
  if (error == cudaSuccess && !records[size_t(device)]) error = make_record(device);
  if (error != cudaSuccess) return text(error);
  record.on_host = records[size_t(device)];
  void* mapped = nullptr;
  error = cudaHostGetDevicePointer(&mapped, record.on_host, 0);
  record.on_device = static_cast<uint64_t*>(mapped);
  return text(error);
}

std::string take_fault(int device) {
  uint64_t* record = device >= 0 && device < kMostDevices ? records[size_t(device)].load() : nullptr;
  return record ? text_of(std::atomic_ref(*record).exchange(0)) : "";
}

}  // namespace rnn::cuda
