// Sums over a row's units on the CPU: a part for each tile of units.
#pragma once

#include "common/row_statistic.h"
#include "cpu/arena.h"
#include "cpu/vec.h"

namespace rnn::cpu::RNN_ISA {

inline RowStatistic take_row_statistic(Arena& arena, int64_t rows, int64_t parts) {
  return RowStatistic::dense(arena.take<double>(rows * parts), parts);
}

// The squares of a tile's units, added up lane by lane and then over the lanes: one part.
template <class V>
class SumOfSquares {
  static constexpr int kLanes = V::kLanes;

 public:
  void add(V x, int n) {
    alignas(64) decltype(x.v[0] + 0) part[kLanes];
    store(part, x);
    for (int l = 0; l < n; ++l) lanes_[l] += double(part[l]) * double(part[l]);
  }
  double sum() const {
    double sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += lanes_[l];
    return sum;
  }

 private:
  double lanes_[kLanes] = {};
};

}  // namespace rnn::cpu::RNN_ISA
