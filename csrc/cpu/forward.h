// The forward loop over time: product, then the cell while the tile is hot.
#pragma once

#include "cpu/loop.h"

namespace rnn::cpu::RNN_ISA {

// Units that a panel holds per gate, so that a panel is about kMaxVectors wide whatever the number of gates.
constexpr int vectors_per_gate(int gates) { return gates >= kMaxVectors ? 1 : kMaxVectors / gates; }

template <class Cell, class IO>
class ForwardLoop : LoopBase<IO> {
  using Base = LoopBase<IO>;
  using Base::kLanes, Base::left, Base::load_or_zero, Base::padded;
  using typename Base::T, typename Base::V;
  static constexpr int kWidth = vectors_per_gate(Cell::G);
  static_assert(Cell::G * kWidth <= kMaxVectors, "a cell of more gates needs a wider product");

 public:
  ForwardLoop(const Forward<IO>& p, void* workspace, int) : p_(p), arena_(workspace) {
    const Sequence& q = p.seq;
    rows_ = arena_.take<Row>(q.B);
    for (int64_t d = 0; d < q.D; ++d) {
      Direction& dir = directions_[d];
      dir.hidden = {nullptr, q.R, q.H, Cell::G, kWidth};
      dir.hidden.data = arena_.take<T>(dir.hidden.size());
      for (T*& bias : dir.bias) bias = arena_.take<T>(Cell::G * padded(q.H));
      for (T*& h : dir.h) h = arena_.take<T>(q.B * padded(q.R));
      if (Cell::S > 1) dir.c = arena_.take<T>(q.B * padded(q.H));
      if (p.w_hr[d]) {
        dir.projection = {nullptr, q.H, q.R, 1, kMaxVectors};
        dir.projection.data = arena_.take<T>(dir.projection.size());
        dir.raw = arena_.take<T>(q.B * padded(q.H));
      }
    }
  }

  int64_t workspace_bytes() const { return arena_.used(); }

  Plan plan(int threads) const { return Base::plan(p_.seq, directions_[0].hidden, Cell::G, threads); }

  // What has to be ready before any thread starts its loop; thread of threads does a part of it.
  void prepare(int thread, int threads) {
    const Sequence& q = p_.seq;
    for (int64_t b = thread; b < q.B; b += threads) rows_[b] = q.row(b);
    for (int64_t d = 0; d < q.D; ++d) {
      Direction& dir = directions_[d];
      for (int64_t j = thread; j < dir.hidden.tiles(); j += threads) dir.hidden.pack_transposed(p_.w_hh[d], j);
      if (dir.raw) {
        for (int64_t j = thread; j < dir.projection.tiles(); j += threads)
          dir.projection.pack_transposed(p_.w_hr[d], j);
      }
      if (thread == 0) {
        for (int g = 0; g < Cell::G; ++g) {
          for (int64_t i = 0; i < q.H; i += kLanes) {
            store(dir.bias[0] + g * padded(q.H) + i, load_or_zero(p_.b_ih[d], g * q.H + i, left(q.H, i)));
            store(dir.bias[1] + g * padded(q.H) + i, load_or_zero(p_.b_hh[d], g * q.H + i, left(q.H, i)));
          }
        }
      }
      for (int64_t b = thread; b < q.B; b += threads) {
        const bool zero = rows_[b].length > 0 && q.cut_before(d, rows_[b], 0);
        for (int64_t i = 0; i < q.R; i += kLanes) {
          const V h = zero ? V(T(0)) : load(p_.h0 + q.state_at(d, b, q.R) + i, left(q.R, i));
          store(dir.h[0] + b * padded(q.R) + i, h);
        }
        for (int64_t i = 0; Cell::S > 1 && i < q.H; i += kLanes) {
          const V c = zero ? V(T(0)) : load(p_.c0 + q.state_at(d, b, q.H) + i, left(q.H, i));
          store(dir.c + b * padded(q.H) + i, c);
        }
      }
    }
  }

  void run(const Share& share, Barrier& barrier) {
    for (int64_t d = share.first_direction; d < share.last_direction; ++d) run_direction(d, share, barrier);
  }

 private:
  struct Direction {
    Panels<T> hidden;      // W_hh
    Panels<T> projection;  // W_hr
    T* bias[2] = {};       // [G, H] each: of the input and of the hidden part
    T* h[2] = {};          // [B, R] each: state entering even and odd steps
    T* c = nullptr;        // [B, H]
    T* raw = nullptr;      // [B, H]: h before the projection
  };

