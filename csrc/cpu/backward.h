// The backward loop over time. Step s takes the gate gradients of step s + 1 through W_hh, adds what else reaches the
// state, and runs the cell: the same form as forward, product first and cell behind it.
#pragma once

#include "cpu/loop.h"

namespace rnn::cpu::RNN_ISA {

template <class Cell, class IO>
class BackwardLoop : LoopBase<IO> {
  using Base = LoopBase<IO>;
  using Base::kLanes, Base::left, Base::load_or_zero, Base::padded;
  using typename Base::T, typename Base::V;
  static constexpr int kWidth = kMaxVectors;

 public:
  BackwardLoop(const Backward<IO>& p, void* workspace) : p_(p), arena_(workspace) {
    const Sequence& q = p.seq;
    for (int64_t d = 0; d < q.D; ++d) {
      Direction& dir = directions_[d];
      dir.hidden = {nullptr, Cell::G * q.H, q.R, 1, kWidth};
      dir.hidden.data = arena_.take<T>(dir.hidden.size());
      for (T*& dgh : dir.dgh) dgh = arena_.take<T>(q.B * Cell::G * q.H);
      dir.dh = arena_.take<T>(q.B * padded(q.R));
      if (Cell::S > 1) dir.dc = arena_.take<T>(q.B * padded(q.H));
      if (p.w_hr[d]) {
        dir.projection = {nullptr, q.R, q.H, 1, kWidth};
        dir.projection.data = arena_.take<T>(dir.projection.size());
        dir.dprojected = arena_.take<T>(q.B * padded(q.R));
      }
    }
  }

  int64_t workspace_bytes() const { return arena_.used(); }

  Plan plan(int threads) const { return Base::plan(p_.seq, directions_[0].hidden, Cell::G, threads); }

  void prepare(int thread, int threads) {
    const Sequence& q = p_.seq;
    for (int64_t d = 0; d < q.D; ++d) {
      Direction& dir = directions_[d];
      for (int64_t j = thread; j < dir.hidden.tiles(); j += threads) dir.hidden.pack(p_.w_hh[d], j);
      if (dir.dprojected) {
        for (int64_t j = thread; j < dir.projection.tiles(); j += threads) dir.projection.pack(p_.w_hr[d], j);
      }
      for (int64_t b = thread; b < q.B; b += threads) {
        for (int64_t i = 0; i < Cell::G * q.H; ++i) dir.dgh[q.T & 1][b * Cell::G * q.H + i] = T(0);
        for (int64_t i = 0; i < q.R; i += kLanes)
          store(dir.dh + b * padded(q.R) + i, load_or_zero(p_.dh_n, q.state_at(d, b, q.R) + i, left(q.R, i)));
        for (int64_t i = 0; Cell::S > 1 && i < q.H; i += kLanes)
          store(dir.dc + b * padded(q.H) + i, load_or_zero(p_.dc_n, q.state_at(d, b, q.H) + i, left(q.H, i)));
      }
    }
  }

  void run(const Share& share, Barrier& barrier) {
    for (int64_t d = share.first_direction; d < share.last_direction; ++d) run_direction(d, share, barrier);
  }

 private:
  struct Direction {
    Panels<T> hidden;         // W_hh
    Panels<T> projection;     // W_hr
    T* dgh[2] = {};           // [B, G*H] each: gradient of gh of the step after an odd and an even one
    T* dh = nullptr;          // [B, R]: what reaches h of this step around W_hh
    T* dc = nullptr;          // [B, H]
    T* dprojected = nullptr;  // [B, R]: gradient of the projected h of this step
  };

  void run_direction(int64_t d, const Share& share, Barrier& barrier) {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    const int64_t gates = Cell::G * q.H;
    for (int64_t s = q.T - 1; s >= 0; --s) {
      const T* dgh = dir.dgh[(s + 1) & 1];
      T* dgh_next = dir.dgh[s & 1];
      // The product carries what comes from step s + 1: there is none where that step is not active.
      Base::for_tiles(q, dir.hidden, dgh, gates, s + 1, share, [&](int64_t b, int64_t j, const T* dh) {
        if (dir.dprojected) {
          project(d, b, s, j, dh);
        } else {
          cell(d, b, s, j, dh, dgh_next);
        }
      });
      barrier.wait(share.size);
      if (!dir.dprojected) continue;
      Base::for_tiles(q, dir.projection, dir.dprojected, padded(q.R), s, share,
                      [&](int64_t b, int64_t j, const T* dh) { cell(d, b, s, j, dh, dgh_next); });
      barrier.wait(share.size);
    }
    Base::for_tiles(q, dir.hidden, dir.dgh[0], gates, 0, share, [&](int64_t b, int64_t j, const T* dh) {
      for (int u = 0; u < kWidth; ++u) {
        const int64_t i = (j * kWidth + u) * kLanes;
        if (i >= q.R) break;
        store(p_.dh0 + q.state_at(d, b, q.R) + i, load(dh + u * kLanes) + load(dir.dh + b * padded(q.R) + i),
              left(q.R, i));
      }
    });
    for (int64_t b = share.first_row + share.rank; Cell::S > 1 && b < share.last_row; b += share.size) {
      for (int64_t i = 0; i < q.H; i += kLanes)
        store(p_.dc0 + q.state_at(d, b, q.H) + i, load(dir.dc + b * padded(q.H) + i), left(q.H, i));
    }
  }

