// Kernels for x86-64 processors with AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "cpu/system_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define RNN_ISA avx2
#define RNN_ISA_NAME "avx2"
#define RNN_VECTOR_BYTES 32
#include "cpu/kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
