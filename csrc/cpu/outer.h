// The sum over all steps and rows of the outer products of two vectors, which is the gradient of a weight: a^T b, with
// the gradients of the gates in a and what the weight was multiplied by in b. The sum is taken in one order, whatever
// the threads.
#pragma once

#include <iterator>

#include "cpu/loop.h"

namespace rnn::cpu::RNN_ISA {

// Shared out by tiles of kTile rows of the result. A thread takes a block of such tiles at a time, and for it part
// after part of K: its rows of a and one panel of b are copied side by side, in the arithmetic type, to be read from L1
// and L2.
template <class IO>
class OuterLoop final : public LoopBase<IO> {
  using Base = LoopBase<IO>;
  using Base::arena_, Base::kLanes, Base::left, Base::padded;
  using typename Base::T, typename Base::V;
  static constexpr int kTile = max_rows(kMaxVectors);
  static constexpr int kBlock = 516 / kTile * kTile;             // most rows of the result that go through K together
  static constexpr int kStride = 536;                            // of a's rows: neighbours fall into other sets of L1
  static constexpr int kPanel = kMaxVectors * kLanes;            // columns of the result that registers hold
  static constexpr int kDepth = 96 * 64 / (kLanes * sizeof(T));  // of K at a time: a panel of b fills most of L1
  static_assert(kBlock + kLanes <= kStride);
  static constexpr Product<T> kProducts[] = {product<T, kTile, 1, T, true>, product<T, kTile, 2, T, true>,
                                             product<T, kTile, 3, T, true>, product<T, kTile, 4, T, true>};
  static_assert(std::size(kProducts) == kMaxVectors);

 public:
  OuterLoop(const OuterProducts<IO>& p, void* workspace, int threads) : Base(workspace), p_(p) {
    Arena each(nullptr);
    scratch(each);
    bytes_ = each.used();
    scratch_ = arena_.template take<char>(bytes_ * threads);
  }

  static int64_t tiles(const OuterProducts<IO>& p) { return (p.M + kTile - 1) / kTile; }

  Partition partition(int threads) const override {
    constexpr int64_t kWorkPerThread = 64 << 10;
    return {1, int(least(least(threads, most(1, tiles(p_))), 1 + p_.M * p_.N * p_.K / kWorkPerThread)), 1};
  }

  void prepare(int, int) override {}

  void run(const Partition&, const Share& share, Barrier&) override {
    Arena arena(scratch_ + share.thread * bytes_);
    const Scratch s = scratch(arena);
    // Shares are of tiles. Blocks of a share are of one size: each copies all of b.
    const int64_t own = share.last_row - share.first_row, blocks = most(1, (own * kTile + kBlock - 1) / kBlock);
    const int64_t step = (own + blocks - 1) / blocks * kTile, end = least(share.last_row * kTile, p_.M);
    for (int64_t m = share.first_row * kTile; m < end; m += step) {
      const int rows = int(least(step, end - m));
      for (int64_t k = 0; k < p_.K; k += kDepth) add(s, m, rows, k, int(least(kDepth, p_.K - k)));
      for (int64_t j = 0; j < p_.N; j += kPanel) write(s, m, rows, j);
    }
  }

 private:
  struct Scratch {
    T* a;    // [kDepth, kStride]
    T* b;    // [kDepth, kPanel]
    T* sum;  // [panels, rows of the block, kPanel], with shorter rows in the last panel
  };
  static int64_t in_tiles(int64_t rows) { return (rows + kTile - 1) / kTile * kTile; }
  // Columns of the panel from j on, in whole vectors.
  int64_t width(int64_t j) const { return padded(least(kPanel, p_.N - j)); }
  Scratch scratch(Arena& arena) const {
    const int64_t depth = least(kDepth, p_.K), rows = least(kBlock, tiles(p_) * kTile);
    return {arena.take<T>(depth * kStride), arena.take<T>(depth * kPanel), arena.take<T>(rows * padded(p_.N))};
  }

  // What `depth` rows from k on add to the rows of the result from m on; those that a tile has beyond are not written.
  void add(const Scratch& s, int64_t m, int rows, int64_t k, int depth) const {
    const int64_t whole = in_tiles(rows);
    for (int i = 0; i < depth; ++i) Base::copy_factors(p_.a + (k + i) * p_.a_stride + m, rows, s.a + i * kStride);
    for (int64_t j = 0; j < p_.N; j += kPanel) {
      const int64_t columns = width(j);
      for (int i = 0; i < depth; ++i)
        Base::copy_factors(p_.b + (k + i) * p_.b_stride + j, least(kPanel, p_.N - j), s.b + i * columns);
      for (int r = 0; r < rows; r += kTile)
        kProducts[columns / kLanes - 1](s.a + r, kStride, s.b, depth, k > 0, s.sum + j * whole + r * columns, s.b);
    }
  }

  void write(const Scratch& s, int64_t m, int rows, int64_t j) const {
    for (int r = 0; r < rows; ++r) {
      const T* sum = s.sum + j * in_tiles(rows) + r * width(j);
      IO* out = p_.out + (m + r) * p_.out_stride + j;
      for (int64_t i = 0; i < least(kPanel, p_.N - j); i += kLanes) {
        const int n = left(p_.N - j, i);
        V total = p_.K > 0 ? load(sum + i) : V(T(0));
        if (p_.adds) total += load(out + i, n);
        store(out + i, total, n);
      }
    }
  }

  const OuterProducts<IO>& p_;
  int64_t bytes_;  // of one thread's scratch
  char* scratch_;
};

}  // namespace rnn::cpu::RNN_ISA
