// Runs a step for all units, on the CPU.
#pragma once

#include "cuda/pointwise.cuh"
#include "cuda/row_pair.h"
#include "cuda/step.h"
#include "simt/storage.h"

namespace rnn::cuda {

template <class Cell, class Step>
void in_turn(const Step& step) {
  const Sequence& q = sequence_of(step);
  if constexpr (of_rows<Step>()) {
    // Nor may a row count on another, or a part of one.
    for (int64_t n = q.D * q.rows() - 1; n >= 0; --n) {
      for (int k = kParts - 1; k >= 0; --k) step.template part<Cell>(Slot(q, n), k);
      for (int k = Step::template finishers<Cell>() - 1; k >= 0; --k) step.template finish<Cell>(Slot(q, n), k);
    }
  } else {
    // Last unit first: no unit may count on another of its launch.
    for (int64_t n = q.D * q.rows() - 1; n >= 0; --n)
      for (int64_t i = units_of(step) - 1; i >= 0; --i) step.template unit<Cell>(Slot(q, n), i);
  }
}

}  // namespace rnn::cuda
