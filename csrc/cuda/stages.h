// What a launch of a persistent kernel is given, beside its plan.
#pragma once

#include <vector>

#include "common/layout.h"

namespace rnn::cuda {

// A layer, or those of a stack that run at the same time, each fed by the one before it. The x of a fed layer is y of
// the one below it.
template <class IO>
using ForwardStages = std::vector<Forward<IO>>;

template <class IO>
struct BackwardStage : Backward<IO> {
  double* all_dh;          // [T, B, D, H] or null: the whole gradient of every h
  const IO* dgates_above;  // [T, B, 1, (G+A)*H] of the layer above, where that feeds this one
  const IO* w_ih_above;    // [G*H, H]
};
template <class IO>
using BackwardStages = std::vector<BackwardStage<IO>>;

// Where a launch finds what it exchanges, and which rows it begins with.
struct Part {
  char* global;
  int64_t first_row;
};

}  // namespace rnn::cuda
