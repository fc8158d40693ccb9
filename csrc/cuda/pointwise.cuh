// Which units each thread of a launch takes: a warp 32 units of a row, a block a few rows. Nothing here needs a GPU.
#pragma once

#include <algorithm>

#include "cuda/step.h"

namespace rnn::cuda {

// Is this a step of rows (cuda/row_pair.h)?
template <class Step>
constexpr bool of_rows() {
  return requires { Step::kOfRow; };
}

struct PointwiseGrid {
  static constexpr int kUnits = 32, kRows = 4;  // of a block, whose threads stand in that order
  static constexpr int64_t kMaxY = 65535;       // along x, CUDA takes more blocks than memory has units for

  int64_t x, y;  // blocks along the units and along the rows; of a step of rows, one and along the rows

  // No blocks where there are no units.
  template <class Step>
  static PointwiseGrid of(const Step& step, int64_t max_y = kMaxY) {
    const Sequence& q = sequence_of(step);
    const int64_t x = of_rows<Step>() ? 1 : (units_of(step) + kUnits - 1) / kUnits,
                  y = (q.D * q.rows() + kRows - 1) / kRows;
    return x * y == 0 ? PointwiseGrid{0, 0} : PointwiseGrid{x, std::min(y, max_y)};
  }
};

// What the thread (thread_x, thread_y) of block (x, y) does; the stride covers the rows that a grid of the largest size
// leaves over.
template <class Cell, class Step>
RNN_HD void run_units(const Step& step, const PointwiseGrid& grid, int64_t x, int64_t y, int thread_x, int thread_y) {
  constexpr int kUnits = PointwiseGrid::kUnits, kRows = PointwiseGrid::kRows;
  const Sequence& q = sequence_of(step);
  const int64_t i = x * kUnits + thread_x;
  if (i >= units_of(step)) return;
  for (int64_t n = y * kRows + thread_y; n < q.D * q.rows(); n += grid.y * kRows)
    step.template unit<Cell>(Slot(q, n), i);
}

// The same of a step of rows, each a warp's; sync() waits for all threads of the block.
template <class Cell, class Step, class Sync>
RNN_HD void run_rows(const Step& step, const PointwiseGrid& grid, int64_t y, int thread_x, int thread_y, Sync&& sync) {
  constexpr int kRows = PointwiseGrid::kRows;
  const Sequence& q = sequence_of(step);
  for (int64_t first = y * kRows; first < q.D * q.rows(); first += grid.y * kRows) {
    const int64_t n = first + thread_y;
    const bool there = n < q.D * q.rows();
    if (there) step.template part<Cell>(Slot(q, n), thread_x);
    sync();
    if (there && thread_x < Step::template finishers<Cell>()) step.template finish<Cell>(Slot(q, n), thread_x);
  }
}

}  // namespace rnn::cuda
