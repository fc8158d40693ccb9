// Kernels for bfloat16 on x86-64 processors with AMX-BF16, AVX512-BF16 and AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#include "cpu/system_headers.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                            \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#endif

#define RNN_ISA amx
#define RNN_BFLOAT16
#define RNN_AMX
#define RNN_VECTOR_BYTES 64
#include "cpu/kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
