// What one thread does in one step of the stepwise algorithm: one unit of one row of one direction. The matrix products
// come before, each for all directions and rows at once; what follows a product is here.
//
// A step is a struct of pointers with unit<Cell>(slot, i), which a launcher calls for every slot and unit i < width().
// Units are independent of each other, and a unit reads before it writes, so a state is updated in place and `saved`
// may be gx itself. Nothing here needs a GPU: the same text runs on a CPU, where it is tested.
#pragma once

#include "common/cells.h"
#include "common/layout.h"
#include "cuda/scalar.cuh"

namespace rnn::cuda {

// A row of the loop in one direction: the n-th of the D * rows() in a [D, rows, ...] tensor.
struct Slot {
  int64_t n, d;
  Row row;

  RNN_HD Slot(const Sequence& q, int64_t n) : n(n), d(n < q.rows() ? 0 : 1), row(q.row(n - d * q.rows())) {}
};

// Does step s take place, with the state that the step before left? Where not, what a product made of that state, or of
// the gradient that came back to it, counts for nothing: it is never read.
RNN_HD bool linked(const Sequence& q, const Slot& slot, int64_t s) {
  return s < slot.row.length && !q.cut_before(slot.d, slot.row, s);
}

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
  RNN_HD void unit(const Slot& slot, int64_t i) const {
    const Sequence& q = call.seq;
    const Place place = q.place(slot.d, slot.row, s);
    const int64_t state = slot.n * q.H + i;
    V next[Cell::S], saved[Cell::K + 1];
    for (V& x : next) x = V(0);
    for (V& x : saved) x = V(0);
    if (place.active) {
      const bool cut = q.cut_before(slot.d, slot.row, s);
      const IO* b_ih = slot.d == 0 ? call.b_ih[0] : call.b_ih[1];
      const IO* b_hh = slot.d == 0 ? call.b_hh[0] : call.b_hh[1];
      V gx[Cell::G], hidden[Cell::G], prev[Cell::S];
      for (int g = 0; g < Cell::G; ++g) {
        gx[g] = load(call.gx + place.n * Cell::G * q.H + g * q.H + i) + load_or_zero(b_ih, g * q.H + i);
        hidden[g] = load_or_zero(b_hh, g * q.H + i);
        if (!cut) hidden[g] += load(gh + slot.n * Cell::G * q.H + g * q.H + i);
      }
      prev[0] = cut || raw ? V(0) : load(h + state);  // no cell with a projection asks for its own h
      if constexpr (Cell::S > 1) prev[1] = cut ? V(0) : load(c + state);

      Cell::forward(gx, hidden, prev, next, saved);

      store(raw ? raw + state : h + state, next[0]);
      if constexpr (Cell::S > 1) store(c + state, next[1]);
    }
    if (call.saved) {
      for (int k = 0; k < Cell::K; ++k) store(call.saved + place.n * Cell::K * q.H + k * q.H + i, saved[k]);
    }
    const int64_t at = place.n * q.H + i;
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
  RNN_HD void unit(const Slot& slot, int64_t i) const {
    const Sequence& q = call.seq;
    const Place place = q.place(slot.d, slot.row, s);
    const int64_t state = slot.n * q.R + i;
    const V value = place.active ? load(projected + state) : V(0);
    store(call.y + place.n * q.R + i, value);
    if (place.active) store(h + state, value);
  }
};

// What the backward loop carries from launch to launch, [D, rows, ...]; null where there is none.
template <class IO>
struct Carried {
  Arithmetic<IO>* dh;  // [R]: what reaches h around W_hh
  Arithmetic<IO>* dc;  // [H]
  IO* dgh;             // [G*H]
  IO* dh_through;      // [R]: dgh W_hh of the gates of step s + 1
  IO* dprojected;      // [R]; no projection, R = H, where this and draw are null
  IO* draw;            // [H]: dprojected W_hr of step s
  double* unbounded;   // [(G+A)*H]: dgates before it is bounded by its norm
  double* norms;       // []: of the G gradients of gx in it
  double* all_dh;      // [T, B, D, R]: the whole gradient of every h, if asked for
};

// What reaches the last state of every row from outside.
template <class IO>
struct BackwardBegin {
  static constexpr bool kOfCell = false;

