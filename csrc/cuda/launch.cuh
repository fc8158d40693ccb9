// The persistent kernels of one storage type; included by the persistent_*.cu files, which say which.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "cuda/answers.h"
#include "cuda/launch.h"
#include "cuda/persistent.cuh"
#include "cuda/storage.cuh"

namespace rnn::cuda {
namespace {

template <class Pass, class Block>
__global__ __launch_bounds__(kThreads, 1) void persistent(const __grid_constant__ Persistent<Pass> p) {
  if constexpr (Block::kCluster && !RNN_CLUSTERS) return;
  Block(p).run();
}

inline const char* text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here: the next caller shall not find it
  return cudaGetErrorString(error);
}

template <class Pass, class Block>
const void* kernel_of() {
  return reinterpret_cast<const void*>(&persistent<Pass, Block>);
}

// What a kernel may take is set once per device, to the most there is: launches of other layouts, also those that a
// graph has captured, must find it so.
template <class Pass, class Block>
cudaError_t prepare(int device) {
  static std::atomic<uint64_t> prepared{0};  // devices
  static_assert(kMostDevices <= 64);
  const uint64_t bit = device < kMostDevices ? uint64_t(1) << device : 0;
  if (prepared & bit) return cudaSuccess;
  int shared = 0;
  cudaError_t error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel_of<Pass, Block>(), cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess && Block::kCluster)
    error = cudaFuncSetAttribute(kernel_of<Pass, Block>(), cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) prepared |= bit;
  return error;
}

// How a plan is launched.
struct Config {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  Config(const Plan& plan, int64_t D, cudaStream_t stream) {
    const Layout& l = plan.layout;
    config.gridDim = dim3(unsigned(D * l.stages * l.groups * l.message.blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = size_t(l.shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    if (plan.in_clusters()) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {unsigned(l.message.blocks), 1, 1};
      config.numAttrs = 1;
    } else if (plan.cooperates()) {  // all blocks run at the same time, or the launch is refused
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
      config.numAttrs = 1;
    }
  }
  Config(const Config&) = delete;
};

Answers::Question question_of(const void* kernel, int device, const Plan& plan, int64_t D) {
  const Layout& l = plan.layout;
  const int64_t all = D * l.stages * l.groups * l.message.blocks;
  return {kernel, device, plan.in_clusters() ? l.message.blocks : all, l.shared_bytes};
}

// Groups of blocks that run at the same time.
template <class Pass, class Block>
cudaError_t count_groups(const Plan& plan, int device, int& groups) {
  cudaError_t error = prepare<Pass, Block>(device);
  if (error != cudaSuccess) return error;
  const void* kernel = kernel_of<Pass, Block>();
  if (plan.in_clusters()) {
    const Config of(plan, 1, nullptr);
    return cudaOccupancyMaxActiveClusters(&groups, kernel, &of.config);
  }
  int blocks = 0, multiprocessors = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, size_t(plan.layout.shared_bytes));
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  groups = blocks * multiprocessors;
  return error;
}

template <class Pass, class Block>
std::string block_runs_here(const Plan& plan, int D) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return text(error);
  Answer answer = answers.find(question_of(kernel_of<Pass, Block>(), device, plan, D), [&]() -> Answer {
    int groups = 0;
    const char* error = text(count_groups<Pass, Block>(plan, device, groups));
    return {groups, error ? error : ""};
  });
  if (!plan.in_clusters()) answer.at_once /= plan.layout.message.blocks;
  return refusal(plan, D, answer);
}

// Errors by which a device says that it cannot hold such a launch; a smaller one may be possible.
constexpr bool is_refusal(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorInvalidClusterSize ||
         error == cudaErrorLaunchOutOfResources || error == cudaErrorInvalidConfiguration ||
         error == cudaErrorNotSupported;
}

template <class Pass, class Block>
Outcome launch_block(const Persistent<Pass>& p, const Plan& plan, int64_t D, cudaStream_t stream) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = prepare<Pass, Block>(device);
  if (error != cudaSuccess) return {text(error), false};
  const Config of(plan, D, stream);
  void* arguments[] = {const_cast<Persistent<Pass>*>(&p)};
  error = cudaLaunchKernelExC(&of.config, kernel_of<Pass, Block>(), arguments);
  const char* said = text(error);
  if (!is_refusal(error)) return {said, false};
  answers.refuse(question_of(kernel_of<Pass, Block>(), device, plan, D), said);
  return {said, true};
}

template <class Pass, class Call>
Outcome launch_pass(int cell, const std::vector<Call>& stages, const Plan& plan, const Part& part, Stream stream) {
  const auto p = parameter<Pass>(cell, stages, plan, part);
  Outcome outcome{"no such kernel", false};
  dispatch_block<Pass>(plan, [&]<class Block>(Block*) {
    outcome = launch_block<Pass, Block>(p, plan, stages[0].seq.D, static_cast<cudaStream_t>(stream));
  });
  return outcome;
}

template <class Pass>
std::string pass_runs_here(const Plan& plan, int D) {
  std::string reason = "no such kernel";
  dispatch_block<Pass>(plan, [&]<class Block>(Block*) { reason = block_runs_here<Pass, Block>(plan, D); });
  return reason;
}

// Calls f(Cell{}) for the cell with this number, or for what it is one of. A compiler whose report on one cell's
// kernels is all that is wanted is spared the others: RNNKERNELS_CUDA_CELL names it.
template <class F>
void dispatch_compiled(int cell, F&& f) {
  dispatch_cell_or_group(cell, [&](auto of) {
#if defined(RNNKERNELS_CUDA_CELL)
    if constexpr (same<decltype(of), RNNKERNELS_CUDA_CELL>) f(of);
#else
    f(of);
#endif
  });
}

}  // namespace

template <class IO>
Outcome launch(int cell, const ForwardStages<IO>& stages, const Plan& plan, const Part& part, Stream stream) {
  Outcome outcome{"no such cell", false};
  dispatch_compiled(
      cell, [&](auto of) { outcome = launch_pass<ForwardPass<decltype(of), IO>>(cell, stages, plan, part, stream); });
  return outcome;
}

template <class IO>
Outcome launch(int cell, const BackwardStages<IO>& stages, const Plan& plan, const Part& part, Stream stream) {
  Outcome outcome{"no such cell", false};
  dispatch_compiled(
      cell, [&](auto of) { outcome = launch_pass<BackwardPass<decltype(of), IO>>(cell, stages, plan, part, stream); });
  return outcome;
}

template <class IO>
std::string runs_here(int cell, bool backward, const Plan& plan, int D) {
  std::string reason = "no such cell";
  dispatch_compiled(cell, [&](auto of) {
    using Cell = decltype(of);
    reason =
        backward ? pass_runs_here<BackwardPass<Cell, IO>>(plan, D) : pass_runs_here<ForwardPass<Cell, IO>>(plan, D);
  });
  return reason;
}

}  // namespace rnn::cuda

#define RNN_PERSISTENT(IO)                                                                   \
  namespace rnn::cuda {                                                                      \
  template Outcome launch(int, const ForwardStages<IO>&, const Plan&, const Part&, Stream);  \
  template Outcome launch(int, const BackwardStages<IO>&, const Plan&, const Part&, Stream); \
  template std::string runs_here<IO>(int, bool, const Plan&, int);                           \
  }
