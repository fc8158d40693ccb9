// A sum over the units of a row at one step, for whatever depends on a whole row: the bound of a gradient by its norm,
// the norms that are recorded. The threads of a row have some of its units each. So the sum takes two parts of a step:
//
//   1. whoever has units leaves what these contribute, as one or more parts;
//   2. after the next barrier everybody who needs the sum adds up the parts, in their order: the bits of the sum do not
//      depend on who comes first.
//
// The sum is of double: squares of float32 neither overflow nor vanish in it.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.h"

namespace rnn {

// Where the parts of some rows lie. This is a view: it is copied freely, and the memory is the backend's.
struct RowStatistic {
  char* memory;
  int64_t row_bytes, part_bytes;  // from one to the next
  int64_t parts;                  // of a row

  // Parts one after the other: memory [rows, parts].
  static RNN_HD RowStatistic dense(double* memory, int64_t parts) {
    constexpr int64_t bytes = int64_t(sizeof(double));
    return {reinterpret_cast<char*>(memory), parts * bytes, bytes, parts};
  }

  RNN_HD double& part(int64_t row, int64_t n) const {
    return *reinterpret_cast<double*>(memory + row * row_bytes + n * part_bytes);
  }

  RNN_HD double sum(int64_t row) const {
    double total = 0;
    for (int64_t n = 0; n < parts; ++n) total += part(row, n);
    return total;
  }
};

// What some numbers contribute to the mean and the variance of a row.
struct Moments {
  double mean, squares;  // the latter of what differs from that mean
};

// Of `vectors` vectors, whose k-th at(k, x) leaves in x; it returns how many lanes exist. V is the arithmetic type T or
// a vector of it, with first_lanes(x, n), which has zeros behind its first n lanes, and sum_of_lanes(x).
template <class T, class V, class At>
RNN_HD Moments moments_of(int64_t vectors, At&& at) {
  V sum(T(0)), squares(T(0)), x;
  int64_t count = 0;
  for (int64_t k = 0; k < vectors; ++k) {
    const int n = at(k, x);
    count += n;
    if (n > 0) sum += first_lanes(x, n);
  }
  const double mean = sum_of_lanes(sum) / double(count);
  const V middle{T(mean)};
  for (int64_t k = 0; k < vectors; ++k) {
    const int n = at(k, x);
    if (n > 0) squares += first_lanes((x - middle) * (x - middle), n);
  }
  return {mean, sum_of_lanes(squares)};
}

// By what a row is made to have mean 0 and variance 1.
struct Standard {
  double mean, scale;
};
template <class T, class V>
RNN_HD V standardized(V x, const Standard& by) {
  return (x - V(T(by.mean))) * V(T(by.scale));
}
// The gradient of what was standardised to x, from that of x. means: over the row, of these gradients, and of them
// times what they are of.
template <class T, class V>
RNN_HD V destandardized(V gradient, V x, const Standard& by, const T (&means)[2]) {
  return V(T(by.scale)) * (gradient - V(means[0]) - x * V(means[1]));
}

// Mean and variance of a row as a row statistic. Squares are of differences from the mean of their own part, so that
// nothing is lost where the mean is large.
struct RowMoments {
  RowStatistic means, squares;
  int64_t each, all;  // numbers of a part, of which the last may have fewer, and of a row; 0: dealt out one by one

  RNN_HD void put(int64_t row, int64_t part, const Moments& of) const {
    means.part(row, part) = of.mean;
    squares.part(row, part) = of.squares;
  }

  RNN_HD Standard standard(int64_t row, double epsilon) const {
    double mean = 0, squares_of_all = 0;
    for (int64_t k = 0; k < means.parts; ++k) mean += count(k) * means.part(row, k);
    mean /= double(all);
    for (int64_t k = 0; k < means.parts; ++k) {
      const double apart = means.part(row, k) - mean;
      squares_of_all += squares.part(row, k) + count(k) * (apart * apart);
    }
    return {mean, 1 / std::sqrt(squares_of_all / double(all) + epsilon)};
  }

 private:
  RNN_HD double count(int64_t part) const {
    if (each == 0) return double((all - part + means.parts - 1) / means.parts);
    const int64_t left = all - part * each;
    return double(left < each ? left : each);
  }
};

}  // namespace rnn
