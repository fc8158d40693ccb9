// A single step of one direction, as cells and decoders take it: weights are read where they lie, since packing them
// pays only from the second step on. The arithmetic is that of the loops, the same cells on the same vectors.
#pragma once

#include <utility>

#include "common/layout.h"
#include "cpu/kernels.h"
#include "cpu/unit.h"

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
struct Single : Lanes<IO> {
  using typename Lanes<IO>::T, typename Lanes<IO>::V;
  using Lanes<IO>::kLanes, Lanes<IO>::left, Lanes<IO>::load_or_zero;

  // The products of x [K] with kLanes rows of w [rows, K], of which `rows` exist. Not inlined: a cell has two of each
  // gate, and they would be most of its code.
  __attribute__((noinline)) static V dots(const IO* x, const IO* w, int64_t K, int rows) {
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

// Products of a few rows with weights that are read once, where they lie, for all of these rows.
template <class IO>
struct FewRows : Lanes<IO> {
  using typename Lanes<IO>::T, typename Lanes<IO>::V;
  using Lanes<IO>::kLanes;

  // out [B, N] = x [B, K] w^T of w [N, K], columns first to last. A row has the same bits in any batch.
  static void dots(const IO* x, int64_t B, const IO* w, int64_t N, int64_t K, int64_t first, int64_t last, IO* out) {
    constexpr int kRows = kLanes < 16 ? 2 : 4;
    if (B <= 2) return tiles<2>(x, B, w, N, K, first, last, out);
    tiles<kRows>(x, B, w, N, K, first, last, out);
  }

 private:
  // A sum for each lane: of so many rows of x with each of so many of w.
  template <int kRows>
  static void tiles(const IO* x, int64_t B, const IO* w, int64_t N, int64_t K, int64_t first, int64_t last, IO* out) {
    constexpr int kWeights = kLanes / kRows;
    for (int64_t i = first; i < last; i += kWeights) {
      const IO* columns[kWeights];
      const int width = int(least(last - i, kWeights));
      for (int j = 0; j < kWeights; ++j) columns[j] = w + (i + (j < width ? j : width - 1)) * K;
      for (int64_t b = 0; b < B; b += kRows) {
        const IO* rows[kRows];
        const int count = int(least(B - b, kRows));
        for (int r = 0; r < kRows; ++r) rows[r] = x + (b + (r < count ? r : count - 1)) * K;
        IO sums[kLanes];
        store(sums, tile<kRows, kWeights>(rows, columns, K));
        for (int r = 0; r < count; ++r) std::memcpy(out + (b + r) * N + i, sums + r * kWeights, width * sizeof(IO));
      }
    }
  }

  // Lane r * kWeights + j is the product of rows[r] and columns[j].
  template <int kRows, int kWeights>
  static V tile(const IO* const (&rows)[kRows], const IO* const (&columns)[kWeights], int64_t K) {
    V sum[kLanes];
#pragma GCC unroll 16
    for (V& one : sum) one = V(T(0));
    int64_t k = 0;
    for (; k + kLanes <= K; k += kLanes) {
      // The rows of w that are next: so many streams at once are more than the processor foresees.
#pragma GCC unroll 8
      for (int j = 0; j < kWeights; ++j) __builtin_prefetch(columns[j] + kWeights * K + k);
      add(sum, [&](const IO* from) { return load(from + k); }, rows, columns);
    }
    if (k < K) add(sum, [&](const IO* from) { return load(from + k, int(K - k)); }, rows, columns);
    return sums_of(sum, std::make_index_sequence<kLanes>());
  }

  template <int kRows, int kWeights, class Load>
  static __attribute__((always_inline)) void add(V (&sum)[kLanes], Load&& part, const IO* const (&rows)[kRows],
                                                 const IO* const (&columns)[kWeights]) {
    V a[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) a[r] = part(rows[r]);
#pragma GCC unroll 8
    for (int j = 0; j < kWeights; ++j) {
      const V b = part(columns[j]);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r * kWeights + j] += a[r] * b;
    }
  }
};

// The step of row b: it is there, and nothing is reset.
RNN_HD RowStep only_step(int64_t b) { return {b, true, false, false, 0, b}; }

template <class Cell, class IO>
void forward_step(const Forward<IO>& p, const IO* hidden, int64_t first, int64_t last) {
  using S = Single<IO>;
  const int64_t H = p.seq.H;
  for (int64_t b = 0; b < p.seq.B; ++b) {
    for (int64_t i = first; i < last; i += S::kLanes) {
      const int n = S::left(H, i);
      const int64_t at = b * H + i;
      ForwardUnit<Cell, IO> unit;
      for (int g = 0; g < Cell::G; ++g) {
        const int64_t row = g * H + i, gate = b * Cell::G * H + row;
        unit.gx[g] = hidden ? load(p.gx + gate, n) : S::dots(p.x + b * p.I, p.w_ih[0] + row * p.I, p.I, n);
        unit.gh[g] = hidden ? load(hidden + gate, n) : S::dots(p.h0 + b * H, p.w_hh[0] + row * H, H, n);
        unit.gx[g] += S::load_or_zero(p.b_ih[0], row, n);
        unit.gh[g] += S::load_or_zero(p.b_hh[0], row, n);
      }
      unit.prev[0] = load(p.h0 + at, n);
      for (int k = 1; k < Cell::S; ++k) unit.prev[k] = load(p.c0 + beside<Cell>(b, k, H, i), n);
      unit.read_parameters(p.unit[0], H, i, n);
      unit.draw(p.noise, 0, only_step(b), i);

      unit.run(only_step(b));

      store(p.h_n + at, unit.next[0], n);
      for (int k = 1; k < Cell::S; ++k) store(p.c_n + beside<Cell>(b, k, H, i), unit.next[k], n);
      unit.write(p, only_step(b), i, n, false);
    }
  }
}

template <class Cell, class IO>
void backward_step(const Backward<IO>& p, Arithmetic<IO>* dgh, int64_t first, int64_t last) {
  using S = Single<IO>;
  const int64_t H = p.seq.H;
  for (int64_t b = 0; b < p.seq.B; ++b) {
    for (int64_t i = first; i < last; i += S::kLanes) {
      const int n = S::left(H, i);
      const int64_t at = b * H + i;
      BackwardUnit<Cell, IO> unit;
      unit.read(p, 0, only_step(b), StateBefore{false, true, b}, i, n, false);
      unit.dnext[0] = unit.dout[0] + S::load_or_zero(p.dh_n, at, n);
      for (int k = 1; k < Cell::S; ++k)
        unit.dnext[k] = unit.dout[k] + S::load_or_zero(p.dc_n, beside<Cell>(b, k, H, i), n);

      unit.run(only_step(b));

      if (p.dh0) store(p.dh0 + at, unit.dprev[0], n);
      for (int k = 1; p.dc0 && k < Cell::S; ++k) store(p.dc0 + beside<Cell>(b, k, H, i), unit.dprev[k], n);
      for (int g = 0; g < Cell::G; ++g) store(dgh + (b * Cell::G + g) * H + i, unit.dgh[g], n);
      for (int k = 0; p.dunit && k < unit.P; ++k) store(p.dunit + (b * unit.P + k) * H + i, unit.dprev[Cell::S + k], n);
      unit.write(p, only_step(b), i, n);
    }
  }
}

}  // namespace rnn::cpu::RNN_ISA
