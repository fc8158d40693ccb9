// A single step of one direction, as cells and decoders take it: weights are read where they lie, since packing them
// pays only from the second step on. The arithmetic is that of the loops, the same cells on the same vectors.
#pragma once

#include <utility>

#include "common/layout.h"
#include "cpu/kernels.h"
#include "cpu/math.h"

namespace rnn::cpu::RNN_ISA {

// Lane l is the sum over all lanes of v[l]; v is used up.
template <class V, size_t... l>
V sums_of(V* v, std::index_sequence<l...>) {
  for (int n = V::kLanes; n > 1; n /= 2) {
    for (int i = 0; i < n / 2; ++i) {
      const auto a = v[2 * i].v, b = v[2 * i + 1].v;
      v[i] = V(__builtin_shufflevector(a, b, int(2 * l)...)) + V(__builtin_shufflevector(a, b, int(2 * l + 1)...));
    }
  }
  return v[0];
}

template <class IO>
struct Single {
  using T = Arithmetic<IO>;
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;

  static int left(int64_t n, int64_t i) { return n - i < kLanes ? int(n - i) : kLanes; }

  static V load_or_zero(const IO* p, int64_t offset, int n) { return p ? load(p + offset, n) : V(T(0)); }

  // The products of x [K] with kLanes rows of w [rows, K], of which `rows` exist.
  static V dots(const IO* x, const IO* w, int64_t K, int rows) {
    V sum[kLanes];
    const IO* row[kLanes];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) {
      sum[l] = V(T(0));
      row[l] = w + (l < rows ? l : rows - 1) * K;
    }
    int64_t k = 0;
    for (; k + kLanes <= K; k += kLanes) {
      const V a = load(x + k);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) sum[l] += a * load(row[l] + k);
    }
    if (k < K) {
      const V a = load(x + k, int(K - k));
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) sum[l] += a * load(row[l] + k, int(K - k));
    }
    return sums_of(sum, std::make_index_sequence<kLanes>());
  }

  // out [R] += a [K] * w [K, R], from column first to last.
  static void add_columns(const T* a, const IO* w, int64_t K, int64_t R, int64_t first, int64_t last, IO* out) {
    int64_t i = first;
    for (; i + kColumns * kLanes <= last; i += kColumns * kLanes) columns<kColumns>(a, w, K, R, i, kLanes, out);
    for (; i < last; i += kLanes) columns<1>(a, w, K, R, i, int(last - i < kLanes ? last - i : kLanes), out);
  }

 private:
  static constexpr int kColumns = 8;  // vectors at a time: enough to hide the latency of an addition

  template <int N>
  static void columns(const T* a, const IO* w, int64_t K, int64_t R, int64_t i, int n, IO* out) {
    V sum[N];
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) sum[u] = load(out + i + u * kLanes, n);
    for (int64_t k = 0; k < K; ++k) {
      const V x(a[k]);
#pragma GCC unroll 8
      for (int u = 0; u < N; ++u) sum[u] += x * load(w + k * R + i + u * kLanes, n);
    }
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) store(out + i + u * kLanes, sum[u], n);
  }
};

template <class Cell, class IO>
void forward_step(const Forward<IO>& p, const IO* hidden, int64_t first, int64_t last) {
  using S = Single<IO>;
  using V = typename S::V;
  const int64_t H = p.seq.H;
  for (int64_t b = 0; b < p.seq.B; ++b) {
    for (int64_t i = first; i < last; i += S::kLanes) {
      const int n = S::left(H, i);
      const int64_t at = b * H + i;
      V gx[Cell::G], gh[Cell::G], prev[Cell::S], next[Cell::S], saved[Cell::K + 1];
      for (int g = 0; g < Cell::G; ++g) {
        const int64_t row = g * H + i, gate = b * Cell::G * H + row;
        gx[g] = hidden ? load(p.gx + gate, n) : S::dots(p.x, p.w_ih[0] + row * p.I, p.I, n);
        gh[g] = hidden ? load(hidden + gate, n) : S::dots(p.h0, p.w_hh[0] + row * H, H, n);
        gx[g] += S::load_or_zero(p.b_ih[0], row, n);
        gh[g] += S::load_or_zero(p.b_hh[0], row, n);
      }
      prev[0] = load(p.h0 + at, n);
      if constexpr (Cell::S > 1) prev[1] = load(p.c0 + at, n);

      Cell::forward(gx, gh, prev, next, saved);

      store(p.y + at, next[0], n);
      store(p.h_n + at, next[0], n);
      if constexpr (Cell::S > 1) {
        store(p.c_n + at, next[1], n);
        if (p.c) store(p.c + at, next[1], n);
      }
      for (int k = 0; p.saved && k < Cell::K; ++k) store(p.saved + (b * Cell::K + k) * H + i, saved[k], n);
    }
  }
}

template <class Cell, class IO>
void backward_step(const Backward<IO>& p, Arithmetic<IO>* dgh, int64_t first, int64_t last) {
  using S = Single<IO>;
  using V = typename S::V;
  const int64_t H = p.seq.H;
  for (int64_t b = 0; b < p.seq.B; ++b) {
    for (int64_t i = first; i < last; i += S::kLanes) {
      const int n = S::left(H, i);
      const int64_t at = b * H + i;
      V saved[Cell::K + 1], prev[Cell::S], next[Cell::S], dnext[Cell::S], dprev[Cell::S], dgates[2][Cell::G];
      for (int k = 0; k < Cell::K; ++k) saved[k] = load(p.saved + (b * Cell::K + k) * H + i, n);
      prev[0] = load(p.h0 + at, n);
      next[0] = load(p.y + at, n);
      dnext[0] = S::load_or_zero(p.dy, at, n) + S::load_or_zero(p.dh_n, at, n);
      if constexpr (Cell::S > 1) {
        prev[1] = load(p.c0 + at, n);
        next[1] = load(p.c + at, n);
        dnext[1] = S::load_or_zero(p.dc, at, n) + S::load_or_zero(p.dc_n, at, n);
      }

      Cell::backward(saved, prev, next, dnext, dgates[0], dgates[1], dprev);

      if (p.dh0) store(p.dh0 + at, dprev[0], n);
      if constexpr (Cell::S > 1) {
        if (p.dc0) store(p.dc0 + at, dprev[1], n);
      }
      IO* out = p.dgates + b * (Cell::G + Cell::A) * H + i;
      for (int g = 0; g < Cell::G; ++g) {
        store(out + g * H, dgates[0][g], n);
        store(dgh + (b * Cell::G + g) * H + i, dgates[1][g], n);
      }
      for (int a = 0; a < Cell::A; ++a) store(out + (Cell::G + a) * H, dgates[1][Cell::G - Cell::A + a], n);
    }
  }
}

}  // namespace rnn::cpu::RNN_ISA
