#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <mutex>

#include "cuda/fault.h"
#include "cuda/launch.h"

namespace rnn::cuda {
namespace {

const char* text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here: the next caller shall not find it
  return cudaGetErrorString(error);
}

constexpr int kMostDevices = 64;
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
  get(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.most_blocks = most_blocks_of(device.major);
  return text(error);
}

const char* fault_record(FaultRecord& record) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device >= kMostDevices) return "more than 64 devices";
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
