// What one thread does in one step of the stepwise algorithm: one unit of one row of one direction. The matrix products
// come before, each for all directions and rows at once; what follows a product is here.
//
// A step is a struct of pointers with unit<Cell>(d, b, i), which a launcher calls for every direction d, row b and unit
// i < width(). Units are independent of each other, and a unit reads before it writes, so a state is updated in place
// and `saved` may be gx itself. Nothing here needs a GPU: the same text runs on a CPU, where it is tested.
#pragma once

#include "common/cells.h"
#include "common/layout.h"
#include "cuda/scalar.cuh"

namespace rnn::cuda {

// Does step s of row b of direction d take place, with the state that the step before left? Where not, what a product
// made of that state, or of the gradient that came back to it, counts for nothing: it is never read.
RNN_HD bool linked(const Sequence& q, int64_t d, int64_t b, int64_t s) {
  return s < q.length(b) && !q.cut_before(d, b, s);
}

// Where row b reads and writes at step s: past its end at position s, which is zeroed.
struct Place {
  bool active;
  int64_t t;

  RNN_HD Place(const Sequence& q, int64_t d, int64_t b, int64_t s)
      : active(s < q.length(b)), t(active ? q.position(d, b, s) : s) {}
};

// The gates of step s, after gh = W_hh h.
template <class IO>
struct ForwardCell {
  using V = Scalar<Arithmetic<IO>>;
  static constexpr bool kOfCell = true;

  Forward<IO> call;
  int64_t s;
  const IO* gh;       // [D, B, G*H]
  IO* h;              // [D, B, R]: state, kept as the product takes it
  Arithmetic<IO>* c;  // [D, B, H] or null
  IO* raw;            // [D, B, H] or null: no projection, R = H

  RNN_HD const Sequence& sequence() const { return call.seq; }
  RNN_HD int64_t width() const { return call.seq.H; }

  template <class Cell>
  RNN_HD void unit(int64_t d, int64_t b, int64_t i) const {
    const Sequence& q = call.seq;
    const Place place(q, d, b, s);
    const int64_t state = q.state_at(d, b, q.H) + i;
    V next[Cell::S], saved[Cell::K + 1];
    for (V& x : next) x = V(0);
    for (V& x : saved) x = V(0);
    if (place.active) {
      const bool cut = q.cut_before(d, b, s);
      const IO* b_ih = d == 0 ? call.b_ih[0] : call.b_ih[1];
      const IO* b_hh = d == 0 ? call.b_hh[0] : call.b_hh[1];
      V gx[Cell::G], hidden[Cell::G], prev[Cell::S];
      for (int g = 0; g < Cell::G; ++g) {
        gx[g] = load(call.gx + q.at(place.t, b, d, Cell::G * q.H) + g * q.H + i) + load_or_zero(b_ih, g * q.H + i);
        hidden[g] = load_or_zero(b_hh, g * q.H + i);
        if (!cut) hidden[g] += load(gh + q.state_at(d, b, Cell::G * q.H) + g * q.H + i);
      }
      prev[0] = cut || raw ? V(0) : load(h + state);  // no cell with a projection asks for its own h
      if constexpr (Cell::S > 1) prev[1] = cut ? V(0) : load(c + state);

      Cell::forward(gx, hidden, prev, next, saved);

      store(raw ? raw + state : h + state, next[0]);
      if constexpr (Cell::S > 1) store(c + state, next[1]);
    }
    if (call.saved) {
      for (int k = 0; k < Cell::K; ++k) store(call.saved + q.at(place.t, b, d, Cell::K * q.H) + k * q.H + i, saved[k]);
    }
    const int64_t at = q.at(place.t, b, d, q.H) + i;
    if (!raw) store(call.y + at, next[0]);
    if (call.h_raw) store(call.h_raw + at, next[0]);
    if constexpr (Cell::S > 1) {
      if (call.c) store(call.c + at, next[1]);
    }
  }
};

// The projected h of step s, after projected = W_hr raw.
template <class IO>
struct ForwardProject {
  using V = Scalar<Arithmetic<IO>>;
  static constexpr bool kOfCell = false;

  Forward<IO> call;
  int64_t s;
  const IO* projected;  // [D, B, R]
  IO* h;                // [D, B, R]

  RNN_HD const Sequence& sequence() const { return call.seq; }
  RNN_HD int64_t width() const { return call.seq.R; }

  template <class>
  RNN_HD void unit(int64_t d, int64_t b, int64_t i) const {
    const Sequence& q = call.seq;
    const Place place(q, d, b, s);
    const int64_t state = q.state_at(d, b, q.R) + i;
    const V value = place.active ? load(projected + state) : V(0);
    store(call.y + q.at(place.t, b, d, q.R) + i, value);
    if (place.active) store(h + state, value);
  }
};

// The gradient of the projected h of step s, after dh_through = dgh W_hh of the gates of step s + 1.
template <class IO>
struct BackwardProject {
  using V = Scalar<Arithmetic<IO>>;
  static constexpr bool kOfCell = false;

  Backward<IO> call;
  int64_t s;
  const IO* dh_through;  // [D, B, R]
  Arithmetic<IO>* dh;    // [D, B, R]: what reaches h around W_hh
  IO* dprojected;        // [D, B, R]

  RNN_HD const Sequence& sequence() const { return call.seq; }
  RNN_HD int64_t width() const { return call.seq.R; }

