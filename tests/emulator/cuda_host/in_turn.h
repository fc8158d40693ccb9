// Runs a step for all units, on the CPU.
#pragma once

#include "cuda/step.h"
#include "simt/storage.h"

namespace rnn::cuda {

template <class Cell, class Step>
void in_turn(const Step& step) {
  const Sequence& q = step.sequence();
  // Last unit first: no unit may count on another of its launch.
  for (int64_t n = q.D * q.rows() - 1; n >= 0; --n)
    for (int64_t i = step.width() - 1; i >= 0; --i) step.template unit<Cell>(Slot(q, n), i);
}

}  // namespace rnn::cuda
