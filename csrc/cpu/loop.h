// What a call's loop is to the threads that run it, and what the loops share.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/layout.h"
#include "cpu/arena.h"
#include "cpu/barrier.h"
#include "cpu/multiply.h"
#include "cpu/partition.h"
#include "cpu/unit.h"

namespace rnn::cpu::RNN_ISA {

// The work of one call, as the threads that share it see it.
class Loop {
 public:
  int64_t workspace_bytes() const { return arena_.used(); }

  // How `threads` threads at most share the work.
  virtual Partition partition(int threads) const = 0;
  // What has to be ready before any thread runs; thread of threads does a part of it.
  virtual void prepare(int thread, int threads) = 0;
  // Whether what an earlier call has left behind is of no use any more, so that nobody runs; known to all once
  // prepare() is done.
  virtual bool stale() const { return false; }
  // This thread's share. Threads of a group wait at its barrier.
  virtual void run(const Partition& parts, const Share& share, Barrier& group) = 0;

 protected:
  explicit Loop(void* workspace) : arena_(workspace) {}
  ~Loop() = default;

  Arena arena_;  // the workspace of the call; without one, what it would take is counted
};

// What loops over values of type IO share.
template <class IO>
struct LoopBase : Loop, Lanes<IO> {
  using Loop::Loop;
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
  static void clear_padding(F* row, int64_t n) {
    if (const int64_t m = padded_factors(n) - n) std::memset(row + n, 0, m * sizeof(F));  // mostly there is none
  }
  static void copy_factors(const IO* from, int64_t n, F* to) {
    if constexpr (std::is_same_v<F, IO>) {
      if (n > 0) std::memcpy(to, from, n * sizeof(F));  // of no numbers `from` may be null
    } else {
      for (int64_t i = 0; i < n; i += kLanes) store(to + i, load(from + i, left(n, i)), left(n, i));
    }
    clear_padding(to, n);
  }

  // Where all of n rows take part, products need not ask for each of them.
  static const bool* unless_all(const bool* active, int64_t n) {
    return active && std::memchr(active, false, n) ? active : nullptr;
  }

  // Calls f(tile, the one that is next) for this share's tiles of w; the last one is its own next. Every other pass
  // begins where the one before ended, whose last tiles are in the cache yet: of weights that do not fit it, passes in
  // one order would find nothing there.
  template <class Matrix, class Each>
  static void each_tile(const Matrix& w, const Share& share, int64_t pass, Each&& f) {
    const int64_t begin = share.begin(w.tiles()), end = share.end(w.tiles());
    if (pass & 1) {
      for (int64_t j = end - 1; j >= begin; --j) f(j, most(j - 1, begin));
    } else {
      for (int64_t j = begin; j < end; ++j) f(j, least(j + 1, end - 1));
    }
  }

  // Multiplies n rows that lie at a by this share's tiles of w and hands each product on to then(tile, product). The
  // rows that `active` does not name are zeros. `out` has place for products_of(n, width) sums.
  template <class Matrix, class Then>
  static void for_tiles(const Matrix& w, const F* a, int64_t stride, int64_t n, const Share& share, int64_t pass,
                        T* out, const bool* active, Then&& then) {
    active = unless_all(active, n);
    const int64_t size = n * w.width(), most_waiting = most(1, kTogether / most(1, size));
    int64_t waiting = 0, first = 0;
    each_tile(w, share, pass, [&](int64_t j, int64_t next) {
      if (waiting == 0) first = j;
      multiply(w, j, next, a, stride, n, out + waiting * size, active);
      if (++waiting < most_waiting && next != j) return;
      const int64_t towards = j < first ? -1 : 1;
      for (int64_t i = 0; i < waiting; ++i) then(first + i * towards, out + i * size);
      waiting = 0;
    });
  }

  // A few tiles' products come one after the other, where that is faster, and then what is made of them.
  static constexpr int64_t kTogether = Products<F>::kBytesTogether / sizeof(T);
  static constexpr int64_t products_of(int64_t n, int64_t width) { return most(n * width, kTogether); }

  template <class Matrix>
  static Partition share_out(const Sequence& q, const Matrix& w, int gates, int threads) {
    const int64_t rows = q.starts ? most(1, q.starts[q.T] / q.steps()) : q.rows();  // of a step, on the average
    return Partition::make(threads, q.steps(), q.D, rows, w.tiles(), w.bytes(), rows * q.R * q.H * gates);
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