  Sequence seq;
  int64_t size;        // R or H
  const IO* from;      // [D, B, size] or null: zero
  Arithmetic<IO>* to;  // [D, rows, size]

  RNN_HD const Sequence& sequence() const { return seq; }
  RNN_HD int64_t width() const { return size; }

  template <class>
  RNN_HD void unit(const Slot& slot, int64_t i) const {
    const IO* outside = seq.last(slot.d, slot.row) ? from : nullptr;
    store(to + slot.n * size + i, load_or_zero(outside, seq.state_at(slot.d, slot.row.b, size) + i));
  }
};

// The gradient of the projected h of step s, after dh_through.
template <class IO>
struct BackwardProject {
  using V = Scalar<Arithmetic<IO>>;
  static constexpr bool kOfCell = false;

  Backward<IO> call;
  int64_t s;
  Carried<IO> carried;

  RNN_HD const Sequence& sequence() const { return call.seq; }
  RNN_HD int64_t width() const { return call.seq.R; }

  template <class>
  RNN_HD void unit(const Slot& slot, int64_t i) const {
    const Sequence& q = call.seq;
    const Place place = q.place(slot.d, slot.row, s);
    if (place.outside) return;
    const int64_t state = slot.n * q.R + i, at = place.n * q.R + i;
    V value(0);
    if (place.active) {
      value = load(carried.dh + state) + load_or_zero(call.dy, at);
      if (linked(q, slot, s + 1)) value += load(carried.dh_through + state);
      store(carried.dh + state, V(0));
      store(carried.dprojected + state, value);
      if (carried.all_dh) carried.all_dh[at] = value.v;
    }
    store(call.dproj + at, value);
  }
};

// Hands on the gate gradients of one unit and step, in the order of dgates: to the result, and to the next product.
template <class Cell, class IO>
RNN_HD void hand_on(const Backward<IO>& call, const Slot& slot, const Place& place, int64_t i,
                    const Scalar<Arithmetic<IO>>* dgates, IO* dgh) {
  const Sequence& q = call.seq;
  IO* result = call.dgates + place.n * (Cell::G + Cell::A) * q.H + i;
  for (int g = 0; g < Cell::G + Cell::A; ++g) store(result + g * q.H, dgates[g]);
  if (!place.active) return;
  dgh += slot.n * Cell::G * q.H + i;
  for (int g = 0; g < Cell::G; ++g) store(dgh + g * q.H, dgates[g < Cell::G - Cell::A ? g : g + Cell::A]);
}

// The gradients of the gates of step s, after dh_through; or, where h is projected, after draw.
template <class IO>
struct BackwardCell {
  using V = Scalar<Arithmetic<IO>>;
  static constexpr bool kOfCell = true;

  Backward<IO> call;
  int64_t s;
  Carried<IO> carried;

  RNN_HD const Sequence& sequence() const { return call.seq; }
  RNN_HD int64_t width() const { return call.seq.H; }

  template <class Cell>
  RNN_HD void unit(const Slot& slot, int64_t i) const {
    const Sequence& q = call.seq;
    const Place place = q.place(slot.d, slot.row, s);
    if (place.outside) return;
    V dgates[Cell::G + Cell::A];
    for (V& x : dgates) x = V(0);
    if (place.active) gates<Cell>(slot, place, i, dgates);
    if (carried.unbounded) {
      double* kept = carried.unbounded + slot.n * (Cell::G + Cell::A) * q.H + i;
      for (int g = 0; g < Cell::G + Cell::A; ++g) kept[g * q.H] = dgates[g].v;
      return;
    }
    if (call.clip.kind != Clip::kNone) {
      for (V& x : dgates) x = call.clip.template elementwise<Arithmetic<IO>>(x);
    }
    hand_on<Cell>(call, slot, place, i, dgates, carried.dgh);
  }

