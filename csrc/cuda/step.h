// What one thread does in one step of the stepwise algorithm: one unit of one row of one direction. The matrix products
// come before, each for all directions and rows at once; what follows a product is here.
//
// A step is a struct of pointers with unit<Cell>(slot, i), which a launcher calls for every slot and unit i < width().
// Units are independent of each other, and a unit reads before it writes, so a state is updated in place and `saved`
// may be gx itself. Nothing here needs a GPU: the same text runs on a CPU, where it is tested.
#pragma once

#include "cuda/unit.h"

namespace rnn::cuda {

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
    const int64_t state = slot.n * q.H + i;
    ForwardUnit<Cell, IO> unit(call, slot, s, i);
    V through[Cell::G], carried[Cell::S];
    if (unit.place.active) {
      for (int g = 0; g < Cell::G; ++g) through[g] = load(gh + slot.n * Cell::G * q.H + g * q.H + i);
      if (!raw) carried[0] = load(h + state);
      if constexpr (Cell::S > 1) carried[1] = load(c + state);
    }
    const Biases<Cell, IO> biases(call, slot.d, i);
    unit.run(0, biases, through, carried, raw != nullptr);
    unit.write(call, i, raw != nullptr);
    if (!unit.place.active) return;
    store(raw ? raw + state : h + state, carried[0]);
    if constexpr (Cell::S > 1) store(c + state, carried[1]);
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
    if (place.outside) return;
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
  IO* dprojected;      // [R]; no projection, R = H, where this and dh_raw are null
  IO* dh_raw;          // [H]: dprojected W_hr of step s
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
RNN_HD void hand_on(const Backward<IO>& call, const BackwardUnit<Cell, IO>& unit, const Slot& slot, int64_t i,
                    IO* dgh) {
  const int64_t H = call.seq.H;
  unit.write(call, i);
  if (!unit.place.active) return;
  dgh += slot.n * Cell::G * H + i;
  for (int g = 0; g < Cell::G; ++g) store(dgh + g * H, unit.dgates[unit.of_hidden(g)]);
}

// The gradients of the gates of step s, after dh_through; or, where h is projected, after dh_raw.
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
    const int64_t state = slot.n * q.H + i;
    BackwardUnit<Cell, IO> unit(call, slot, s, i, carried.dh_raw != nullptr);
    if (unit.place.outside) return;
    V around[Cell::S], dh(0);
    if (unit.place.active) {
      if (carried.dh_raw) {
        dh = load(carried.dh_raw + state);
      } else {
        dh = unit.dh(load(carried.dh + state), unit.linked_after ? load(carried.dh_through + state) : V(0));
        if (carried.all_dh) carried.all_dh[unit.place.n * q.H + i] = dh.v;
      }
      if constexpr (Cell::S > 1) around[1] = load(carried.dc + state);
    }
    unit.run(0, dh, around);
    if (unit.place.active) {
      if (!carried.dh_raw) store(carried.dh + state, around[0]);
      if constexpr (Cell::S > 1) store(carried.dc + state, around[1]);
    }
    if (carried.unbounded) {
      double* kept = carried.unbounded + slot.n * unit.kGates * q.H + i;
      for (int g = 0; g < unit.kGates; ++g) kept[g * q.H] = unit.dgates[g].v;
      return;
    }
    if (call.clip.kind != Clip::kNone) {
      for (V& x : unit.dgates) x = call.clip.template elementwise<Arithmetic<IO>>(x);
    }
    hand_on(call, unit, slot, i, carried.dgh);
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
    BackwardUnit<Cell, IO> unit;
    unit.place = q.place(slot.d, slot.row, s);
    if (unit.place.outside) return;
    const double norm = carried.norms[slot.n], factor = call.clip.factor(norm * norm);
    const double* kept = carried.unbounded + slot.n * (Cell::G + Cell::A) * q.H + i;
    for (int g = 0; g < Cell::G + Cell::A; ++g) unit.dgates[g] = V(Arithmetic<IO>(kept[g * q.H] * factor));
    hand_on(call, unit, slot, i, carried.dgh);
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
