// The persistent kernels of one storage type; included by the persistent_*.cu files, which say which.
#pragma once

#include <cuda_runtime.h>

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

template <class Pass, class Block>
cudaError_t launch_block(const Persistent<Pass>& p, int64_t D, cudaStream_t stream) {
  const Layout& l = p.layout;
  const auto kernel = reinterpret_cast<const void*>(&persistent<Pass, Block>);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(l.shared_bytes));
  if (error != cudaSuccess) return error;
  if (Block::kCluster && l.message.blocks > kPortableCluster) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(D * l.stages * l.groups * l.message.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(l.shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  if (Block::kCluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(l.message.blocks), 1, 1};
  } else {  // all blocks run at the same time, or the launch is refused
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  config.attrs = &attribute;
  config.numAttrs = 1;
  void* arguments[] = {const_cast<Persistent<Pass>*>(&p)};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

template <class Pass, class Call>
cudaError_t launch_pass(int cell, const std::vector<Call>& stages, const Plan& plan, const Part& part, Stream stream) {
  const auto p = parameter<Pass>(cell, stages, plan, part);
  cudaError_t error = cudaErrorInvalidValue;  // stays where there is no such kernel
  dispatch_block<Pass>(plan.kernel, [&]<class Block>(Block*) {
    error = launch_block<Pass, Block>(p, stages[0].seq.D, static_cast<cudaStream_t>(stream));
  });
  return error;
}

inline const char* text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here: the next caller shall not find it
  return cudaGetErrorString(error);
}

}  // namespace

template <class IO>
const char* launch(int cell, const ForwardStages<IO>& stages, const Plan& plan, const Part& part, Stream stream) {
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_cell_or_group(
      cell, [&](auto of) { error = launch_pass<ForwardPass<decltype(of), IO>>(cell, stages, plan, part, stream); });
  return text(error);
}

template <class IO>
const char* launch(int cell, const BackwardStages<IO>& stages, const Plan& plan, const Part& part, Stream stream) {
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_cell_or_group(
      cell, [&](auto of) { error = launch_pass<BackwardPass<decltype(of), IO>>(cell, stages, plan, part, stream); });
  return text(error);
}

}  // namespace rnn::cuda

#define RNN_PERSISTENT(IO)                                                                                 \
  template const char* rnn::cuda::launch(int, const ForwardStages<IO>&, const Plan&, const Part&, Stream); \
  template const char* rnn::cuda::launch(int, const BackwardStages<IO>&, const Plan&, const Part&, Stream);
