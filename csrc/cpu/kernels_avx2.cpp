// Kernels for x86-64 processors with AVX2 and FMA.
#if defined(__x86_64__)
#include <omp.h>
#include <sched.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define RNN_ISA avx2
#define RNN_ISA_NAME "avx2"
#define RNN_VECTOR_BYTES 32
#include "cpu/kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
