// How torch lets float32 be multiplied.
#pragma once

#include <ATen/Context.h>
#include <c10/core/ScalarType.h>

namespace rnn {

// Whether products of this type may run as TF32: those of float32, where torch's setting of recurrent layers says so.
// That is torch.backends.cudnn.rnn.fp32_precision, or what stands above it; cudnn.allow_tf32 sets it too. The question
// names the operator, since the one without raises as soon as convolutions and recurrent layers differ.
inline bool tf32_allowed(at::ScalarType type) {
  return type == at::kFloat && at::globalContext().allowTF32CuDNN(at::Float32Op::RNN);
}

}  // namespace rnn
