// The sum over all steps and rows of the outer products of two vectors, which is the gradient of a weight: a^T b, with
// the gradients of the gates in a and what the weight was multiplied by in b. The sum is taken in one order, whatever
// the threads.
#pragma once

#include <iterator>

#include "cpu/loop.h"

namespace rnn::cpu::RNN_ISA {

// Shared out by tiles of kTile rows of the results, lane after lane. A thread takes a block of such tiles at a time,
// and for it part after part of K: its rows of a and one panel of b are copied side by side, in the arithmetic type, to
// be read from L1 and L2. Sums grow where the result lies (in_place()), but for tiles that it has a part of only.
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
    const int64_t work = p_.lanes * p_.M * p_.N * p_.K;
    return {1, int(least(least(threads, most(1, p_.lanes * tiles(p_))), 1 + work / kWorkPerThread)), 1};
  }

  void prepare(int, int) override {}

  void run(const Partition&, const Share& share, Barrier&) override {
    Arena arena(scratch_ + share.thread * bytes_);
    const Scratch s = scratch(arena);
    const int64_t each = tiles(p_);
    for (int64_t lane = share.first_row / each; lane * each < share.last_row; ++lane)
      run(p_.of(lane), s, most(share.first_row - lane * each, 0), least(share.last_row - lane * each, each));
  }

 private:
  struct Scratch {
    T* a;    // [kDepth, kStride]
    T* b;    // [kDepth, kPanel]
    T* sum;  // [panels, rows of the block, kPanel], with shorter rows in the last panel; or, in place, as below
  };
  // Not of another type than the arithmetic one; nor where many parts of K would go there and back.
  static bool in_place(const OuterProducts<IO>& p) { return std::is_same_v<IO, T> && p.K <= 2 * kDepth; }
  static int64_t in_tiles(int64_t rows) { return (rows + kTile - 1) / kTile * kTile; }
  // Columns of the panel from j on, in whole vectors.
  static int64_t width(const OuterProducts<IO>& p, int64_t j) { return padded(least(kPanel, p.N - j)); }
  Scratch scratch(Arena& arena) const {
    const int64_t depth = least(kDepth, p_.K), rows = least(kBlock, tiles(p_) * kTile);
    // In place, what is summed up here is the last tile of rows, in all panels, and the last panel, in all rows.
    const int64_t sum = in_place(p_) ? kTile * padded(p_.N) + rows * kPanel : rows * padded(p_.N);
    return {arena.take<T>(depth * kStride), arena.take<T>(depth * kPanel), arena.take<T>(sum)};
  }

  // A tile of the result, of rows from r of the block on and columns from j on: where its sum grows.
  struct Tile {
    IO* out;   // where it belongs
    int rows;  // that exist there
    int64_t columns;
    bool whole;  // all that is summed up exists, so that it grows there
    T* sum;
    int64_t stride;  // of rows of `sum`
  };
  static Tile tile(const OuterProducts<IO>& p, const Scratch& s, int64_t m, int rows, int r, int64_t j) {
    const int64_t wide = width(p, j), columns = least(kPanel, p.N - j);
    IO* const out = p.out + (m + r) * p.out_stride + j;
    const int own = int(least(kTile, rows - r));
    if (in_place(p)) {
      if constexpr (std::is_same_v<IO, T>)
        if (own == kTile && columns == wide) return {out, own, columns, true, out, p.out_stride};
      T* const last_rows = s.sum + j * kTile;
      T* const last_panel = s.sum + kTile * padded(p.N) + r * kPanel;
      return {out, own, columns, false, own < kTile ? last_rows : last_panel, wide};
    }
    return {out, own, columns, false, s.sum + j * in_tiles(rows) + r * wide, wide};
  }

  // Tiles first to last of one lane. Blocks of them are of one size: each copies all of b.
  void run(const OuterProducts<IO>& p, const Scratch& s, int64_t first, int64_t last) const {
    const int64_t own = last - first, blocks = most(1, (own * kTile + kBlock - 1) / kBlock);
    const int64_t step = (own + blocks - 1) / blocks * kTile, end = least(last * kTile, p.M);
    for (int64_t m = first * kTile; m < end; m += step) {
      const int rows = int(least(step, end - m));
      for (int64_t k = 0; k < p.K; k += kDepth) add(p, s, m, rows, k, int(least(kDepth, p.K - k)));
      for (int64_t j = 0; j < p.N; j += kPanel)
        for (int r = 0; r < rows; r += kTile) write(p, tile(p, s, m, rows, r, j));
    }
  }

  // What `depth` rows from k on add to the rows of the result from m on; those that a tile has beyond are not written.
  static void add(const OuterProducts<IO>& p, const Scratch& s, int64_t m, int rows, int64_t k, int depth) {
    for (int i = 0; i < depth; ++i) Base::copy_factors(p.a + (k + i) * p.a_stride + m, rows, s.a + i * kStride);
    for (int64_t j = 0; j < p.N; j += kPanel) {
      const int64_t columns = width(p, j);
      for (int i = 0; i < depth; ++i)
        Base::copy_factors(p.b + (k + i) * p.b_stride + j, least(kPanel, p.N - j), s.b + i * columns);
      for (int r = 0; r < rows; r += kTile) {
        const Tile to = tile(p, s, m, rows, r, j);
        kProducts[columns / kLanes - 1](s.a + r, kStride, s.b, depth, k > 0 || (to.whole && p.adds), to.sum, to.stride,
                                        copied_next(p, s, m, rows, k, depth, j, r / kTile));
      }
    }
  }

  // What the products of a panel fetch, one tile after another: a line of each row of what is copied next. That is the
  // next panel of b or, behind the last one, the first of the part of K that follows, and its rows of a. Copies would
  // wait for them: rows lie far apart, so that the processor foresees none.
  static Ahead copied_next(const OuterProducts<IO>& p, const Scratch& s, int64_t m, int rows, int64_t k, int depth,
                           int64_t j, int64_t tile) {
    constexpr int64_t kLine = 64 / sizeof(IO);
    const auto lines = [](int64_t n) { return (n + 2 * kLine - 2) / kLine; };  // of n values that begin anywhere
    const bool last = j + kPanel >= p.N;
    const int64_t row = last ? k + depth : k, column = last ? 0 : j + kPanel;
    if (row + depth <= p.K) {
      const int64_t of_b = lines(least(kPanel, p.N - column));
      if (tile < of_b) return fetching(p.b + row * p.b_stride + column + tile * kLine, p.b_stride);
      if (last && tile < of_b + lines(rows))
        return fetching(p.a + row * p.a_stride + m + (tile - of_b) * kLine, p.a_stride);
    }
    return {s.b, 0};  // which is there
  }
  static Ahead fetching(const IO* first, int64_t stride) { return {first, stride * int64_t(sizeof(IO))}; }

  static void write(const OuterProducts<IO>& p, const Tile& from) {
    if (from.whole && (p.K > 0 || p.adds)) return;  // it is there
    for (int r = 0; r < from.rows; ++r) {
      for (int64_t i = 0; i < from.columns; i += kLanes) {
        const int n = left(from.columns, i);
        IO* const out = from.out + r * p.out_stride + i;
        V total = p.K > 0 ? load(from.sum + r * from.stride + i) : V(T(0));
        if (p.adds) total += load(out, n);
        store(out, total, n);
      }
    }
  }

  const OuterProducts<IO>& p_;
  int64_t bytes_;  // of one thread's scratch
  char* scratch_;
};

}  // namespace rnn::cpu::RNN_ISA
