// The product of one register tile: a few rows times a packed panel of weights, accumulated in vector registers.
#pragma once

#include "cpu/panels.h"

namespace rnn::cpu::RNN_ISA {

// What one instruction takes of a factor: a value, or as many neighbours along K as stand beside each other in a panel.
template <class T>
struct Term {
  using V = Vec<T>;
  V v;
  RNN_HD static Term columns(const T* panel, int) { return {load(panel)}; }
  template <class W>
  RNN_HD static Term columns(const W* panel, int j) {
    return {load_narrow(panel, j)};
  }
  RNN_HD static Term everywhere(const T* a) { return {V(*a)}; }
  friend RNN_HD void add(V& sum, Term a, Term b) { sum += a.v * b.v; }
};
#if defined(RNN_BFLOAT16) && !defined(RNN_AMX)
template <>
struct Term<BFloat16> {
  __m512bh v;
  RNN_HD static Term columns(const BFloat16* panel, int) {
    Term all;
    std::memcpy(&all.v, panel, sizeof all.v);
    return all;
  }
  RNN_HD static Term everywhere(const BFloat16* a) {
    int pair;
    std::memcpy(&pair, a, sizeof pair);
    return {reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair))};
  }
  friend RNN_HD void add(Vec<float>& sum, Term a, Term b) {
    sum.v = reinterpret_cast<Vec<float>::Data>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum.v), a.v, b.v));
  }
};
#endif

// What a product fetches meanwhile for those behind it: with each value of K one line, so many bytes behind the last.
struct Ahead {
  const void* first;
  int64_t stride;
};

// out [M, N*lanes] = a [M, K] * panel [K, N*lanes], or out += where it continues; a transposed one is [K, M]. Strides
// are those of rows. One accumulator per output and one order of additions, whatever M and however K is split: a row's
// result does not depend on its batch.
template <class T, int M, int N, class W = T, bool kTransposed = false>
void product(const T* a, int64_t row_stride, const W* panel, int64_t K, bool continues, Arithmetic<T>* out,
             int64_t out_stride, Ahead ahead) {
  using V = Vec<Arithmetic<T>>;
  constexpr int kLanes = V::kLanes, kGroup = Panels<T, W>::kGroup;
  V sum[M][N];
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) sum[m][n] = continues ? load(out + m * out_stride + n * kLanes) : V(0);
  constexpr int kParts = Panels<T, W>::kNarrow ? kGroup : 1;  // terms that a lane holds
  for (int64_t k = 0; k < K; k += kGroup) {
    __builtin_prefetch(static_cast<const char*>(ahead.first) + k * ahead.stride, 0, 2);
#pragma GCC unroll 4
    for (int j = 0; j < kParts; ++j) {
      Term<T> w[N];
#pragma GCC unroll 32
      for (int n = 0; n < N; ++n) w[n] = Term<T>::columns(panel + (k * N + n * kGroup) * kLanes, j);
#pragma GCC unroll 32
      for (int m = 0; m < M; ++m) {
        const Term<T> x = Term<T>::everywhere(kTransposed ? a + k * row_stride + m : a + m * row_stride + k + j);
#pragma GCC unroll 32
        for (int n = 0; n < N; ++n) add(sum[m][n], x, w[n]);
      }
    }
  }
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) store(out + m * out_stride + n * kLanes, sum[m][n]);
}

// The accumulators fill three quarters of the vector registers.
constexpr int kRegisters = RNN_VECTOR_BYTES == 64 ? 32 : 16;
constexpr int max_rows(int vectors) { return kRegisters * 3 / 4 / vectors; }
// Half of them, where they are few and some are needed to widen weights in.
constexpr bool kWidensInFew = kRegisters < 32;
constexpr int max_narrow_rows(int vectors) { return kWidensInFew ? kRegisters / 2 / vectors : max_rows(vectors); }
constexpr int kMaxRows = 8;

template <class T, class W = T>
using Product = void (*)(const T*, int64_t, const W*, int64_t, bool, Arithmetic<T>*, int64_t, Ahead);

// The products of one register tile.
template <class T, class W = T>
struct Products {
  static constexpr int kHeight = 1;             // rows that a product takes at least, without losing time
  static constexpr int64_t kBytesTogether = 0;  // of products that are computed before any is looked at

  // Rows of one register tile for `rows` rows in all: as even as the registers allow.
  static int64_t tile_rows(int64_t rows, int vectors) {
    const int64_t fit = std::is_same_v<T, W> ? max_rows(vectors) : max_narrow_rows(vectors);
    const int64_t most = fit < kMaxRows ? fit : kMaxRows;
    const int64_t tiles = (rows + most - 1) / most;
    return tiles ? (rows + tiles - 1) / tiles : 1;
  }

  // Rows of the last register tile, where `rest` are left, fewer than `each`.
  static int64_t rest_rows(int64_t rest, int64_t) { return rest; }

  template <int N>
  static Product<T, W> of(int rows) {
    static constexpr Product<T, W> table[] = {product<T, 1, N, W>, product<T, 2, N, W>, product<T, 3, N, W>,
                                              product<T, 4, N, W>, product<T, 5, N, W>, product<T, 6, N, W>,
                                              product<T, 7, N, W>, product<T, 8, N, W>};
    return table[rows - 1];
  }
};

#if !defined(RNN_AMX)
struct ProductScope {};  // around all products of one thread
#endif

}  // namespace rnn::cpu::RNN_ISA
