// The code of the cells whose products are normalised, for one instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/normed_backward.h"
#include "cpu/normed_forward.h"

namespace rnn::cpu::RNN_ISA {

template <class Cell, class IO>
constexpr CellKernels<IO> kernels_of_normed() {
  using Backward = NormedBackwardCells<Cell, IO>;
  using Forward = NormedForwardCells<Cell, IO>;
  return {CellSizes::of(Cell{}),
          nullptr,
          nullptr,
          nullptr,
          nullptr,
          {Forward::cells, Forward::emit, Backward::emit, Backward::cells}};
}

}  // namespace rnn::cpu::RNN_ISA
