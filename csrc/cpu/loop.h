// What the forward and the backward loop over time share.
#pragma once

#include "common/layout.h"
#include "cpu/math.h"
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

  // Multiplies n rows that lie at a by this share's tiles of w and hands each row of each product to
  // f(row, tile, product). Where no row of a register tile is active(row), there is no product, and zeros are handed
  // on.
  template <class Active, class F>
  static void for_tiles(const Panels<T>& w, const T* a, int64_t stride, int64_t n, const Share& share, T* out,
                        Active&& active, F&& f) {
    for (int64_t j = share.begin(w.tiles()); j < share.end(w.tiles()); ++j) {
      multiply(w, j, a, stride, n, out, active);
      for (int64_t r = 0; r < n; ++r) f(r, j, out + r * w.width());
    }
  }

  static Plan plan(const Sequence& q, const Panels<T>& w, int gates, int threads) {
    const int64_t rows = q.rows(), work = rows * q.R * q.H * gates;
    return Plan::make(threads, q.steps(), q.D, rows, w.tiles(), w.size() * int64_t(sizeof(T)), work);
  }
};

}  // namespace rnn::cpu::RNN_ISA
