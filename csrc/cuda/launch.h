// Launches persistent kernels on a GPU. The implementation is compiled by nvcc, one file per storage type.
#pragma once

#include "cuda/plan.h"
#include "cuda/pointwise.h"
#include "cuda/stages.h"

namespace rnn::cuda {

// The limits of the current device. Returns null, or what went wrong.
const char* query(Device& device);

// On the current device. Returns null, or what went wrong.
template <class IO>
const char* launch(int cell, const ForwardStages<IO>& stages, const Plan& plan, const Part& part, Stream stream);
template <class IO>
const char* launch(int cell, const BackwardStages<IO>& stages, const Plan& plan, const Part& part, Stream stream);

}  // namespace rnn::cuda
