// What the forward and the backward loop over time share.
#pragma once

#include "common/layout.h"
#include "cpu/product.h"
#include "cpu/team.h"

namespace rnn::cpu::RNN_ISA {

template <class IO>
struct LoopBase {
  using T = Arithmetic<IO>;
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;

  // Rows of the arithmetic type are padded to whole vectors; rows of the storage type are not.
  static int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
  static int left(int64_t n, int64_t i) { return n - i < kLanes ? int(n - i) : kLanes; }
  static V load_or_zero(const IO* p, int64_t offset, int n) { return p ? load(p + offset, n) : V(T(0)); }

  // Multiplies the rows of this share by its tiles of w and hands each row of each product to f(b, tile, row). Where
  // no row of a register tile is active at step s, there is no product, and the row handed over is zero.
  template <class F>
  static void for_tiles(const Sequence& q, const Panels<T>& w, const T* a, int64_t stride, int64_t s,
                        const Share& share, F&& f) {
    alignas(64) T out[kMaxRows * kMaxVectors * kLanes];
    const int64_t rows = tile_rows(share.last_row - share.first_row, w.gates * w.vectors);
    for (int64_t j = share.begin(w.tiles()); j < share.end(w.tiles()); ++j) {
      for (int64_t b0 = share.first_row; b0 < share.last_row; b0 += rows) {
        const int64_t b1 = least(b0 + rows, share.last_row);
        bool any = false;
        for (int64_t b = b0; b < b1; ++b) any |= s < q.length(b);
        if (any) {
          multiply(w, j, a + b0 * stride, stride, int(b1 - b0), out);
        } else {
          for (T& x : out) x = T(0);
        }
        for (int64_t b = b0; b < b1; ++b) f(b, j, out + (b - b0) * w.width());
      }
    }
  }

  static Plan plan(const Sequence& q, const Panels<T>& w, int gates, int threads) {
    const int64_t work = q.B * q.R * q.H * gates;
    return Plan::make(threads, q.T, q.D, q.B, w.tiles(), w.size() * int64_t(sizeof(T)), work);
  }
};

}  // namespace rnn::cpu::RNN_ISA
