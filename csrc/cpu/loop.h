// What the forward and the backward loop over time share.
#pragma once

#include <type_traits>

#include "common/layout.h"
#include "cpu/arena.h"
#include "cpu/barrier.h"
#include "cpu/multiply.h"
#include "cpu/partition.h"
#include "cpu/unit.h"

namespace rnn::cpu::RNN_ISA {

template <class IO>
struct LoopBase : Lanes<IO> {
  using typename Lanes<IO>::T, typename Lanes<IO>::V;
  using Lanes<IO>::kLanes, Lanes<IO>::left;
  using F = Factor<IO>;

  // Rows of the arithmetic type are padded to whole vectors; rows of the storage type are not.
  static int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

  // A row of factors of products: in what products take, padded with zeros to whole steps of theirs.
  static constexpr bool kRounds = !std::is_same_v<F, T>;
  static int64_t padded_factors(int64_t n) {
    constexpr int64_t whole = Panels<F>::kStep > kLanes ? Panels<F>::kStep : kLanes;
    return (n + whole - 1) / whole * whole;
  }
  static void clear_padding(F* row, int64_t n) { std::memset(row + n, 0, (padded_factors(n) - n) * sizeof(F)); }
  static void copy_factors(const IO* from, int64_t n, F* to) {
    if constexpr (std::is_same_v<F, IO>) {
      std::memcpy(to, from, n * sizeof(F));
    } else {
      for (int64_t i = 0; i < n; i += kLanes) store(to + i, load(from + i, left(n, i)), left(n, i));
    }
    clear_padding(to, n);
  }

  // Whether what an earlier call has left behind is of no use any more; known to all once prepare() is done.
  bool stale() const { return false; }

  // Multiplies n rows that lie at a by this share's tiles of w and hands each row of each product to
  // then(row, tile, product). Where no row of a register tile is active(row), there is no product, and zeros are handed
  // on.
  template <class W, class Active, class Then>
  static void for_tiles(const Panels<F, W>& w, const F* a, int64_t stride, int64_t n, const Share& share, T* out,
                        Active&& active, Then&& then) {
    for (int64_t j = share.begin(w.tiles()); j < share.end(w.tiles()); ++j) {
      multiply(w, j, a, stride, n, out, active);
      for (int64_t r = 0; r < n; ++r) then(r, j, out + r * w.width());
    }
  }

  template <class W>
  static Partition partition(const Sequence& q, const Panels<F, W>& w, int gates, int threads) {
    const int64_t rows = q.starts ? most(1, q.starts[q.T] / q.steps()) : q.rows();  // of a step, on the average
    return Partition::make(threads, q.steps(), q.D, rows, w.tiles(), w.size() * int64_t(sizeof(W)),
                           rows * q.R * q.H * gates);
  }

  struct Range {
    int64_t first, last;
  };
  // The rows of a share: as many for each, or, where packed rows have steps of their own, as many steps.
  static Range rows_of(const Sequence& q, const Row* rows, int64_t count, const Partition& parts, const Share& share) {
    if (!q.starts) return {share.first_row, share.last_row};
    if (parts.row_parts == 1) return {0, count};
    const int64_t part = share.group % parts.row_parts;
    Range range{count, count};
    int64_t steps = 0;
    for (int64_t r = 0; r < count; ++r) {
      if (steps * parts.row_parts >= q.starts[q.T] * part && range.first == count) range.first = r;
      if (steps * parts.row_parts >= q.starts[q.T] * (part + 1)) {
        range.last = r;
        break;
      }
      steps += rows[r].length;
    }
    return range;
  }
};

}  // namespace rnn::cpu::RNN_ISA