  template <class>
  RNN_HD void unit(int64_t d, int64_t b, int64_t i) const {
    const Sequence& q = call.seq;
    const Place place(q, d, b, s);
    const int64_t state = q.state_at(d, b, q.R) + i, at = q.at(place.t, b, d, q.R) + i;
    V value(0);
    if (place.active) {
      value = load(dh + state) + load_or_zero(call.dy, at);
      if (linked(q, d, b, s + 1)) value += load(dh_through + state);
      store(dh + state, V(0));
      store(dprojected + state, value);
    }
    store(call.dproj + at, value);
  }
};

// The gradients of the gates of step s, after dh_through = dgh W_hh of the gates of step s + 1; or, where h is
// projected, after draw = dprojected W_hr of step s.
template <class IO>
struct BackwardCell {
  using V = Scalar<Arithmetic<IO>>;
  static constexpr bool kOfCell = true;

  Backward<IO> call;
  int64_t s;
  const IO* dh_through;  // [D, B, R]
  const IO* draw;        // [D, B, H] or null: no projection, R = H
  Arithmetic<IO>* dh;    // [D, B, R]: what reaches h around W_hh
  Arithmetic<IO>* dc;    // [D, B, H] or null
  IO* dgh;               // [D, B, G*H]

  RNN_HD const Sequence& sequence() const { return call.seq; }
  RNN_HD int64_t width() const { return call.seq.H; }

  template <class Cell>
  RNN_HD void unit(int64_t d, int64_t b, int64_t i) const {
    const Sequence& q = call.seq;
    const Place place(q, d, b, s);
    V dgx[Cell::G], dhidden[Cell::G];
    for (V& x : dgx) x = V(0);
    for (V& x : dhidden) x = V(0);
    if (place.active) gates<Cell>(d, b, i, place.t, dgx, dhidden);
    IO* dgates = call.dgates + q.at(place.t, b, d, (Cell::G + Cell::A) * q.H) + i;
    for (int g = 0; g < Cell::G; ++g) store(dgates + g * q.H, dgx[g]);
    for (int a = 0; a < Cell::A; ++a) store(dgates + (Cell::G + a) * q.H, dhidden[Cell::G - Cell::A + a]);
  }

 private:
  template <class Cell>
  RNN_HD void gates(int64_t d, int64_t b, int64_t i, int64_t t, V* dgx, V* dhidden) const {
    const Sequence& q = call.seq;
    const int64_t state = q.state_at(d, b, q.H) + i, at = q.at(t, b, d, q.H) + i;
    const bool cut = q.cut_before(d, b, s);
    V saved[Cell::K + 1], prev[Cell::S], next[Cell::S], dnext[Cell::S], dprev[Cell::S];
    for (int k = 0; k < Cell::K; ++k) saved[k] = load(call.saved + q.at(t, b, d, Cell::K * q.H) + k * q.H + i);
    if (draw) {  // h before the projection: no cell with a projection asks for its value
      prev[0] = next[0] = V(0);
      dnext[0] = load(draw + state);
    } else {
      prev[0] = cut ? V(0) : before(call.h0, call.y, d, b, i);
      next[0] = load(call.y + at);
      dnext[0] = load(dh + state) + load_or_zero(call.dy, at);
      if (linked(q, d, b, s + 1)) dnext[0] += load(dh_through + state);
    }
    if constexpr (Cell::S > 1) {
      prev[1] = cut ? V(0) : before(call.c0, call.c, d, b, i);
      next[1] = load(call.c + at);
      dnext[1] = load(dc + state) + load_or_zero(call.dc, at);
    }

    Cell::backward(saved, prev, next, dnext, dgx, dhidden, dprev);

    for (int g = 0; g < Cell::G; ++g) store(dgh + q.state_at(d, b, Cell::G * q.H) + g * q.H + i, dhidden[g]);
    if (!draw) store(dh + state, cut ? V(0) : dprev[0]);
    if constexpr (Cell::S > 1) store(dc + state, cut ? V(0) : dprev[1]);
  }

  // The state that entered step s, where it is no cut: from all states [T, B, D, H], or from the initial ones.
  RNN_HD V before(const IO* initial, const IO* all, int64_t d, int64_t b, int64_t i) const {
    const Sequence& q = call.seq;
    return s == 0 ? load(initial + q.state_at(d, b, q.H) + i)
                  : load(all + q.at(q.position(d, b, s - 1), b, d, q.H) + i);
  }
};

// The gradient of h0, after dh_through = dgh W_hh of the gates of step 0.
template <class IO>
struct BackwardFinish {
  static constexpr bool kOfCell = false;

  Sequence seq;
  const IO* dh_through;  // [D, B, R]
  Arithmetic<IO>* dh;    // [D, B, R]

  RNN_HD const Sequence& sequence() const { return seq; }
  RNN_HD int64_t width() const { return seq.R; }

  template <class>
  RNN_HD void unit(int64_t d, int64_t b, int64_t i) const {
    const int64_t state = seq.state_at(d, b, seq.R) + i;
    if (linked(seq, d, b, 0)) store(dh + state, load(dh + state) + load(dh_through + state));
  }
};

// Calls f(Cell{}) for the cell with this number if the step has a text per cell, else once.
struct AnyCell {};
template <class Step, class F>
void dispatch_step(int cell, F&& f) {
  if constexpr (Step::kOfCell) {
    dispatch_cell(cell, static_cast<F&&>(f));
  } else {
    f(AnyCell{});
  }
}

}  // namespace rnn::cuda
