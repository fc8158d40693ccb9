// Packed weights that later calls may use again, with digests of what they were packed from.
#pragma once

#include "cpu/arena.h"
#include "cpu/digest.h"
#include "cpu/kernels.h"
#include "cpu/multiply.h"

namespace rnn::cpu::RNN_ISA {

// Calls f(W{}) with what weights are packed in.
template <class IO, class F>
decltype(auto) dispatch_packed(PackedType type, F&& f) {
  if constexpr (std::is_same_v<IO, float>) {
    if (type == PackedType::kBFloat16) return f(BFloat16{});
    if (type == PackedType::kFloat16) return f(Float16{});
    if (type == PackedType::kInt8) return f(Int8{});
  }
  return f(Factor<IO>{});
}

// The panels of w [gates*units, K], transposed, for one call or for several, in the type that `packs` says.
template <class T, class IO>
class KeptPanels : public PanelSizes<T> {
  using Sizes = PanelSizes<T>;

 public:
  using Sizes::K, Sizes::kLanes, Sizes::columns, Sizes::rows_of, Sizes::tiles, Sizes::width;
  KeptPanels() = default;
  // Lies in `arena`, with the digests where it is kept.
  KeptPanels(const Sizes& sizes, const IO* w, const Packs& packs, Arena& arena)
      : Sizes(sizes), type_(packs.type), w_(w) {
    packed([&]<class W>(const Panels<T, W>& panels) {
      data_ = arena.take<W>(panels.size());
      if (panels.kScaled) scales_ = arena.take<Arithmetic<T>>(tiles() * width());
    });
    if (packs.keep) digests_ = arena.take<Digest>(tiles() * digests_of_tile());
  }

  // Packs a tile, or, where an earlier call has, tells whether that is still what w holds. A thread's copy
  // [columns, lanes, K] is needed where it is kept.
  bool prepare(int64_t tile, const Packs& packs, IO* copy) const {
    if (packs.filled) return holds(tile);
    if (packs.keep) {
      pack_and_digest(tile, copy);
    } else {
      packed([&](const auto& panels) { panels.pack_transposed(w_, tile); });
    }
    return true;
  }
  int64_t copy_size() const { return width() * K; }
  int64_t bytes() const {
    return packed([](const auto& panels) { return panels.bytes(); });
  }

  friend void multiply(const KeptPanels& w, int64_t tile, int64_t next, const T* a, int64_t row_stride, int64_t rows,
                       Arithmetic<T>* out, const bool* active) {
    w.packed([&](const auto& panels) { multiply(panels, tile, next, a, row_stride, rows, out, active); });
  }

 private:
  // Calls f with the panels as what they are.
  template <class F>
  decltype(auto) packed(F&& f) const {
    return dispatch_packed<IO>(type_,
                               [&]<class W>(W) { return f(Panels<T, W>{*this, static_cast<W*>(data_), scales_}); });
  }

  const IO* rows_in_place(int64_t tile, int column) const { return w_ + rows_of(tile, column).first * K; }

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
    const auto rows = [&](int column) { return copy + column * kLanes * K; };
    for (int column = 0; column < columns(); ++column) {
      const int count = rows_of(tile, column).count;
      if (count) std::memcpy(rows(column), rows_in_place(tile, column), count * K * sizeof(IO));
    }
    asm volatile("" ::: "memory");  // or a compiler might read w again in place of the copy
    packed([&](const auto& panels) { panels.template pack_columns<IO>(tile, rows); });
    Digest* to = digests_ + tile * digests_of_tile();
    each_digest(tile, rows, [&](int64_t i, const Digest& now) { to[i] = now; });
  }

  int64_t column_bytes() const { return kLanes * K * int64_t(sizeof(IO)); }
  int64_t periods() const { return (column_bytes() + kDigestPeriod - 1) / kDigestPeriod; }
  int64_t digests_of_tile() const { return periods() * columns(); }

  // Calls then(i, digest) for all digests of a tile, whose columns lie at rows(column).
  template <class At, class Then>
  void each_digest(int64_t tile, At&& rows, Then&& then) const {
    const int N = columns();
    const DigestKeys& keys = digest_keys();
    const char* from[kMaxColumns];
    int64_t left[kMaxColumns];
    bool whole = true;
    for (int c = 0; c < N; ++c) {
      from[c] = reinterpret_cast<const char*>(rows(c));
      left[c] = rows_of(tile, c).count * K * int64_t(sizeof(IO));
      whole &= left[c] == column_bytes();
    }
    for (int64_t period = 0; period < periods(); ++period) {
      const auto size = [&](int c) { return left[c] < kDigestPeriod ? left[c] : kDigestPeriod; };
      Digest found[kMaxColumns];
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

  PackedType type_ = PackedType::kOwn;
  void* data_ = nullptr;
  Arithmetic<T>* scales_ = nullptr;
  const IO* w_ = nullptr;
  Digest* digests_ = nullptr;  // [tiles, periods, columns]
};

}  // namespace rnn::cpu::RNN_ISA
