// Sums over a row's units on the CPU: a part for each tile of units.
#pragma once

#include "common/row_statistic.h"
#include "cpu/arena.h"
#include "cpu/vec.h"

namespace rnn::cpu::RNN_ISA {

inline RowStatistic take_row_statistic(Arena& arena, int64_t rows, int64_t parts) {
  return RowStatistic::dense(arena.take<double>(rows * parts), parts);
}

inline RowMoments take_row_moments(Arena& arena, int64_t rows, int64_t parts, int64_t each, int64_t all) {
  return {take_row_statistic(arena, rows, parts), take_row_statistic(arena, rows, parts), each, all};
}

// The sum of all lanes.
template <class V>
double sum_of_lanes(V x) {
  alignas(64) decltype(x.v[0] + 0) part[V::kLanes];
  alignas(64) double sums[V::kLanes];
  store(part, x);
  for (int l = 0; l < V::kLanes; ++l) sums[l] = double(part[l]);
#pragma GCC unroll 4
  for (int n = V::kLanes / 2; n > 0; n /= 2)
    for (int l = 0; l < n; ++l) sums[l] += sums[l + n];
  return sums[0];
}

// Its first n lanes, and zeros.
template <class V>
V first_lanes(V x, int n) {
  if (n >= V::kLanes) return x;
  alignas(64) decltype(x.v[0] + 0) part[V::kLanes];
  store(part, x);
  for (int l = n; l < V::kLanes; ++l) part[l] = 0;
  return load(static_cast<const decltype(x.v[0] + 0)*>(part));
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
