// A stand-in for the CUDA runtime, to be linked with the objects that nvcc made of the kernels: every launch is held
// against what the device and the kernel's own resources allow, as a driver would, and written down; nothing runs.
//
// From the environment:
//   STAND_IN_DEVICE     major, multiprocessors, bytes of shared memory of a block, of a multiprocessor, most blocks of
//   a
//                       cluster; words
//   STAND_IN_RESOURCES  a file of lines: a kernel's symbol, its registers, its static shared memory
//   STAND_IN_LOG        a file that gets a line of JSON for every launch
//   STAND_IN_FAIL       FUNCTION CODE N: call number N of it, from 1, and all after it, return this error
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>

namespace {

constexpr int kRegisters = 65536, kThreads = 2048, kReserved = 1024;  // of a multiprocessor; bytes for each block
constexpr int kPortable = 8;

struct Kernel {
  std::string symbol;
  int registers = 0, fixed = 0;  // per thread; static shared memory
  int dynamic = 48 << 10;        // at most, unless asked for
  bool large_clusters = false;   // of more than the portable size
};

struct State {
  int major = 9, multiprocessors = 132, shared = 232448, all_shared = 233472, cluster = 16;
  std::map<std::string, std::pair<int, int>> resources;
  std::map<const void*, Kernel> kernels;
  std::string fail;
  int code = 0, from = 0;
  std::map<std::string, int> calls;
  cudaError_t last = cudaSuccess;
  std::map<int, std::string> texts;

  State() { configure(); }

  void configure() {
    fail.clear();
    calls.clear();
    last = cudaSuccess;
    if (const char* text = std::getenv("STAND_IN_DEVICE"))
      std::istringstream(text) >> major >> multiprocessors >> shared >> all_shared >> cluster;
    if (const char* text = std::getenv("STAND_IN_FAIL")) std::istringstream(text) >> fail >> code >> from;
    if (const char* path = std::getenv("STAND_IN_RESOURCES")) {
      std::ifstream file(path);
      std::string symbol;
      int registers = 0, fixed = 0;
      while (file >> symbol >> registers >> fixed) resources[symbol] = {registers, fixed};
    }
  }
};

State& state() {
  static State all;  // kernels are registered before main()
  return all;
}

cudaError_t left(cudaError_t error) {
  if (error != cudaSuccess) state().last = error;
  return error;
}

// The error that this call is to return, as asked for.
cudaError_t planted(const char* function) {
  State& s = state();
  const int n = ++s.calls[function];
  return function == s.fail && n >= s.from ? left(cudaError_t(s.code)) : cudaSuccess;
}

#define PLANTED(function) \
  if (const cudaError_t error = planted(#function); error != cudaSuccess) return error

struct Launch {
  dim3 grid, block;
  size_t dynamic = 0;
  int cluster = 1;
  bool cooperative = false;
};

// Blocks of this launch on one multiprocessor.
int resident(const Kernel& k, const Launch& l) {
  const int threads = int(l.block.x * l.block.y * l.block.z);
  const int registers = (k.registers + 7) / 8 * 8 * threads;
  const int64_t shared = int64_t(l.dynamic) + k.fixed + kReserved;
  return std::min(
      {kThreads / std::max(threads, 1), registers ? kRegisters / registers : 32, int(state().all_shared / shared)});
}

// What a driver would say of it.
cudaError_t checked(const Kernel& k, const Launch& l, std::string& why) {
  const State& s = state();
  const int64_t blocks = int64_t(l.grid.x) * l.grid.y * l.grid.z, threads = int64_t(l.block.x) * l.block.y * l.block.z;
  if (blocks == 0 || l.grid.y > 65535 || l.grid.z > 65535 || l.grid.x > 0x7fffffff)
    return why = "the grid", cudaErrorInvalidConfiguration;
  if (threads == 0 || threads > 1024) return why = "the block", cudaErrorInvalidConfiguration;
  if (int64_t(l.dynamic) > k.dynamic || int64_t(l.dynamic) + k.fixed > s.shared)
    return why = "shared memory that was not asked for, or is not there", cudaErrorInvalidValue;
  if (resident(k, l) == 0) return why = "registers", cudaErrorLaunchOutOfResources;
  if (l.cluster > 1) {
    if (s.major < 9) return why = "no clusters", cudaErrorNotSupported;
    if (blocks % l.cluster) return why = "clusters that do not divide the grid", cudaErrorInvalidClusterSize;
    if (l.cluster > s.cluster) return why = "the size of the cluster", cudaErrorInvalidClusterSize;
    if (l.cluster > kPortable && !k.large_clusters)
      return why = "a cluster of a size that was not asked for", cudaErrorInvalidClusterSize;
  }
  if (l.cooperative && blocks > int64_t(resident(k, l)) * s.multiprocessors)
    return why = "more blocks than run at the same time", cudaErrorCooperativeLaunchTooLarge;
  return cudaSuccess;
}

cudaError_t launched(const void* kernel, const Launch& l) {
  const auto found = state().kernels.find(kernel);
  if (found == state().kernels.end()) return left(cudaErrorInvalidDeviceFunction);
  std::string why;
  const cudaError_t error = checked(found->second, l, why);
  if (const char* path = std::getenv("STAND_IN_LOG")) {
    std::FILE* file = std::fopen(path, "a");
    std::fprintf(file,
                 "{\"kernel\": \"%s\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"dynamic\": %zu, \"cluster\": "
                 "%d, \"cooperative\": %d, \"registers\": %d, \"error\": %d, \"why\": \"%s\"}\n",
                 found->second.symbol.c_str(), l.grid.x, l.grid.y, l.grid.z, l.block.x, l.block.y, l.block.z, l.dynamic,
                 l.cluster, int(l.cooperative), found->second.registers, int(error), why.c_str());
    std::fclose(file);
  }
  return left(error);
}

Launch launch_of(const cudaLaunchConfig_t& config) {
  Launch l{config.gridDim, config.blockDim, config.dynamicSmemBytes, 1, false};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) l.cluster = int(config.attrs[i].val.clusterDim.x);
    if (config.attrs[i].id == cudaLaunchAttributeCooperative) l.cooperative = config.attrs[i].val.cooperative;
  }
  return l;
}

}  // namespace