 private:
  template <class Cell>
  RNN_HD void gates(const Slot& slot, const Place& place, int64_t i, V* dgates) const {
    const Sequence& q = call.seq;
    const int64_t state = slot.n * q.H + i, at = place.n * q.H + i;
    const bool cut = q.cut_before(slot.d, slot.row, s);
    V saved[Cell::K + 1], prev[Cell::S], next[Cell::S], dnext[Cell::S], dprev[Cell::S], dhidden[Cell::G];
    for (int k = 0; k < Cell::K; ++k) saved[k] = load(call.saved + place.n * Cell::K * q.H + k * q.H + i);
    if (carried.draw) {  // h before the projection: no cell with a projection asks for its value
      prev[0] = next[0] = V(0);
      dnext[0] = load(carried.draw + state);
    } else {
      prev[0] = cut ? V(0) : before(call.h0, call.y, slot, place, i);
      next[0] = load(call.y + at);
      dnext[0] = load(carried.dh + state) + load_or_zero(call.dy, at);
      if (linked(q, slot, s + 1)) dnext[0] += load(carried.dh_through + state);
      if (carried.all_dh) carried.all_dh[at] = dnext[0].v;
    }
    if constexpr (Cell::S > 1) {
      prev[1] = cut ? V(0) : before(call.c0, call.c, slot, place, i);
      next[1] = load(call.c + at);
      dnext[1] = load(carried.dc + state) + load_or_zero(call.dc, at);
    }

    Cell::backward(saved, prev, next, dnext, dgates, dhidden, dprev);

    for (int a = 0; a < Cell::A; ++a) dgates[Cell::G + a] = dhidden[Cell::G - Cell::A + a];
    if (!carried.draw) store(carried.dh + state, cut ? V(0) : dprev[0]);
    if constexpr (Cell::S > 1) store(carried.dc + state, cut ? V(0) : dprev[1]);
  }

  // The state that entered step s, where it is no cut: from all states [T, B, D, H], or from the initial ones.
  RNN_HD V before(const IO* initial, const IO* all, const Slot& slot, const Place& place, int64_t i) const {
    const Sequence& q = call.seq;
    if (s == 0 && q.first(slot.d, slot.row)) return load(initial + q.state_at(slot.d, slot.row.b, q.H) + i);
    return load(all + q.before(slot.d, place) * q.H + i);
  }
};

// The gradients of the gates of step s bounded by their norms.
template <class IO>
struct BackwardBound {
  using V = Scalar<Arithmetic<IO>>;
  static constexpr bool kOfCell = true;

  Backward<IO> call;
  int64_t s;
  Carried<IO> carried;

  RNN_HD const Sequence& sequence() const { return call.seq; }
  RNN_HD int64_t width() const { return call.seq.H; }

  template <class Cell>
  RNN_HD void unit(const Slot& slot, int64_t i) const {
    const Sequence& q = call.seq;
    const Place place = q.place(slot.d, slot.row, s);
    if (place.outside) return;
    const double norm = carried.norms[slot.n], factor = call.clip.factor(norm * norm);
    const double* kept = carried.unbounded + slot.n * (Cell::G + Cell::A) * q.H + i;
    V dgates[Cell::G + Cell::A];
    for (int g = 0; g < Cell::G + Cell::A; ++g) dgates[g] = V(Arithmetic<IO>(kept[g * q.H] * factor));
    hand_on<Cell>(call, slot, place, i, dgates, carried.dgh);
  }
};

// The gradient of an initial state, from the windows that start there; of h after dh_through, of the gates of step 0.
template <class IO>
struct BackwardFinish {
  using V = Scalar<Arithmetic<IO>>;
  static constexpr bool kOfCell = false;

  Sequence seq;
  int64_t size;                // R or H
  const IO* through;           // [D, rows, size] or null
  const Arithmetic<IO>* from;  // [D, rows, size]
  IO* to;                      // [D, B, size]

  RNN_HD const Sequence& sequence() const { return seq; }
  RNN_HD int64_t width() const { return size; }

  template <class>
  RNN_HD void unit(const Slot& slot, int64_t i) const {
    if (!seq.first(slot.d, slot.row)) return;
    const int64_t state = slot.n * size + i;
    V value = load(from + state);
    if (through && linked(seq, slot, 0)) value += load(through + state);
    store(to + seq.state_at(slot.d, slot.row.b, size) + i, value);
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
