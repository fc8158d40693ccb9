// Weights in the order in which a product reads them.
#pragma once

#include <cfloat>
#include <type_traits>

#include "cpu/vec.h"

namespace rnn::cpu::RNN_ISA {

// What products take their factors in; they add up in the arithmetic type. A file that has instructions for bfloat16
// has kernels for nothing else.
#if defined(RNN_BFLOAT16)
template <class IO>
using Factor = IO;
#else
template <class IO>
using Factor = Arithmetic<IO>;
#endif

// Vectors of a row's sums that one product computes, beside each other in registers.
constexpr int kMaxVectors = 4;
// Columns of a panel, each a vector wide: a cell has so many gates at most.
constexpr int kMaxColumns = 8;

// The sizes of a weight matrix packed for products that take a T: `tiles()` panels, each of which holds all gates of
// vectors * lanes neighbouring units, so that one panel times one row gives whole units.
template <class T>
struct PanelSizes {
  static constexpr int kLanes = Vec<Arithmetic<T>>::kLanes;
  int64_t K = 0, units = 0;
  int gates = 1, vectors = 1;

  int columns() const { return gates * vectors; }   // of one panel, each a vector wide
  int width() const { return columns() * kLanes; }  // numbers that one row of a panel has
  int64_t tile_units() const { return vectors * kLanes; }

  // Columns of a panel that go through a product together: all of them, or several parts of the same size, or nearly.
  struct Part {
    int first, columns;
    int width() const { return columns * kLanes; }
  };
  int parts() const { return (columns() + kMaxVectors - 1) / kMaxVectors; }
  Part part(int64_t tile, int i) const {
    const int all = columns_of(tile), first = all * i / parts();
    return {first, all * (i + 1) / parts() - first};
  }
  // The columns of a tile that hold units. Where there is one gate, the last tile has no others, and is multiplied by
  // no more of them; its sums lie as far apart as all.
  int columns_of(int64_t tile) const {
    const int64_t left = (units - tile * tile_units() + kLanes - 1) / kLanes;
    return gates == 1 && left < vectors ? int(left) : columns();
  }
  int64_t tiles() const { return (units + tile_units() - 1) / tile_units(); }

  // The rows of w [gates*units, K] that make column `column` of a tile: neighbours, `count` of them.
  struct Rows {
    int64_t first;
    int count;
  };
  Rows rows_of(int64_t tile, int column) const {
    const int64_t unit = tile * tile_units() + column % vectors * kLanes, left = units - unit;
    return {column / vectors * units + unit, left <= 0 ? 0 : left < kLanes ? int(left) : kLanes};
  }
};

// Packed weights: panels of [K / kGroup, gates, vectors, lanes, kGroup], part behind part where columns have several.
// Units past the end are zero, and so is what pads K to whole steps of the product.
//
// T is what the product takes, W what is in memory: T itself, or something narrower that is widened as it is read. Int8
// has a scale for each column, which the product is multiplied by in the end.
template <class T, class W = T>
struct Panels : PanelSizes<T> {
  using Sizes = PanelSizes<T>;
  using V = Vec<Arithmetic<T>>;
  using Sizes::K, Sizes::units, Sizes::vectors, Sizes::kLanes, Sizes::width, Sizes::columns, Sizes::tiles;
  using Sizes::part, Sizes::parts, Sizes::columns_of, Sizes::tile_units, Sizes::rows_of;
  using typename Sizes::Part;
  static constexpr bool kNarrow = !std::is_same_v<T, W>, kScaled = std::is_same_v<W, Int8>;
  static constexpr int kGroup = kNarrow ? kInLane<W> : int(sizeof(Arithmetic<T>) / sizeof(T));  // values of K in a lane
#if defined(RNN_AMX)
  static constexpr int64_t kStep = kLanes * kGroup;  // values of K that a product takes at once
#else
  static constexpr int64_t kStep = kGroup;
#endif
  W* data = nullptr;
  Arithmetic<T>* scales = nullptr;  // [tiles, width]

  int64_t depth() const { return (K + kStep - 1) / kStep * kStep; }
  int64_t size() const { return tiles() * depth() * width(); }
  int64_t bytes() const { return size() * int64_t(sizeof(W)); }
  W* panel(int64_t tile) const { return data + tile * depth() * width(); }
  W* panel(int64_t tile, const Part& part) const { return panel(tile) + part.first * kLanes * depth(); }

