// Persistent kernels in the emulator, compiled once per storage type: that is most of the time of a build, and a
// library may lack some of the types.
#pragma once

#include "common/layout.h"
#include "cuda/plan.h"
#include "simt/machine.h"

namespace rnn::simt {

// A launch of a plan: what blocks exchange through, the rows it begins with, and who runs when.
struct Part {
  char* global;
  int64_t first_row;
  const Schedule& schedule;
};

template <class IO>
struct Kernels {
  Report (*forward)(int cell, const Forward<IO>& call, const cuda::Plan& plan, const Part& part);
  // all_dh: [T, B, D, H] or null.
  Report (*backward)(int cell, const Backward<IO>& call, double* all_dh, const cuda::Plan& plan, const Part& part);

  static inline const Kernels* compiled = nullptr;  // null where the library lacks the type
};

}  // namespace rnn::simt
