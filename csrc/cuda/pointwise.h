// The kernels that follow the products, behind plain functions: neither torch's headers nor the CUDA toolkit's.
#pragma once

#include "cuda/step.h"

namespace rnn::cuda {

using Stream = void*;  // a cudaStream_t

// Launches a step for every unit, or every row, on a stream of the current device. Returns null, or what CUDA has to
// say against it. Defined for every step in step.h, normed_forward.h and normed_backward.h with every storage type in
// common/storage.h, float and double.
template <class Step>
const char* launch(int cell, const Step& step, Stream stream);

}  // namespace rnn::cuda