  void run_direction(int64_t d, const Share& share, Barrier& barrier) {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    for (int64_t s = 0; s < q.T; ++s) {
      const T* h = dir.h[s & 1];
      T* h_next = dir.h[(s + 1) & 1];
      const auto active = [&](int64_t b) { return s < rows_[b].length; };
      Base::for_tiles(dir.hidden, h + share.first_row * padded(q.R), padded(q.R), share.first_row, share.last_row,
                      share, active, [&](int64_t b, int64_t j, const T* gh) {
                        if (active(b)) {
                          cell(d, b, s, j, gh, h, h_next);
                        } else {
                          pad(d, b, s, j, h, h_next);
                        }
                      });
      barrier.wait(share.size);
      if (!dir.raw) continue;
      Base::for_tiles(dir.projection, dir.raw + share.first_row * padded(q.H), padded(q.H), share.first_row,
                      share.last_row, share, active,
                      [&](int64_t b, int64_t j, const T* out) { project(d, b, s, j, out, h, h_next); });
      barrier.wait(share.size);
    }
    const T* h = dir.h[q.T & 1];
    for (int64_t b = share.first_row + share.rank; b < share.last_row; b += share.size) {
      for (int64_t i = 0; i < q.R; i += kLanes)
        store(p_.h_n + q.state_at(d, b, q.R) + i, load(h + b * padded(q.R) + i), left(q.R, i));
      for (int64_t i = 0; Cell::S > 1 && i < q.H; i += kLanes)
        store(p_.c_n + q.state_at(d, b, q.H) + i, load(dir.c + b * padded(q.H) + i), left(q.H, i));
    }
  }

  bool cut_after(int64_t d, int64_t b, int64_t s) const {
    return s + 1 < rows_[b].length && p_.seq.cut_before(d, rows_[b], s + 1);
  }

  // One step of the units of tile j of an active row. gh [G, kWidth, lanes].
  void cell(int64_t d, int64_t b, int64_t s, int64_t j, const T* gh_tile, const T* h, T* h_next) {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    const int64_t at = q.place(d, rows_[b], s).n;
    const bool cut = cut_after(d, b, s);
    for (int u = 0; u < kWidth; ++u) {
      const int64_t i = (j * kWidth + u) * kLanes;
      if (i >= q.H) break;
      const int n = left(q.H, i);
      V gx[Cell::G], gh[Cell::G], prev[Cell::S], next[Cell::S], saved[Cell::K + 1];
      for (int g = 0; g < Cell::G; ++g) {
        const int64_t unit = g * padded(q.H) + i;
        gx[g] = load(p_.gx + at * Cell::G * q.H + g * q.H + i, n) + load(dir.bias[0] + unit);
        gh[g] = load(gh_tile + (g * kWidth + u) * kLanes) + load(dir.bias[1] + unit);
      }
      prev[0] = dir.raw ? V(T(0)) : load(h + b * padded(q.R) + i);
      if constexpr (Cell::S > 1) prev[1] = load(dir.c + b * padded(q.H) + i);

      Cell::forward(gx, gh, prev, next, saved);

      if (p_.saved) {
        for (int k = 0; k < Cell::K; ++k) store(p_.saved + at * Cell::K * q.H + k * q.H + i, saved[k], n);
      }
      if constexpr (Cell::S > 1) {
        if (p_.c) store(p_.c + at * q.H + i, next[1], n);
        store(dir.c + b * padded(q.H) + i, cut ? V(T(0)) : next[1]);
      }
      if (dir.raw) {
        store(dir.raw + b * padded(q.H) + i, next[0]);
        if (p_.h_raw) store(p_.h_raw + at * q.H + i, next[0], n);
      } else {
        store(p_.y + at * q.R + i, next[0], n);
        store(h_next + b * padded(q.R) + i, cut ? V(T(0)) : next[0]);
      }
    }
  }

  // A row past its end: its state stands still, and its outputs at position s are zero.
  void pad(int64_t d, int64_t b, int64_t s, int64_t j, const T* h, T* h_next) {
    const Sequence& q = p_.seq;
    const int64_t at = q.place(d, rows_[b], s).n;
    for (int u = 0; u < kWidth; ++u) {
      const int64_t i = (j * kWidth + u) * kLanes;
      if (i >= q.H) break;
      const int n = left(q.H, i);
      for (int k = 0; p_.saved && k < Cell::K; ++k) store(p_.saved + at * Cell::K * q.H + k * q.H + i, V(T(0)), n);
      if (p_.c) store(p_.c + at * q.H + i, V(T(0)), n);
      if (directions_[d].raw) {
        if (p_.h_raw) store(p_.h_raw + at * q.H + i, V(T(0)), n);
      } else {
        store(p_.y + at * q.R + i, V(T(0)), n);
        store(h_next + b * padded(q.R) + i, load(h + b * padded(q.R) + i));
      }
    }
  }

  // The projected units of tile j of row b. out [vectors, lanes].
  void project(int64_t d, int64_t b, int64_t s, int64_t j, const T* out, const T* h, T* h_next) {
    const Sequence& q = p_.seq;
    const Place at = q.place(d, rows_[b], s);
    const bool cut = cut_after(d, b, s);
    for (int u = 0; u < kMaxVectors; ++u) {
      const int64_t i = (j * kMaxVectors + u) * kLanes;
      if (i >= q.R) break;
      const V value = at.active ? load(out + u * kLanes) : V(T(0));
      store(p_.y + at.n * q.R + i, value, left(q.R, i));
      const V kept = at.active ? value : load(h + b * padded(q.R) + i);
      store(h_next + b * padded(q.R) + i, cut ? V(T(0)) : kept);
    }
  }

  const Forward<IO>& p_;
  Arena arena_;
  Row* rows_;
  Direction directions_[kMaxDirections];
};

}  // namespace rnn::cpu::RNN_ISA