  // The gradient of the projected units of tile j of row b. dh [vectors, lanes] came through W_hh.
  void project(int64_t d, int64_t b, int64_t s, int64_t j, const T* dh_tile) {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    const bool active = s < q.length(b);
    const int64_t t = active ? q.position(d, b, s) : s;
    for (int u = 0; u < kWidth; ++u) {
      const int64_t i = (j * kWidth + u) * kLanes;
      if (i >= q.R) break;
      const int n = left(q.R, i);
      V dh(T(0));
      if (active) {
        T* around = dir.dh + b * padded(q.R) + i;
        dh = load(dh_tile + u * kLanes) + load(around) + load_or_zero(p_.dy, q.at(t, b, d, q.R) + i, n);
        store(around, V(T(0)));
      }
      store(dir.dprojected + b * padded(q.R) + i, dh);
      store(p_.dproj + q.at(t, b, d, q.R) + i, dh, n);
    }
  }

  // One step back of the units of tile j of row b. dh_tile [vectors, lanes] came through W_hh, or through W_hr.
  void cell(int64_t d, int64_t b, int64_t s, int64_t j, const T* dh_tile, T* dgh_next) {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    const bool active = s < q.length(b);
    const int64_t t = active ? q.position(d, b, s) : s;
    for (int u = 0; u < kWidth; ++u) {
      const int64_t i = (j * kWidth + u) * kLanes;
      if (i >= q.H) break;
      const int n = left(q.H, i);
      T* carried = dgh_next + b * Cell::G * q.H + i;
      IO* dgates = p_.dgates + q.at(t, b, d, (Cell::G + Cell::A) * q.H) + i;
      if (!active) {
        for (int g = 0; g < Cell::G; ++g) store(carried + g * q.H, V(T(0)), n);
        for (int g = 0; g < Cell::G + Cell::A; ++g) store(dgates + g * q.H, V(T(0)), n);
        continue;
      }
      const bool cut = q.cut_before(d, b, s);
      V saved[Cell::K + 1], prev[Cell::S], next[Cell::S], dnext[Cell::S], dgx[Cell::G], dgh[Cell::G], dprev[Cell::S];
      for (int k = 0; k < Cell::K; ++k) saved[k] = load(p_.saved + q.at(t, b, d, Cell::K * q.H) + k * q.H + i, n);
      dnext[0] = load(dh_tile + u * kLanes);
      if (dir.dprojected) {  // h before the projection: no cell with a projection asks for its value
        prev[0] = next[0] = V(T(0));
      } else {
        prev[0] = before(p_.h0, p_.y, d, b, s, q.R, i, n, cut);
        next[0] = load(p_.y + q.at(t, b, d, q.R) + i, n);
        dnext[0] += load(dir.dh + b * padded(q.R) + i) + load_or_zero(p_.dy, q.at(t, b, d, q.R) + i, n);
      }
      if constexpr (Cell::S > 1) {
        prev[1] = before(p_.c0, p_.c, d, b, s, q.H, i, n, cut);
        next[1] = load(p_.c + q.at(t, b, d, q.H) + i, n);
        dnext[1] = load(dir.dc + b * padded(q.H) + i) + load_or_zero(p_.dc, q.at(t, b, d, q.H) + i, n);
      }

      Cell::backward(saved, prev, next, dnext, dgx, dgh, dprev);

      for (int g = 0; g < Cell::G; ++g) {
        store(dgates + g * q.H, dgx[g], n);
        store(carried + g * q.H, cut ? V(T(0)) : dgh[g], n);
      }
      for (int a = 0; a < Cell::A; ++a) store(dgates + (Cell::G + a) * q.H, dgh[Cell::G - Cell::A + a], n);
      if (!dir.dprojected) store(dir.dh + b * padded(q.R) + i, cut ? V(T(0)) : dprev[0]);
      if constexpr (Cell::S > 1) store(dir.dc + b * padded(q.H) + i, cut ? V(T(0)) : dprev[1]);
    }
  }

  // The state that entered step s: from all states [T, B, D, width], or from the initial ones.
  V before(const IO* initial, const IO* all, int64_t d, int64_t b, int64_t s, int64_t width, int64_t i, int n,
           bool cut) const {
    const Sequence& q = p_.seq;
    if (cut) return V(T(0));
    if (s == 0) return load(initial + q.state_at(d, b, width) + i, n);
    return load(all + q.at(q.position(d, b, s - 1), b, d, width) + i, n);
  }

  const Backward<IO>& p_;
  Arena arena_;
  Direction directions_[kMaxDirections];
};

}  // namespace rnn::cpu::RNN_ISA
