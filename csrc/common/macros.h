// The one place that knows how a function is marked for host and device.
#pragma once

#if defined(__CUDACC__)
#define RNN_HD __host__ __device__ __forceinline__
#else
#define RNN_HD inline __attribute__((always_inline))
#endif
