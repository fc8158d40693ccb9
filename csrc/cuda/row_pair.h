// Row statistics of the stepwise algorithm (common/row_statistic.h). A step of rows, beside those of units in step.h,
// is a struct that a launcher calls for every slot:
//
//   part<Cell>(slot, k)    by each of kParts threads, which have the numbers k, k + kParts, .. of the row;
//   finish<Cell>(slot, n)  by as many threads as finishers<Cell>() says, once all parts of the row are there.
//
// What a number of threads adds up has one order, and what it comes to is there for the next launch. Nothing here needs
// a GPU.
#pragma once

#include "common/normed.h"
#include "common/row_statistic.h"
#include "cuda/scalar.cuh"

namespace rnn::cuda {

constexpr int kParts = 32;  // a warp has a row

// One number at a time, as row_statistic.h asks for vectors.
template <class T>
RNN_HD Scalar<T> first_lanes(Scalar<T> x, int) {
  return x;
}
template <class T>
RNN_HD double sum_of_lanes(Scalar<T> x) {
  return double(x.v);
}

// Two statistics of every row that belong together: its mean and deviation, or two means.
struct RowPair {
  static constexpr int kDoubles = 2 * kParts + 2;

  double* memory;  // [slots, kDoubles]: parts of the one, parts of the other, and what they come to

  // Part k of what the n numbers of a row are standardised by.
  template <class IO>
  RNN_HD void measure(int64_t slot, int k, const IO* from, int64_t n) const {
    using T = Arithmetic<IO>;
    if (k >= n) return;
    moments(n).put(slot, k, moments_of<T, Scalar<T>>((n - k + kParts - 1) / kParts, [&](int64_t j, Scalar<T>& x) {
                     x = load(from + k + j * kParts);
                     return 1;
                   }));
  }
  RNN_HD void finish_measure(int64_t slot, int64_t n) const {
    const Standard by = moments(n).standard(slot, kNormEpsilon);
    found(slot)[0] = by.mean;
    found(slot)[1] = by.scale;
  }
  RNN_HD Standard standard(int64_t slot) const { return {found(slot)[0], found(slot)[1]}; }

  // Part k of the means over the n numbers of a row of gradients, and of them times what they are of; at(i, gradient,
  // x) has both.
  template <class T, class At>
  RNN_HD void add_up(int64_t slot, int k, int64_t n, At&& at) const {
    if (k >= n) return;
    Scalar<T> sums[2] = {T(0), T(0)}, gradient, x;
    for (int64_t i = k; i < n; i += kParts) {
      at(i, gradient, x);
      sums[0] += gradient;
      sums[1] += gradient * x;
    }
    for (int which = 0; which < 2; ++which) statistic(which, n).part(slot, k) = sums[which].v;
  }
  RNN_HD void finish_means(int64_t slot, int64_t n) const {
    for (int which = 0; which < 2; ++which) found(slot)[which] = statistic(which, n).sum(slot) / double(n);
  }
  template <class T>
  RNN_HD void means(int64_t slot, T (&to)[2]) const {
    for (int which = 0; which < 2; ++which) to[which] = T(found(slot)[which]);
  }

 private:
  RNN_HD double* found(int64_t slot) const { return memory + slot * kDoubles + 2 * kParts; }
  RNN_HD RowStatistic statistic(int which, int64_t n) const {
    constexpr int64_t bytes = sizeof(double);
    return {reinterpret_cast<char*>(memory + which * kParts), kDoubles * bytes, bytes, n < kParts ? n : kParts};
  }
  RNN_HD RowMoments moments(int64_t n) const { return {statistic(0, n), statistic(1, n), 0, n}; }
};

// Of each group of gates of a normed cell, and of what it emits.
struct RowNorms {
  RowPair hidden[2], state;
};

}  // namespace rnn::cuda
