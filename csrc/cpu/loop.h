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
    alignas(64) T out[kTiles * kMaxRows * kMaxVectors * kLanes];
    const int64_t rows = tile_rows(last - first, w.gates * w.vectors);
    for (int64_t j = share.begin(w.tiles()); j < share.end(w.tiles()); ++j) {
      for (int64_t r0 = first; r0 < last; r0 += kTiles * rows) {
        const int64_t r1 = least(r0 + kTiles * rows, last);
        const int64_t part = r1 - r0 > rows ? kPanelBytes / (w.width() * int64_t(sizeof(T))) : w.K;
        for (int64_t k0 = 0; k0 < w.K; k0 += part) {
          for (int64_t r = r0; r < r1; r += rows) {
            const int64_t end = least(r + rows, r1);
            T* tile = out + (r - r0) * w.width();
            bool any = false;
            for (int64_t i = r; i < end; ++i) any |= active(i);
            if (any) {
              multiply(w, j, k0, least(k0 + part, w.K), a + (r - first) * stride, stride, int(end - r), tile);
            } else {
              for (int64_t i = 0; i < (end - r) * w.width(); ++i) tile[i] = T(0);
            }
          }
        }
        for (int64_t r = r0; r < r1; ++r) f(r, j, out + (r - r0) * w.width());
      }
    }
  }

  static constexpr int64_t kPanelBytes = 32 << 10;  // of a panel that stay in L1 while several tiles of rows use it
  static constexpr int kTiles = 8;

  static Plan plan(const Sequence& q, const Panels<T>& w, int gates, int threads) {
    const int64_t rows = q.rows(), work = rows * q.R * q.H * gates;
    return Plan::make(threads, q.steps(), q.D, rows, w.tiles(), w.size() * int64_t(sizeof(T)), work);
  }
};

}  // namespace rnn::cpu::RNN_ISA
