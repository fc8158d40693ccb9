// Kernels for whatever the compiler targets by itself: SSE2 on x86-64, NEON on 64-bit Arm.
#include "cpu/system_headers.h"

#define RNN_ISA baseline
#define RNN_ISA_NAME "default"
#define RNN_VECTOR_BYTES 16
#include "cpu/kernels.inc"