  // Packs one tile of w [gates*units, K]: the product is row * w^T.
  template <class IO>
  void pack_transposed(const IO* w, int64_t tile) const {
    pack_columns<IO>(tile, [&](int column) { return w + rows_of(tile, column).first * K; });
  }
  // The same of w whose rows of a column lie at rows(column) [count, K].
  template <class IO, class At>
  void pack_columns(int64_t tile, At&& rows) const {
    constexpr int64_t each = kNarrow ? kLanes : kLanes * kGroup;
    if constexpr (kScaled) {
      for (int column = 0; column < columns(); ++column)
        find_scales(rows(column), rows_of(tile, column).count, scales + tile * width() + column * kLanes);
    }
    for (int p = 0; p < parts(); ++p) {
      const Part now = part(tile, p);
      for (int64_t k0 = 0; k0 < K; k0 += each) {
        const int n = int(K - k0 < each ? K - k0 : each);
        W* out = panel(tile, now) + k0 * now.width();
        for (int column = now.first; column < now.first + now.columns; ++column, out += kLanes * kGroup) {
          const IO* from = rows(column) + k0;
          const int count = rows_of(tile, column).count;
          V block[kLanes];
          for (int i = 0; i < kLanes; ++i) block[i] = i < count ? lanes(from + i * K, n) : V(0);
          transpose(block);
          if constexpr (kScaled) {
            const V scale = load(scales + tile * width() + column * kLanes);
            for (int k = 0; k < n; ++k) block[k] = block[k] / scale;
          }
          const int steps = int((n + kStep - 1) / kStep * kStep / kGroup);
          for (int k = 0; k < steps; ++k) put(out + k * now.width() * kGroup, block + (kNarrow ? k * kGroup : k));
        }
      }
    }
  }

  // Packs one tile of w [K, units]: the product is row * w.
  template <class IO>
  void pack(const IO* w, int64_t tile) const {
    W* to = panel(tile);
    for (int64_t k = 0; k < depth(); k += kGroup) {
      for (int u = 0; u < columns_of(tile); ++u, to += kLanes * kGroup) {
        const int64_t unit = tile * tile_units() + u * kLanes, left = units - unit;
        const auto row = [&](int64_t k) {
          return k >= K || left <= 0 ? V(0) : load(w + k * units + unit, left < kLanes ? int(left) : kLanes);
        };
        const V together = kGroup > 1 ? side_by_side(row(k), row(k + 1)) : row(k);
        put(to, &together);
      }
    }
  }

 private:
  // n <= kLanes * kGroup values as they lie in lanes, and zeros.
  template <class IO>
  static V lanes(const IO* p, int n) {
    if constexpr (kGroup == 1 || kNarrow) {
      return load(p, n);
    } else {
      static_assert(std::is_same_v<IO, T>);
      V x(0);
      if (n == kLanes * kGroup) {
        std::memcpy(&x, p, sizeof x);
      } else {
        std::memcpy(&x, p, n * sizeof(T));
      }
      return x;
    }
  }
  static void put(W* to, const V* lanes) {
    if constexpr (kNarrow) {
      store_narrow(to, lanes);
    } else {
      std::memcpy(to, lanes, sizeof *lanes);
    }
  }

  // What takes the largest value of each of `count` rows [count, K] to 127. A row that holds a value which is not
  // finite has none, and its products are NaN. It is never 0, and not less precise than any other number.
  template <class IO>
  void find_scales(const IO* rows, int count, Arithmetic<T>* to) const {
    for (int i = 0; i < kLanes; ++i) {
      typename V::Bits most{};  // of the bits of positive numbers, the order is that of the numbers; NaN comes last
      for (int64_t k = 0; i < count && k < K; k += kLanes) {
        const auto bits = load(rows + i * K + k, K - k < kLanes ? int(K - k) : kLanes).bits() & 0x7fffffff;
        most = bits > most ? bits : most;
      }
      int32_t bits = 0;
      for (int l = 0; l < kLanes; ++l) bits = most[l] > bits ? most[l] : bits;
      float largest;
      std::memcpy(&largest, &bits, sizeof largest);
      const float scale = largest / 127;
      to[i] = !(largest <= FLT_MAX) ? __builtin_nanf("") : scale < FLT_MIN ? FLT_MIN : scale;
    }
  }

  // The upper halves of a's and b's lanes, a's below b's.
  static V side_by_side(V a, V b) {
    if constexpr (kGroup == 2) return V::from_bits(((a.bits() >> 16) & 0xffff) | b.bits());
    return a;
  }
};

}  // namespace rnn::cpu::RNN_ISA
