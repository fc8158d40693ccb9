// A cell's own code for one instruction set: all that is compiled anew for another cell.
#pragma once

#include "cpu/backward_cells.h"
#include "cpu/forward_cells.h"
#include "cpu/kernels.h"
#include "cpu/step.h"

namespace rnn::cpu::RNN_ISA {

template <class Cell, class IO>
constexpr CellKernels<IO> kernels_of() {
  return {CellSizes::of(Cell{}), ForwardCells<Cell, IO>::cells, BackwardCells<Cell, IO>::cells, forward_step<Cell, IO>,
          backward_step<Cell, IO>};
}

}  // namespace rnn::cpu::RNN_ISA
