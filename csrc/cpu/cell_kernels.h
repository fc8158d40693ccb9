// A cell's own code for one instruction set: all that is compiled anew for another cell.
#pragma once

#include "cpu/backward_cells.h"
#include "cpu/forward_cells.h"
#include "cpu/kernels.h"
#include "cpu/step.h"
#include "cpu/tangent_units.h"

namespace rnn::cpu::RNN_ISA {

template <class Cell, class IO>
constexpr CellKernels<IO> kernels_of() {
  CellKernels<IO> found{CellSizes::of(Cell{}), ForwardCells<Cell, IO>::cells, BackwardCells<Cell, IO>::cells,
                        forward_step<Cell, IO>, backward_step<Cell, IO>};
  if constexpr (contains<Cell>(AllCells{}) && sizeof(IO) > 2) {
    found.forward_tangents = ForwardCells<Cell, IO, ForwardTangentUnit<Cell, IO>>::cells;
    found.backward_record = BackwardCells<Cell, IO, RecordingUnit<Cell, IO>>::cells;
    found.backward_tangents = BackwardCells<Cell, IO, BackwardTangentUnit<Cell, IO>>::cells;
  }
  return found;
}

}  // namespace rnn::cpu::RNN_ISA
