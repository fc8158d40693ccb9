// Conversions of the storage types of 16 bits on the GPU: the only place that knows the toolkit's types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/scalar.cuh"

namespace rnn::cuda {

template <>
struct Storage<BFloat16> {
  static RNN_HD float read(BFloat16 x) { return __bfloat162float(__nv_bfloat16_raw{x.bits}); }
  static RNN_HD BFloat16 write(float x) { return {static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x}; }
};

template <>
struct Storage<Float16> {
  static RNN_HD float read(Float16 x) { return __half2float(__half_raw{x.bits}); }
  static RNN_HD Float16 write(float x) { return {static_cast<__half_raw>(__float2half_rn(x)).x}; }
};

}  // namespace rnn::cuda