extern "C" {

// Reads the environment anew, and counts calls from the start.
void stand_in_configure() { state().configure(); }

// --- What nvcc's objects call before main() ----------------------------------------------------

void** __cudaRegisterFatBinary(void* fat) { return static_cast<void**>(fat); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* symbol, int, void*, void*, void*, void*,
                            int*) {
  const auto found = state().resources.find(symbol);
  Kernel& kernel = state().kernels[host];
  kernel.symbol = symbol;
  if (found != state().resources.end()) kernel.registers = found->second.first, kernel.fixed = found->second.second;
}
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorInvalidValue; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorInvalidValue; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorInvalidValue; }

// --- What the host code of the kernels calls ---------------------------------------------------

cudaError_t cudaGetDevice(int* device) {
  PLANTED(cudaGetDevice);
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  PLANTED(cudaDeviceGetAttribute);
  const State& s = state();
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = s.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = s.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = s.shared;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      break;
    default:
      return left(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
  std::string& text = state().texts[error];
  text = "error " + std::to_string(int(error)) + " of the stand-in";
  return text.c_str();
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = state().last;
  state().last = cudaSuccess;
  return error;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  PLANTED(cudaFuncSetAttribute);
  const auto found = state().kernels.find(kernel);
  if (found == state().kernels.end()) return left(cudaErrorInvalidDeviceFunction);
  Kernel& k = found->second;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value + k.fixed > state().shared) return left(cudaErrorInvalidValue);
    k.dynamic = value;
  }
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) k.large_clusters = value;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  PLANTED(cudaFuncGetAttributes);
  const auto found = state().kernels.find(kernel);
  if (found == state().kernels.end()) return left(cudaErrorInvalidDeviceFunction);
  *attributes = {};
  attributes->numRegs = found->second.registers;
  attributes->sharedSizeBytes = size_t(found->second.fixed);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads,
                                                          size_t dynamic) {
  PLANTED(cudaOccupancyMaxActiveBlocksPerMultiprocessor);
  *blocks = resident(state().kernels[kernel], {dim3(1), dim3(unsigned(threads)), dynamic});
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  PLANTED(cudaOccupancyMaxActiveClusters);
  const Launch l = launch_of(*config);
  std::string why;
  const bool fits = checked(state().kernels[kernel], l, why) == cudaSuccess;
  *clusters = fits ? resident(state().kernels[kernel], l) * state().multiprocessors / l.cluster : 0;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  PLANTED(cudaLaunchKernelExC);
  return launched(kernel, launch_of(*config));
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t dynamic, cudaStream_t) {
  PLANTED(cudaLaunchKernel);
  return launched(kernel, {grid, block, dynamic});
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  PLANTED(cudaThreadExchangeStreamCaptureMode);
  return cudaSuccess;
}

// --- Memory and time, which are the host's -----------------------------------------------------

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  PLANTED(cudaMalloc);
  return left((*memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256)) ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  PLANTED(cudaHostAlloc);
  return left((*memory = std::malloc(bytes)) ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  PLANTED(cudaHostGetDevicePointer);
  *device = host;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  PLANTED(cudaMemcpy);
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  PLANTED(cudaMemsetAsync);
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  PLANTED(cudaDeviceSynchronize);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = nullptr;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

}  // extern "C"
