// One step of a vector of units of one row in one direction: what surrounds the cell, for the loops over time and for
// the single step alike. It reads what a call's tensors hold for the step, treats padding and resets, and writes what
// the call keeps. Whose the products are and where the state stays in between is the caller's matter.
//
// Units that a vector has beyond the last are computed and not written: `n` of them exist.
#pragma once

#include "common/cell_list.h"
#include "common/layout.h"
#include "cpu/math.h"
#include "cpu/noise.h"

namespace rnn::cpu::RNN_ISA {

// A row of units as vectors of them.
template <class IO>
struct Lanes {
  using T = Arithmetic<IO>;
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;

  // How many of n units the vector from unit i on has.
  static int left(int64_t n, int64_t i) { return n - i < kLanes ? int(n - i) : kLanes; }
  static V load_or_zero(const IO* p, int64_t offset, int n) { return p ? load(p + offset, n) : V(T(0)); }
};

// Where unit i of state k >= 1 is found at place n of what holds all states beside h, [.., C*H].
template <class Cell>
RNN_HD int64_t beside(int64_t n, int k, int64_t H, int64_t i) {
  return (n * (Cell::S - 1) + k - 1) * H + i;
}

// What a row does at a step of a loop.
struct RowStep {
  int64_t n;     // its place in a [T, B, D, ...] tensor
  bool active;   // else the row has no such step, and this is padding: its state stands still, its results are zero
  bool outside;  // not even padding: there is nothing to write
  bool cut;      // a reset lies between this step and the loop's next one, which is handed zeros
  int64_t t, b;  // position in time and row of the batch, of a step that is there

  // Forward goes on to step s + 1, backward to step s - 1.
  static RowStep forward(const Sequence& q, int64_t d, const Row& row, int64_t s) {
    const Place at = q.place(d, row, s);
    const bool cut = s + 1 < row.length && q.cut_before(d, row, s + 1);
    return {at.n, at.active, at.outside, cut, q.position(d, row, s), row.b};
  }
  static RowStep backward(const Sequence& q, int64_t d, const Row& row, int64_t s) {
    const Place at = q.place(d, row, s);
    const bool cut = at.active && q.cut_before(d, row, s);
    return {at.n, at.active, at.outside, cut, q.position(d, row, s), row.b};
  }

  // Forward's next step of a row that is as long as the sequence and has no resets.
  void go_on(const Sequence& q, int64_t d) {
    n += q.turned(d) ? -q.B * q.D : q.B * q.D;
    t += q.turned(d) ? -1 : 1;
  }

  // x as the next step of the loop gets it.
  template <class V>
  RNN_HD V handed_on(V x) const {
    return cut ? V(0) : x;
  }
};

// Where the state that entered a step is found. Zeros that entered are found nowhere.
struct StateBefore {
  bool zero;
  bool initial;
  int64_t n;  // its place in [D, B, ...] where it is an initial one, else in [T, B, D, ...]

  // `linked`: whether there is such a step, and its state comes from the one before.
  static StateBefore of(const Sequence& q, int64_t d, const Row& row, int64_t s, bool linked) {
    if (!linked) return {true, false, 0};
    if (s == 0 && q.first(d, row)) return {false, true, q.state_at(d, row.b, 1)};
    return {false, false, q.before(d, row, s)};
  }

  // `width` numbers are at each place, and those from i on are asked for.
  template <class IO>
  RNN_HD Vec<Arithmetic<IO>> load(const IO* initial_states, const IO* states, int64_t width, int64_t i,
                                  int count) const {
    if (zero) return Vec<Arithmetic<IO>>(Arithmetic<IO>(0));
    return RNN_ISA::load((initial ? initial_states : states) + n * width + i, count);
  }
};

// Forward. The caller fills in gx and gh, of a step that is there, and prev; where h is projected its own value is
// neither known nor asked for. Behind the states, prev has the parameters of the cell, which stand still, and then its
// noise.
template <class Cell, class IO>
struct ForwardUnit : Lanes<IO> {
  using typename Lanes<IO>::V;
  static constexpr int P = CellSizes::of(Cell{}).P, E = CellSizes::of(Cell{}).E;
  V gx[Cell::G], gh[Cell::G], prev[Cell::S + P + E], next[Cell::S], saved[Cell::K + 1];

  RNN_HD void read_parameters(const IO* unit, int64_t H, int64_t i, int n) {
    for (int k = 0; k < P; ++k) prev[Cell::S + k] = load(unit + k * H + i, n);
  }

  // Of a step that is there.
  RNN_HD void draw(const Noise& noise, int64_t d, const RowStep& now, int64_t i) {
    if constexpr (E > 0) draw_noise<E>(noise, now.b, now.t, d, i, prev + Cell::S + P);
  }

