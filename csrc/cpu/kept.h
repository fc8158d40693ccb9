// Packed weights that later calls may use again, with digests of what they were packed from.
#pragma once

#include "cpu/arena.h"
#include "cpu/digest.h"
#include "cpu/kernels.h"
#include "cpu/panels.h"
#include "cpu/product.h"

namespace rnn::cpu::RNN_ISA {

// The panels of w [gates*units, K], transposed, for one call or for several.
template <class T, class IO, class W>
class KeptPanels : public Panels<T, W> {
  using Base = Panels<T, W>;

 public:
  KeptPanels() = default;
  // Lies in `arena`, with the digests where it is kept.
  KeptPanels(const Base& shape, const IO* w, bool kept, Arena& arena) : Base(shape), w_(w) {
    Base::data = arena.take<W>(Base::size());
    if (Base::kScaled) Base::scales = arena.take<Arithmetic<T>>(Base::tiles() * Base::width());
    if (kept) digests_ = arena.take<Digest>(Base::tiles() * digests_of_tile());
  }

  // Packs a tile, or, where an earlier call has, tells whether that is still what w holds. A thread's copy
  // [columns, lanes, K] is needed where it is kept.
  bool prepare(int64_t tile, const Packs& packs, IO* copy) const {
    if (packs.filled) return holds(tile);
    if (packs.keep) {
      pack_and_digest(tile, copy);
    } else {
      Base::pack_transposed(w_, tile);
    }
    return true;
  }
  int64_t copy_size() const { return Base::width() * Base::K; }

 private:
  const IO* rows_in_place(int64_t tile, int column) const { return w_ + Base::rows_of(tile, column).first * Base::K; }

  bool holds(int64_t tile) const {
    const Digest* kept = digests_ + tile * digests_of_tile();
    bool same = true;
    each_digest(
        tile, [&](int column) { return rows_in_place(tile, column); },
        [&](int64_t i, const Digest& now) { same &= kept[i] == now; });
    return same;
  }

  // What is packed and what is digested is one copy, whoever writes to w meanwhile.
  void pack_and_digest(int64_t tile, IO* copy) const {
    const auto rows = [&](int column) { return copy + column * Base::kLanes * Base::K; };
    for (int column = 0; column < Base::columns(); ++column) {
      const int count = Base::rows_of(tile, column).count;
      if (count) std::memcpy(rows(column), rows_in_place(tile, column), count * Base::K * sizeof(IO));
    }
    asm volatile("" ::: "memory");  // or a compiler might read w again in place of the copy
    Base::template pack_columns<IO>(tile, rows);
    Digest* to = digests_ + tile * digests_of_tile();
    each_digest(tile, rows, [&](int64_t i, const Digest& now) { to[i] = now; });
  }

  int64_t column_bytes() const { return Base::kLanes * Base::K * int64_t(sizeof(IO)); }
  int64_t periods() const { return (column_bytes() + kDigestPeriod - 1) / kDigestPeriod; }
  int64_t digests_of_tile() const { return periods() * Base::columns(); }

  // Calls then(i, digest) for all digests of a tile, whose columns lie at rows(column).
  template <class At, class Then>
  void each_digest(int64_t tile, At&& rows, Then&& then) const {
    const int N = Base::columns();
    const DigestKeys& keys = digest_keys();
    const char* from[kMaxVectors];
    int64_t left[kMaxVectors];
    bool whole = true;
    for (int c = 0; c < N; ++c) {
      from[c] = reinterpret_cast<const char*>(rows(c));
      left[c] = Base::rows_of(tile, c).count * Base::K * int64_t(sizeof(IO));
      whole &= left[c] == column_bytes();
    }
    for (int64_t period = 0; period < periods(); ++period) {
      const auto size = [&](int c) { return left[c] < kDigestPeriod ? left[c] : kDigestPeriod; };
      Digest found[kMaxVectors];
      if (whole && N == 4) {
        digest<4>(from, size(0), keys, found);
      } else if (whole && N == 3) {
        digest<3>(from, size(0), keys, found);
      } else {
        for (int c = 0; c < N; ++c) digest<1>(from + c, size(c), keys, found + c);
      }
      for (int c = 0; c < N; ++c) {
        then(period * N + c, found[c]);
        const int64_t n = size(c);
        from[c] += n;
        left[c] -= n;
      }
    }
  }

  const IO* w_ = nullptr;
  Digest* digests_ = nullptr;  // [tiles, periods, columns]
};

}  // namespace rnn::cpu::RNN_ISA
