// The product inside the loop: rows times a packed panel of weights, one register tile after another.
// Knows sizes and memory, no gate by name.
#pragma once

#include "cpu/product.h"
#if defined(RNN_AMX)
#include "cpu/tiles.h"
#endif

namespace rnn::cpu::RNN_ISA {

constexpr int64_t kPanelBytes = 32 << 10;  // of a panel that stay in L1 while one tile of rows after another uses it

// out [rows, w.width()] = a [rows, w.depth()] * one panel, a few rows at a time. A row that is not active(row) has no
// product, and is zero, whatever the weights: zero times infinity would not be. Register tiles that have one height
// overlap where it does not divide the rows. K is not split then, or rows in two of them would be added up twice.
template <class T, class Active>
void multiply(const Panels<T>& w, int64_t tile, const T* a, int64_t row_stride, int64_t rows, Arithmetic<T>* out,
              Active&& active) {
  const int vectors = w.gates * w.vectors, width = w.width();
  constexpr int kLanes = Panels<T>::kLanes;
  constexpr int64_t kStep = Panels<T>::kStep;
  const int64_t depth = w.depth(), each = Products<T>::tile_rows(rows, vectors);
  const bool overlap = Products<T>::kOneHeight && rows % each != 0;
  const int64_t part = rows > each && !overlap ? kPanelBytes / (width * int64_t(sizeof(T))) / kStep * kStep : depth;
  int64_t k = 0;
  do {
    const int64_t K = depth - k < part ? depth - k : part;
    for (int64_t r = 0; r < rows; r += each) {
      const int64_t first = overlap && rows - r < each ? rows - each : r;
      const int n = int(rows - first < each ? rows - first : each);
      int idle = 0;
      for (int i = 0; i < n; ++i) idle += !active(first + i);
      if (idle < n) {
        const Product<T> f = vectors == 1   ? Products<T>::template of<1>(n)
                             : vectors == 2 ? Products<T>::template of<2>(n)
                             : vectors == 3 ? Products<T>::template of<3>(n)
                                            : Products<T>::template of<4>(n);
        const int64_t t = r / each;
        f(a + first * row_stride + k, row_stride, w.panel(tile) + k * width, K, k > 0, out + first * width,
          w.panel(tile) + (t < vectors ? (k + K) * width + t * K * kLanes : k * width));
      }
      for (int i = 0; idle > 0 && i < n; ++i)
        if (!active(first + i)) std::memset(out + (first + i) * width, 0, width * sizeof(Arithmetic<T>));
    }
    k += K;
  } while (k < depth);
}

}  // namespace rnn::cpu::RNN_ISA
