// The product inside the loop: a few rows times a packed panel of weights, accumulated in registers.
// Knows sizes and memory, no gate by name.
#pragma once

#include "cpu/vec.h"

namespace rnn::cpu::RNN_ISA {

// A weight matrix packed for the product: `tiles()` panels of [K, gates, vectors, lanes], each holding all gates of
// vectors * lanes neighbouring units, so that one panel times one row gives whole units. Units past the end are zero.
template <class T>
struct Panels {
  static constexpr int kLanes = Vec<T>::kLanes;
  T* data = nullptr;
  int64_t K = 0, units = 0;
  int gates = 1, vectors = 1;

  int width() const { return gates * vectors * kLanes; }  // columns of one panel
  int64_t tile_units() const { return vectors * kLanes; }
  int64_t tiles() const { return (units + tile_units() - 1) / tile_units(); }
  int64_t size() const { return tiles() * K * width(); }
  T* panel(int64_t tile) const { return data + tile * K * width(); }

  // Packs one tile of w [gates*units, K]: the product is row * w^T.
  template <class IO>
  void pack_transposed(const IO* w, int64_t tile) const {
    for (int64_t k0 = 0; k0 < K; k0 += kLanes) {  // one vector of each row of w per pass stays in L1
      const int n = K - k0 < kLanes ? int(K - k0) : kLanes;
      T* out = panel(tile) + k0 * width();
      for (int column = 0; column < width(); ++column) {
        const int gate = column / kLanes / vectors;
        const int64_t unit = tile * tile_units() + column % (vectors * kLanes);
        T row[kLanes] = {};
        if (unit < units) store(row, load(w + (gate * units + unit) * K + k0, n));
        for (int k = 0; k < n; ++k) out[k * width() + column] = row[k];
      }
    }
  }

  // Packs one tile of w [K, units]: the product is row * w.
  template <class IO>
  void pack(const IO* w, int64_t tile) const {
    T* to = panel(tile);
    for (int64_t k = 0; k < K; ++k) {
      for (int u = 0; u < vectors; ++u, to += kLanes) {
        const int64_t unit = tile * tile_units() + u * kLanes;
        const int64_t left = units - unit;
        const Vec<T> row = left <= 0 ? Vec<T>(T(0)) : load(w + k * units + unit, left < kLanes ? int(left) : kLanes);
        store(to, row);
      }
    }
  }
};

// out [M, N*lanes] = a [M, K] * panel [K, N*lanes], or out += where it continues. One accumulator per output and one
// order of additions, whatever M and however K is split: a row's result does not depend on its batch.
template <class T, int M, int N>
void product(const T* a, int64_t row_stride, const T* panel, int64_t K, bool continues, T* out) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  V sum[M][N];
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) sum[m][n] = continues ? load(out + (m * N + n) * kLanes) : V(T(0));
  for (int64_t k = 0; k < K; ++k) {
    V w[N];
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) w[n] = load(panel + (k * N + n) * kLanes);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      const V x(a[m * row_stride + k]);
#pragma GCC unroll 32
      for (int n = 0; n < N; ++n) sum[m][n] += x * w[n];
    }
  }
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) store(out + (m * N + n) * kLanes, sum[m][n]);
}

// The accumulators fill three quarters of the vector registers.
constexpr int kRegisters = RNN_VECTOR_BYTES == 64 ? 32 : 16;
constexpr int max_rows(int vectors) { return kRegisters * 3 / 4 / vectors; }
constexpr int kMaxVectors = 4;
constexpr int kMaxRows = 8;

template <class T>
using Product = void (*)(const T*, int64_t, const T*, int64_t, bool, T*);

template <class T, int N>
Product<T> product_of(int rows) {
  static constexpr Product<T> table[] = {product<T, 1, N>, product<T, 2, N>, product<T, 3, N>, product<T, 4, N>,
                                         product<T, 5, N>, product<T, 6, N>, product<T, 7, N>, product<T, 8, N>};
  return table[rows - 1];
}

// Rows of one register tile for `rows` rows in all: as even as the registers allow.
inline int64_t tile_rows(int64_t rows, int vectors) {
  const int64_t most = max_rows(vectors) < kMaxRows ? max_rows(vectors) : kMaxRows;
  const int64_t tiles = (rows + most - 1) / most;
  return tiles ? (rows + tiles - 1) / tiles : 1;
}

// Adds terms k0 to k1 of out [rows, panels.width()] = a [rows, K] * one panel; the first term overwrites.
template <class T>
void multiply(const Panels<T>& panels, int64_t tile, int64_t k0, int64_t k1, const T* a, int64_t row_stride, int rows,
              T* out) {
  const int vectors = panels.gates * panels.vectors;
  const Product<T> f = vectors == 1   ? product_of<T, 1>(rows)
                       : vectors == 2 ? product_of<T, 2>(rows)
                       : vectors == 3 ? product_of<T, 3>(rows)
                                      : product_of<T, 4>(rows);
  f(a + k0, row_stride, panels.panel(tile) + k0 * panels.width(), k1 - k0, k0 > 0, out);
}

}  // namespace rnn::cpu::RNN_ISA
