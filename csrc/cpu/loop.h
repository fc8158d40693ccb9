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

  // Multiplies rows first to last, which lie at a, by this share's tiles of w and hands each row of each product to
  // f(row, tile, product). Where no row of a register tile is active(row), there is no product, and zeros are handed
  // on.
  template <class Active, class F>
  static void for_tiles(const Panels<T>& w, const T* a, int64_t stride, int64_t first, int64_t last, const Share& share,
                        Active&& active, F&& f) {
    alignas(64) T out[kMaxRows * kMaxVectors * kLanes];
    const int64_t rows = tile_rows(last - first, w.gates * w.vectors);
    for (int64_t j = share.begin(w.tiles()); j < share.end(w.tiles()); ++j) {
      for (int64_t r0 = first; r0 < last; r0 += rows) {
        const int64_t r1 = least(r0 + rows, last);
        bool any = false;
        for (int64_t r = r0; r < r1; ++r) any |= active(r);
        if (any) {
          multiply(w, j, a + (r0 - first) * stride, stride, int(r1 - r0), out);
        } else {
          for (T& x : out) x = T(0);
        }
        for (int64_t r = r0; r < r1; ++r) f(r, j, out + (r - r0) * w.width());
      }
    }
  }

  static Plan plan(const Sequence& q, const Panels<T>& w, int gates, int threads) {
    const int64_t rows = q.rows(), work = rows * q.R * q.H * gates;
    return Plan::make(threads, q.steps(), q.D, rows, w.tiles(), w.size() * int64_t(sizeof(T)), work);
  }
};

}  // namespace rnn::cpu::RNN_ISA
