// The product inside the loop: rows times a packed panel of weights, one register tile after another.
// Knows sizes and memory, no gate by name.
#pragma once

#include "cpu/product.h"
#if defined(RNN_AMX)
#include "cpu/tiles.h"
#endif

namespace rnn::cpu::RNN_ISA {

constexpr int64_t kPanelBytes = 32 << 10;  // of a panel that stay in L1 while one tile of rows after another uses it

// K values of `columns` columns of a panel as products take them.
template <class T, class W>
void widen_panel(const W* from, int columns, int64_t K, T* to) {
  constexpr int kLanes = Panels<T, W>::kLanes, kGroup = Panels<T, W>::kGroup;
  const int width = columns * kLanes;
  for (int64_t i = 0; i < K; i += kGroup, to += kGroup * width)
    for (int n = 0; n < columns; ++n, from += kGroup * kLanes)
      for (int j = 0; j < kGroup; ++j) store(to + j * width + n * kLanes, load_narrow(from, j));
}

template <class T, class W>
Product<T, W> product_of(int vectors, int rows) {
  using P = Products<T, W>;
  return vectors == 1   ? P::template of<1>(rows)
         : vectors == 2 ? P::template of<2>(rows)
         : vectors == 3 ? P::template of<3>(rows)
                        : P::template of<4>(rows);
}

// Of out [rows, w.width()] = a [rows, w.depth()] * one panel the columns of one part, a few rows at a time. Where
// `active` is given, a row that it does not name has no product, and is zero, whatever the weights: zero times infinity
// would not be. `after` is the panel that comes next, which is fetched meanwhile. Register tiles that have one height
// overlap where it does not divide the rows. K is not split then, or rows in two of them would be added up twice.
//
// Narrow weights are widened in registers. Where these are few, and more than two tiles of rows use a panel, that takes
// longer than to widen it once for all of them, to L1.
template <class T, class W>
RNN_HD void multiply_part(const Panels<T, W>& w, int64_t tile, const typename Panels<T, W>::Part& columns,
                          const W* after, const T* a, int64_t row_stride, int64_t rows, Arithmetic<T>* out,
                          const bool* active) {
  using Own = Panels<T, W>;
  const int vectors = columns.columns, width = columns.width(), stride = w.width();
  out += columns.first * Own::kLanes;
  constexpr int64_t kStep = Own::kStep;
  constexpr bool kMayWiden = Own::kNarrow && kWidensInFew;
  const bool widens = kMayWiden && rows > 2 * max_narrow_rows(vectors);
  const int64_t each = widens ? Products<T>::tile_rows(rows, vectors) : Products<T, W>::tile_rows(rows, vectors);
  const int64_t depth = w.depth();
  const bool overlap = rows > each && rows % Products<T, W>::kHeight != 0;
  const int64_t value = widens ? sizeof(T) : sizeof(W);
  const int64_t part = rows > each && !overlap ? kPanelBytes / (width * value) / kStep * kStep : depth;
  alignas(64) T wide[kMayWiden ? kPanelBytes / sizeof(T) : 1];
  int64_t k = 0;
  do {
    const int64_t K = depth - k < part ? depth - k : part;
    const W* here = w.panel(tile, columns) + k * width;
    const W* ahead = k + K < depth ? here + K * width : after;
    if constexpr (kMayWiden) {
      if (widens) widen_panel(here, vectors, K, wide);
    }
    for (int64_t r = 0; r < rows; r += each) {
      const int n = int(rows - r >= each ? each : Products<T, W>::rest_rows(rows - r, each));
      const int64_t first = rows - r < n ? rows - n : r;
      int idle = 0;
      for (int i = 0; active && i < n; ++i) idle += !active[first + i];
      if (idle < n) {
        const auto run = [&]<class Q>(const Q* panel, const Q* fetched) {
          product_of<T, Q>(vectors, n)(a + first * row_stride + k, row_stride, panel, K, k > 0, out + first * stride,
                                       stride, {fetched, Own::kLanes * int64_t(sizeof(Q))});
        };
        const int64_t t = r / each;
        if (widens) {
          run(wide, wide);
        } else {
          run(here, t < vectors ? ahead + t * K * Own::kLanes : here);
        }
      }
      for (int i = 0; idle > 0 && i < n; ++i)
        if (!active[first + i]) std::memset(out + (first + i) * stride, 0, width * sizeof(Arithmetic<T>));
    }
    k += K;
  } while (k < depth);
}

// All of it; `next` is the tile whose turn comes then. Not inlined: a loop has several products, and they would be most
// of its code.
template <class T, class W>
__attribute__((noinline)) void multiply(const Panels<T, W>& w, int64_t tile, int64_t next, const T* a,
                                        int64_t row_stride, int64_t rows, Arithmetic<T>* out, const bool* active) {
  using Own = Panels<T, W>;
  const int width = w.width(), used = w.columns_of(tile) * Own::kLanes;
  for (int i = 0; i < w.parts(); ++i) {
    const W* after = i + 1 < w.parts() ? w.panel(tile, w.part(tile, i + 1)) : w.panel(next);
    multiply_part(w, tile, w.part(tile, i), after, a, row_stride, rows, out, active);
  }
  if constexpr (Own::kScaled) {
    for (int64_t r = 0; r < rows; ++r) {
      T* row = out + r * width;
      for (int64_t i = 0; (!active || active[r]) && i < used; i += Own::kLanes)
        store(row + i, load(row + i) * load(w.scales + tile * width + i));
    }
  }
}

}  // namespace rnn::cpu::RNN_ISA
