// What a launch of a persistent kernel is given, beside its plan.
#pragma once

#include <vector>

#include "common/layout.h"

namespace rnn::cuda {

// A layer, or those of a stack that run at the same time as a pipeline: each has the one before it as its upstream.
// Masks are factors of y on its way to the next layer (dropout).
template <class IO>
struct ForwardStage : Forward<IO> {
  // Where the layer below is the upstream, x is its y.
  const IO* mask_below;  // [T, B, H] or null
};
template <class IO>
using ForwardStages = std::vector<ForwardStage<IO>>;

template <class IO>
struct BackwardStage : Backward<IO> {
  double* all_dh;  // [T, B, D, H] or null: the whole gradient of every h
  // Where the layer above is the upstream:
  const IO* dgates_above;  // [T, B, 1, (G+A)*H]
  const IO* w_ih_above;    // [G*H, H]
  const IO* mask_above;    // [T, B, H] or null
};
template <class IO>
using BackwardStages = std::vector<BackwardStage<IO>>;

// Where a launch finds what it exchanges, and which rows it begins with.
struct Part {
  char* global;
  int64_t first_row;
  uint64_t* fault = nullptr;  // where a kernel records that it has waited in vain: see fault.h
};

}  // namespace rnn::cuda
