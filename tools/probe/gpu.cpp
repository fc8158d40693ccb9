// The machine that the probe tries is a GPU: this is linked with the objects of the extension's kernels.
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "machine.h"

namespace rnn::probe {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw Failure("failed", std::string(what) + ": " + cudaGetErrorString(error));
}
void check_launch(const char* error) {
  if (error) throw Failure("refused", error);
}

// Where kernels on this device record that they have waited in vain.
cuda::FaultRecord fault_record() {
  cuda::FaultRecord record{};
  check_launch(cuda::fault_record(record));
  return record;
}

}  // namespace

cuda::Device Machine::device() {
  cuda::Device found{};
  check_launch(cuda::query(found));
  return found;
}
char* Machine::allocate(int64_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, size_t(bytes)), "memory");
  return static_cast<char*>(memory);
}
void Machine::upload(char* to, const char* from, int64_t bytes) {
  check(cudaMemcpy(to, from, size_t(bytes), cudaMemcpyHostToDevice), "a copy to the device");
}
void Machine::download(char* to, const char* from, int64_t bytes) {
  check(cudaMemcpy(to, from, size_t(bytes), cudaMemcpyDeviceToHost), "a copy from the device");
}
void Machine::set_bits(char* to, int64_t bytes) {
  if (bytes) check(cudaMemsetAsync(to, 0xff, size_t(bytes), nullptr), "memory for messages");
}
void Machine::wait() {
  check(cudaDeviceSynchronize(), "the kernels");
  int device = 0;
  check(cudaGetDevice(&device), "the device");
  const std::string fault = cuda::take_fault(device);
  if (!fault.empty()) throw Failure("gave up", fault);
}

template <class Stages>
void Machine::launch(int cell, const Stages& stages, const cuda::Plan& plan, const cuda::Part& part) {
  cuda::Part with_record = part;
  with_record.fault = fault_record().on_device;
  check_launch(cuda::launch(cell, stages, plan, with_record, nullptr).error);
}
template <class Step>
void Machine::launch(int cell, const Step& step) {
  check_launch(cuda::launch(cell, step, nullptr));
}

double Machine::microseconds(const std::function<void()>& work) {
  cudaEvent_t start, end;
  check(cudaEventCreate(&start), "an event");
  check(cudaEventCreate(&end), "an event");
  check(cudaEventRecord(start), "an event");
  work();
  check(cudaEventRecord(end), "an event");
  wait();
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, start, end), "an event");
  check(cudaEventDestroy(start), "an event");
  check(cudaEventDestroy(end), "an event");
  return double(milliseconds) * 1e3;
}

}  // namespace rnn::probe

RNN_PROBE_LAUNCHES(float)
RNN_PROBE_LAUNCHES(rnn::BFloat16)
