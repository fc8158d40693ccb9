// Launches persistent kernels on a GPU. The implementation is compiled by nvcc, one file per storage type.
#pragma once

#include "common/layout.h"
#include "cuda/plan.h"
#include "cuda/pointwise.h"

namespace rnn::cuda {

// The limits of the current device. Returns null, or what went wrong.
const char* query(Device& device);

// Where a launch of a plan finds what it exchanges, and which rows it begins with.
struct Part {
  char* global;
  int64_t first_row;
};

// On the current device. Returns null, or what went wrong.
template <class IO>
const char* launch_forward(int cell, const Forward<IO>& call, const Plan& plan, const Part& part, Stream stream);
// all_dh: [T, B, D, H] or null.
template <class IO>
const char* launch_backward(int cell, const Backward<IO>& call, double* all_dh, const Plan& plan, const Part& part,
                            Stream stream);

}  // namespace rnn::cuda
