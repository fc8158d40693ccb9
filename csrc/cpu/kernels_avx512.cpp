// Kernels for x86-64 processors with AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#include "cpu/system_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif

#define RNN_ISA avx512
#define RNN_ISA_NAME "avx512"
#define RNN_VECTOR_BYTES 64
#include "cpu/kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
