// What the hand-offs of the persistent kernels cost on this GPU, and nothing else: microseconds per round, by the
// primitives of csrc/cuda/device.cuh. Prints one line of JSON each. Built by tools/prepare_gpu.py, run by
// tools/validate_gpu.py:
//
//   nvcc -O3 -std=c++20 --expt-relaxed-constexpr -arch=sm_90a -Icsrc -o micro tools/micro.cu && ./micro
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "cuda/device.cuh"

using namespace rnn::cuda;

namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "micro: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Every block waits for all others of its cluster.
__global__ void cluster_barrier(int rounds, int, uint32_t*) {
  for (int i = 0; i < rounds; ++i) sync_cluster();
}

// Every block sends 16 bytes to all blocks of its cluster and waits for theirs, in two buffers.
__global__ void transactions(int rounds, int blocks, uint32_t*) {
  struct Shared {
    Vec16 slots[2][16];
    TransactionBarrier barriers[2];
  };
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  if (thread_index() < 2) shared.barriers[thread_index()].open();
  sync_cluster();
  for (int i = 0; i < rounds; ++i) {
    TransactionBarrier& barrier = shared.barriers[i % 2];
    if (thread_index() == 0) barrier.expect(16 * blocks);
    if (thread_index() < blocks) send(&shared.slots[i % 2][cluster_rank()], &barrier, thread_index(), Vec16{});
    if (!barrier.await(i / 2)) return;
    sync_block();
  }
  sync_cluster();
}

// Every block puts 16 bytes into global memory, in eight places by turns, and looks for those of all others.
__global__ void vectors(int rounds, int blocks, uint32_t* memory) {
  const auto place = [&](int round, int block) {
    return reinterpret_cast<const char*>(memory) + (round % kGridBuffers * blocks + block) * kVec16Bytes;
  };
  for (int i = 1; i <= rounds; ++i) {
    sync_block();
    if (thread_index() == 0) {
      put(const_cast<char*>(place(i, block_index())), Vec16{});
      empty(const_cast<char*>(place(i + kGridBuffers / 2 - 1, block_index())));
    }
    if (i % 2 == 0) settle();
    if (thread_index() < blocks) {
      const int at[1] = {0}, none[1] = {-1};
      Vec16 found[1] = {look(place(i, thread_index()))}, nobody[1] = {};
      if (!await(place(i, thread_index()), at, found, none, nobody)) return;
    }
    sync_block();
  }
}

// Every block sets a flag in global memory and waits for all others.
__global__ void flags(int rounds, int blocks, uint32_t* flag) {
  for (int i = 1; i <= rounds; ++i) {
    sync_block();
    if (thread_index() == 0) publish(flag + block_index() * 4, uint32_t(i));
    if (thread_index() < blocks && !await(flag + thread_index() * 4, uint32_t(i))) return;
    sync_block();
  }
}

// What a launch of all blocks offers by itself.
__global__ void grid_barrier(int rounds, int, uint32_t*) {
  for (int i = 0; i < rounds; ++i) cooperative_groups::this_grid().sync();
}

constexpr size_t kBytes = 1 << 16;  // of what all blocks write

using KernelFunction = void (*)(int, int, uint32_t*);

float milliseconds(KernelFunction kernel, int blocks, bool cluster, int rounds, uint32_t* flag) {
  cudaEvent_t start, end;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&end));
  check(cudaMemset(flag, 0xff, kBytes));
  cudaLaunchAttribute attribute{};
  if (cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(blocks), 1, 1};
    if (blocks > kPortableCluster)
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed,
                                 1));
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = 1024;
  config.attrs = &attribute;
  config.numAttrs = 1;
  void* arguments[] = {&rounds, &blocks, &flag};
  check(cudaEventRecord(start));
  check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments));
  check(cudaEventRecord(end));
  check(cudaDeviceSynchronize());
  float ms = 0;
  check(cudaEventElapsedTime(&ms, start, end));
  return ms;
}

// The time of a round: many rounds less few, so that the launch does not count; the best of a few runs.
void measure(const char* name, KernelFunction kernel, int blocks, bool cluster, uint32_t* flag) {
  constexpr int kFew = 1000, kMany = 11000;
  float best = 1e9f;
  for (int run = 0; run < 5; ++run) {
    const float few = milliseconds(kernel, blocks, cluster, kFew, flag);
    const float many = milliseconds(kernel, blocks, cluster, kMany, flag);
    if (many - few < best) best = many - few;
  }
  std::printf("{\"round\": \"%s\", \"blocks\": %d, \"us\": %.3f}\n", name, blocks, best * 1e3f / (kMany - kFew));
}

}  // namespace

int main() {
  uint32_t* flag;
  check(cudaMalloc(&flag, kBytes));
  int major = 0, multiprocessors = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  if (major >= 9) {
    for (int blocks : {2, 4, 8, 16}) {
      measure("cluster barrier", cluster_barrier, blocks, true, flag);
      measure("transactions", transactions, blocks, true, flag);
    }
  }
  for (int blocks : {8, 16, 32, 64, multiprocessors}) {
    measure("vectors", vectors, blocks, false, flag);
    measure("flags", flags, blocks, false, flag);
    measure("grid barrier", grid_barrier, blocks, false, flag);
  }
  return 0;
}
