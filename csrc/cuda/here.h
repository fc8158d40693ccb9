// A Check of the current device for the kernels of a call. Not for the sources that nvcc compiles: each would make the
// kernels of all types.
#pragma once

#include "cuda/launch.h"

namespace rnn::cuda {

inline Check check_here(int cell, const Request& request) {
  const bool backward = request.backward;
  switch (request.precision) {
    case Precision::kBFloat16:
      return [=](const Plan& plan, int D) { return runs_here<BFloat16>(cell, backward, plan, D); };
    case Precision::kFloat16:
      return [=](const Plan& plan, int D) { return runs_here<Float16>(cell, backward, plan, D); };
    default:
      return [=](const Plan& plan, int D) { return runs_here<float>(cell, backward, plan, D); };
  }
}

}  // namespace rnn::cuda
