// Persistent kernels in the emulator, compiled once per storage type: that is most of the time of a build, and a
// library may lack some of the types.
#pragma once

#include "cuda/plan.h"
#include "cuda/stages.h"
#include "simt/machine.h"

namespace rnn::simt {

template <class IO>
struct Kernels {
  template <class Stages>
  using Run = Report (*)(int cell, const Stages& stages, const cuda::Plan& plan, const cuda::Part& part, int device,
                         const Schedule& schedule);
  Run<cuda::ForwardStages<IO>> forward;
  Run<cuda::BackwardStages<IO>> backward;

  static inline const Kernels* compiled = nullptr;  // null where the library lacks the type
};

}  // namespace rnn::simt
