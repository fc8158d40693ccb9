// The sum over all steps and rows of the outer products of two vectors, which is the gradient of a weight: a^T b, with
// the gradients of the gates in a and what the weight was multiplied by in b. The sum is taken in one order, whatever
// the threads.
#pragma once

#include <iterator>

#include "cpu/loop.h"

namespace rnn::cpu::RNN_ISA {

// out [M, N*lanes] = a^T b of a [K, M] and b [K, N*lanes], or out += where it continues.
template <class T, int M, int N>
void outer_products(const T* a, int64_t a_stride, const T* b, int64_t K, bool continues, T* out, int64_t out_stride) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  V sum[M][N];
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) sum[m][n] = continues ? load(out + m * out_stride + n * kLanes) : V(T(0));
  for (int64_t k = 0; k < K; ++k) {
    V row[N];
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) row[n] = load(b + (k * N + n) * kLanes);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      const V x(a[k * a_stride + m]);
#pragma GCC unroll 32
      for (int n = 0; n < N; ++n) sum[m][n] += x * row[n];
    }
  }
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) store(out + m * out_stride + n * kLanes, sum[m][n]);
}

// Shared out by tiles of kTile rows of the result. A thread takes a block of such tiles at a time, and for it part
// after part of K: its rows of a and one panel of b are copied side by side, in the arithmetic type, to be read from L1
// and L2.
template <class IO>
class OuterLoop : LoopBase<IO> {
  using Base = LoopBase<IO>;
  using Base::kLanes, Base::left;
  using typename Base::T, typename Base::V;
  static constexpr int kTile = max_rows(kMaxVectors);
  static constexpr int kBlock = 120 / kTile * kTile;             // rows of the result that go through all of K together
  static constexpr int kStride = 136;                            // of a's rows: neighbours fall into other sets of L1
  static constexpr int kPanel = kMaxVectors * kLanes;            // columns of the result that registers hold
  static constexpr int kDepth = 96 * 64 / (kLanes * sizeof(T));  // of K at a time: a panel of b fills most of L1
  static_assert(kBlock + kLanes <= kStride);
  using Products = void (*)(const T*, int64_t, const T*, int64_t, bool, T*, int64_t);
  static constexpr Products kProducts[] = {outer_products<T, kTile, 1>, outer_products<T, kTile, 2>,
                                           outer_products<T, kTile, 3>, outer_products<T, kTile, 4>};
  static_assert(std::size(kProducts) == kMaxVectors);

 public:
  OuterLoop(const OuterProducts<IO>& p, void* workspace, int threads) : p_(p), arena_(workspace) {
    Arena each(nullptr);
    scratch(each);
    bytes_ = each.used();
    scratch_ = arena_.template take<char>(bytes_ * threads);
  }

  int64_t workspace_bytes() const { return arena_.used(); }
  static int64_t tiles(const OuterProducts<IO>& p) { return (p.M + kTile - 1) / kTile; }

  Partition partition(int threads) const {
    constexpr int64_t kWorkPerThread = 64 << 10;
    return {1, int(least(least(threads, most(1, tiles(p_))), 1 + p_.M * p_.N * p_.K / kWorkPerThread)), 1};
  }

  void prepare(int, int) {}

  void run(const Partition&, const Share& share, Barrier&) {
    Arena arena(scratch_ + share.thread * bytes_);
    const Scratch s = scratch(arena);
    const int64_t end = least(share.last_row * kTile, p_.M);  // shares are of tiles
    for (int64_t m = share.first_row * kTile; m < end; m += kBlock) {
      const int rows = int(least(kBlock, end - m));
      for (int64_t k = 0; k < p_.K; k += kDepth) add(s, m, rows, k, int(least(kDepth, p_.K - k)));
      for (int r = 0; r < rows; ++r) write(s.sum + r * columns(), p_.out + (m + r) * p_.out_stride);
    }
  }

 private:
  struct Scratch {
    T* a;    // [kDepth, kStride]
    T* b;    // [kDepth, kPanel]
    T* sum;  // [kBlock, columns()]
  };
  int64_t columns() const { return (p_.N + kPanel - 1) / kPanel * kPanel; }
  Scratch scratch(Arena& arena) const {
    return {arena.take<T>(kDepth * kStride), arena.take<T>(kDepth * kPanel), arena.take<T>(kBlock * columns())};
  }

  // What `depth` rows from k on add to the rows of the result from m on.
  void add(const Scratch& s, int64_t m, int rows, int64_t k, int depth) const {
    const int whole = (rows + kTile - 1) / kTile * kTile;
    for (int i = 0; i < depth; ++i) copy(p_.a + (k + i) * p_.a_stride + m, rows, s.a + i * kStride, whole);
    for (int64_t j = 0; j < columns(); j += kPanel) {
      const int some = int(least(kPanel, p_.N - j)), vectors = (some + kLanes - 1) / kLanes;
      for (int i = 0; i < depth; ++i)
        copy(p_.b + (k + i) * p_.b_stride + j, some, s.b + i * vectors * kLanes, vectors * kLanes);
      for (int r = 0; r < whole; r += kTile)
        kProducts[vectors - 1](s.a + r, kStride, s.b, depth, k > 0, s.sum + r * columns() + j, columns());
    }
  }

  // n values in the arithmetic type, and zeros up to `all` at least.
  static void copy(const IO* from, int n, T* to, int all) {
    int i = 0;
    for (; i < n; i += kLanes) store(to + i, load(from + i, left(n, i)));
    for (; i < all; i += kLanes) store(to + i, V(T(0)));
  }

  void write(const T* sum, IO* out) const {
    for (int64_t i = 0; i < p_.N; i += kLanes) {
      const int n = left(p_.N, i);
      V total = p_.K > 0 ? load(sum + i) : V(T(0));
      if (p_.adds) total += load(out + i, n);
      store(out + i, total, n);
    }
  }

  const OuterProducts<IO>& p_;
  Arena arena_;
  int64_t bytes_;  // of one thread's scratch
  char* scratch_;
};

}  // namespace rnn::cpu::RNN_ISA