  RNN_HD void run(const RowStep& now) {
    if (now.active) {
      Cell::forward(gx, gh, prev, next, saved);
    } else {
      for (V& x : next) x = V(0);
      for (V& x : saved) x = V(0);
    }
  }

  // State k after the step, as the next one gets it.
  RNN_HD V state(const RowStep& now, int k) const { return now.active ? now.handed_on(next[k]) : prev[k]; }

  RNN_HD void write(const Forward<IO>& p, const RowStep& now, int64_t i, int n, bool projected) const {
    write_all_but_h(p, now, i, n);
    write_h(p, now, i, n, projected, next[0]);
  }
  RNN_HD void write_all_but_h(const Forward<IO>& p, const RowStep& now, int64_t i, int n) const {
    const int64_t H = p.seq.H;
    for (int k = 0; p.saved && k < Cell::K; ++k) store(p.saved + (now.n * Cell::K + k) * H + i, saved[k], n);
    for (int k = 1; p.c && k < Cell::S; ++k) store(p.c + beside<Cell>(now.n, k, H, i), next[k], n);
  }
  static RNN_HD void write_h(const Forward<IO>& p, const RowStep& now, int64_t i, int n, bool projected, V h) {
    const int64_t at = now.n * p.seq.H + i;
    if (!projected) {
      store(p.y + at, h, n);
    } else if (p.h_raw) {
      store(p.h_raw + at, h, n);
    }
  }
};

// Backward. The caller reads, and then fills in dnext: dout, which is what reaches the step's results from outside of
// the loop, and all that comes from the step after it. Behind the states, prev and dprev have the parameters of the
// cell, and what the step adds to their gradients; prev then has its noise.
template <class Cell, class IO>
struct BackwardUnit : Lanes<IO> {
  using typename Lanes<IO>::V;
  using Lanes<IO>::load_or_zero;
  static constexpr int P = CellSizes::of(Cell{}).P, E = CellSizes::of(Cell{}).E;
  static constexpr int kColumns = CellSizes::of(Cell{}).columns();  // of dgates
  V saved[Cell::K + 1], prev[Cell::S + P + E], next[Cell::S], dout[Cell::S], dnext[Cell::S];
  V dgx[Cell::G], dgh[Cell::G], dprev[Cell::S + P];

  // Of a step that is there.
  RNN_HD void read(const Backward<IO>& p, int64_t d, const RowStep& now, const StateBefore& before, int64_t i, int n,
                   bool projected) {
    const int64_t H = p.seq.H, at = now.n * H + i;
    const IO* unit = p.seq.of_head(p.unit, d, P * H);
    for (int k = 0; k < P; ++k) prev[Cell::S + k] = load(unit + k * H + i, n);
    if constexpr (E > 0) draw_noise<E>(p.noise, now.b, now.t, d, i, prev + Cell::S + P);
    for (int k = 0; k < Cell::K; ++k) saved[k] = load(p.saved + (now.n * Cell::K + k) * H + i, n);
    if (projected) {  // h before the projection: no cell with a projection asks for its value
      prev[0] = next[0] = dout[0] = V(0);
    } else {
      prev[0] = before.load(p.h0, p.y, H, i, n);
      next[0] = load(p.y + at, n);
      dout[0] = load_or_zero(p.dy, at, n);
    }
    for (int k = 1; k < Cell::S; ++k) {
      const int64_t at = beside<Cell>(now.n, k, H, i);
      prev[k] = before.load(p.c0, p.c, (Cell::S - 1) * H, beside<Cell>(0, k, H, i), n);
      next[k] = load(p.c + at, n);
      dout[k] = load_or_zero(p.dc, at, n);
    }
  }

  // The gradients of the gates, and dprev as the step before gets it: what goes around W_hh.
  RNN_HD void run(const RowStep& now) {
    if (now.active) {
      Cell::backward(saved, prev, next, dnext, dgx, dgh, dprev);
      for (int k = 0; k < Cell::S; ++k) dprev[k] = now.handed_on(dprev[k]);
    } else {
      for (V& x : dgx) x = V(0);
      for (V& x : dgh) x = V(0);
      for (int k = 0; k < P; ++k) dprev[Cell::S + k] = V(0);
    }
  }

  RNN_HD void write(const Backward<IO>& p, const RowStep& now, int64_t i, int n) const {
    if (!now.outside) put_columns(p.dgates + now.n * kColumns * p.seq.H + i, p.seq.H, n);
  }

  // The gradients in the order of dgates: `to` is of unit i, and columns are H apart.
  template <class To>
  RNN_HD void put_columns(To* to, int64_t H, int n) const {
    for (int g = 0; g < Cell::G; ++g) store(to + g * H, dgx[g], n);
    for (int a = 0; a < Cell::A; ++a) store(to + (Cell::G + a) * H, dgh[Cell::G - Cell::A + a], n);
  }
};

}  // namespace rnn::cpu::RNN_ISA
