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
    for (int64_t k0 = 0; k0 < K; k0 += kLanes) {
      const int n = K - k0 < kLanes ? int(K - k0) : kLanes;
      T* out = panel(tile) + k0 * width();
      for (int column = 0; column < width(); column += kLanes) {
        const int64_t unit = tile * tile_units() + column % (vectors * kLanes);
        const IO* rows = w + (column / kLanes / vectors * units + unit) * K + k0;
        Vec<T> block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = unit + i < units ? load(rows + i * K, n) : Vec<T>(T(0));
        transpose(block);
        for (int k = 0; k < n; ++k) store(out + k * width() + column, block[k]);
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
void product(const T* a, int64_t row_stride, const T* panel, int64_t K, bool continues, T* out, const T* ahead) {
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
    __builtin_prefetch(ahead + k * kLanes, 0, 2);
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
using Product = void (*)(const T*, int64_t, const T*, int64_t, bool, T*, const T*);

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

constexpr int64_t kPanelBytes = 32 << 10;  // of a panel that stay in L1 while one tile of rows after another uses it

// out [rows, w.width()] = a [rows, K] * one panel, a few rows at a time. Where none of those is active(row), there is
// no product, and they are zero.
template <class T, class Active>
void multiply(const Panels<T>& w, int64_t tile, const T* a, int64_t row_stride, int64_t rows, T* out, Active&& active) {
  const int vectors = w.gates * w.vectors, width = w.width();
  constexpr int kLanes = Vec<T>::kLanes;
  const int64_t each = tile_rows(rows, vectors);
  const int64_t part = rows > each && w.K > 0 ? kPanelBytes / (width * int64_t(sizeof(T))) : w.K;
  int64_t k = 0;
  do {
    const int64_t K = w.K - k < part ? w.K - k : part;
    for (int64_t r = 0; r < rows; r += each) {
      const int n = int(rows - r < each ? rows - r : each);
      bool any = false;
      for (int i = 0; i < n && !any; ++i) any = active(r + i);
      if (any) {
        const Product<T> f = vectors == 1   ? product_of<T, 1>(n)
                             : vectors == 2 ? product_of<T, 2>(n)
                             : vectors == 3 ? product_of<T, 3>(n)
                                            : product_of<T, 4>(n);
        const int64_t t = r / each;
        f(a + r * row_stride + k, row_stride, w.panel(tile) + k * width, K, k > 0, out + r * width,
          w.panel(tile) + (t < vectors ? (k + K) * width + t * K * kLanes : k * width));
      } else if (k == 0) {
        for (int64_t i = 0; i < n * width; ++i) out[r * width + i] = T(0);
      }
    }
    k += K;
  } while (k < w.K);
}

}  // namespace rnn::cpu::RNN_ISA
