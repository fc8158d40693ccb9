// What one thread does in one step of the stepwise algorithm: one unit of one row of one direction. The matrix products
// come before, each for all directions and rows at once; what follows a product is here.
//
// A step is a struct of pointers with unit<Cell>(slot, i), which a launcher calls for every slot and unit i <
// units_of(). Units are independent of each other, and a unit reads before it writes, so a state is updated in place
// and `saved` may be gx itself. Nothing here needs a GPU: the same text runs on a CPU, where it is tested.
//
// What a step says of itself, where it is so: kOfCell, it has a text per cell; kNormed, per cell whose products are
// normalised; kOfEmitted, of these for cells that emit alone; kOfRow, it is one of rows (row_pair.h).
#pragma once

#include "cuda/unit.h"

namespace rnn::cuda {

// That of a step's call, unless it has another.
template <class Step>
RNN_HD const Sequence& sequence_of(const Step& step) {
  if constexpr (requires { step.call; }) {
    return step.call.seq;
  } else {
    return step.seq;
  }
}

// As many as there are hidden units, unless the step says otherwise.
template <class Step>
RNN_HD int64_t units_of(const Step& step) {
  if constexpr (requires { step.width(); }) {
    return step.width();
  } else {
    return sequence_of(step).H;
  }
}

// The gates of step s, after gh = W_hh h.
template <class IO>
struct ForwardCell {
  using V = Scalar<Arithmetic<IO>>;
  static constexpr bool kOfCell = true;

  Forward<IO> call;
  int64_t s;
  const IO* gh;       // [D, B, G*H] or null: gates have no hidden part
  IO* h;              // [D, B, R]: state, kept as the product takes it
  IO* masked;         // [D, B, R] or null: no mask; h as the product takes it otherwise
  Arithmetic<IO>* c;  // [D, B, C*H] or null
  IO* raw;            // [D, B, H] or null: no projection, R = H

  template <class Cell>
  RNN_HD void unit(const Slot& slot, int64_t i) const {
    const Sequence& q = call.seq;
    const int64_t state = slot.n * q.H + i;
    ForwardUnit<Cell, IO> unit(call, slot, s, i);
    V through[Cell::G], carried[Cell::S];
    if (unit.place.active) {
      for (int g = 0; g < Cell::G; ++g) through[g] = load_or_zero(gh, slot.n * Cell::G * q.H + g * q.H + i);
      if (!raw) carried[0] = load(h + state);
      for (int k = 1; k < Cell::S; ++k) carried[k] = load(c + beside<Cell>(slot.n, k, q.H, i));
    }
    const int64_t width = Cell::G * q.H;
    const Biases<Cell, IO> biases(q.of_head(call.b_ih, slot.d, width), q.of_head(call.b_hh, slot.d, width), q.H, i);
    unit.run(0, biases, through, carried, raw != nullptr);
    unit.write(call, i, raw != nullptr);
    if (!unit.place.active) return;
    store(raw ? raw + state : h + state, carried[0]);
    if (masked && !raw) store(masked + state, carried[0] * load(call.h_mask + state));
    for (int k = 1; k < Cell::S; ++k) store(c + beside<Cell>(slot.n, k, q.H, i), carried[k]);
  }
};

// The projected h of step s, after projected = W_hr raw.
template <class IO>
struct ForwardProject {
  using V = Scalar<Arithmetic<IO>>;
  Forward<IO> call;
  int64_t s;
  const IO* projected;  // [D, B, R]
  IO *h, *masked;       // [D, B, R], as in ForwardCell

  RNN_HD int64_t width() const { return call.seq.R; }

  template <class>
  RNN_HD void unit(const Slot& slot, int64_t i) const {
    const Sequence& q = call.seq;
    const Place place = q.place(slot.d, slot.row, s);
    const int64_t state = slot.n * q.R + i;
    if (place.outside) return;
    const V value = place.active ? load(projected + state) : V(0);
    store(call.y + place.n * q.R + i, value);
    if (!place.active) return;
    store(h + state, value);
    if (masked) store(masked + state, value * load(call.h_mask + state));
  }
};

// What the backward loop carries from launch to launch, [D, rows, ...]; null where there is none.
template <class IO>
struct Carried {
  Arithmetic<IO>* dh;  // [R]: what reaches h around W_hh
  Arithmetic<IO>* dc;  // [C*H]
  IO* dgh;             // [G*H], or no gate has a hidden part, where this and dh_through are null
  IO* dh_through;      // [R]: dgh W_hh of the gates of step s + 1
  IO* dprojected;      // [R]; no projection, R = H, where this and dh_raw are null
  IO* dh_raw;          // [H]: dprojected W_hr of step s
  double* unbounded;   // [(G+A)*H]: dgates before it is bounded by its norm
  double* norms;       // []: of the G gradients of gx in it
  double* all_dh;      // [T, B, D, R]: the whole gradient of every h, if asked for
};

// What reached unit i of a row's h through W_hh, from the [D, rows, R] that a product left.
template <class IO>
RNN_HD Scalar<Arithmetic<IO>> through_product(const Sequence& q, const IO* product, const IO* h_mask, const Slot& slot,
                                              int64_t i) {
  const Scalar<Arithmetic<IO>> x = load_or_zero(product, slot.n * q.R + i);
  return h_mask ? x * load(h_mask + q.state_at(slot.d, slot.row.b, q.R) + i) : x;
}

// What reaches the last state of every row from outside.
template <class IO>
struct BackwardBegin {
  Sequence seq;
  int64_t size;        // R or C*H
  const IO* from;      // [D, B, size] or null: zero
  Arithmetic<IO>* to;  // [D, rows, size]

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
  Backward<IO> call;
  int64_t s;
  Carried<IO> carried;

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
      if (linked(q, slot, s + 1)) value += through_product(q, carried.dh_through, call.h_mask, slot, i);
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
  if (!unit.place.active || !dgh) return;
  dgh += slot.n * Cell::G * H + i;
  for (int g = 0; g < Cell::G; ++g) store(dgh + g * H, unit.dgates[unit.of_hidden(g)]);
}

// Where a row adds up what its steps add to the gradients of the cell's parameters, H apart. They come one launch after
// the other, and each unit of a row is one thread's: a sum in one order.
template <class Cell, class IO>
RNN_HD Arithmetic<IO>* parameter_sums(const Backward<IO>& call, const Slot& slot, int64_t i) {
  const Sequence& q = call.seq;
  return call.dunit + (q.number(slot.row) * q.D + slot.d) * Own<Cell>::P * q.H + i;
}

// The gradients of the gates of step s, after dh_through; or, where h is projected, after dh_raw.
template <class IO>
struct BackwardCell {
  using V = Scalar<Arithmetic<IO>>;
  static constexpr bool kOfCell = true;

  Backward<IO> call;
  int64_t s;
  Carried<IO> carried;

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
        const V through = unit.linked_after ? through_product(q, carried.dh_through, call.h_mask, slot, i) : V(0);
        dh = unit.dh(load(carried.dh + state), through);
        if (carried.all_dh) carried.all_dh[unit.place.n * q.H + i] = dh.v;
      }
      for (int k = 1; k < Cell::S; ++k) around[k] = load(carried.dc + beside<Cell>(slot.n, k, q.H, i));
    }
    unit.run(0, dh, around);
    if (unit.place.active) {
      if (!carried.dh_raw) store(carried.dh + state, around[0]);
      for (int k = 1; k < Cell::S; ++k) store(carried.dc + beside<Cell>(slot.n, k, q.H, i), around[k]);
      add_to_parameters(unit, slot, i);
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

 private:
  template <class Cell>
  RNN_HD void add_to_parameters(const BackwardUnit<Cell, IO>& unit, const Slot& slot, int64_t i) const {
    if constexpr (unit.P > 0) {
      Arithmetic<IO>* const sums = parameter_sums<Cell>(call, slot, i);
      for (int k = 0; k < unit.P; ++k) sums[k * call.seq.H] += unit.dunit[k].v;
    }
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
  Sequence seq;
  int64_t size;                // R or C*H
  const IO* through;           // [D, rows, size] or null
  const IO* h_mask;            // [D, B, size] or null
  const Arithmetic<IO>* from;  // [D, rows, size]
  IO* to;                      // [D, B, size]

  RNN_HD int64_t width() const { return size; }

  template <class>
  RNN_HD void unit(const Slot& slot, int64_t i) const {
    if (!seq.first(slot.d, slot.row)) return;
    const int64_t state = slot.n * size + i;
    V value = load(from + state);
    if (through && linked(seq, slot, 0)) value += through_product(seq, through, h_mask, slot, i);
    store(to + seq.state_at(slot.d, slot.row.b, size) + i, value);
  }
};

// Has this cell a use for the step? Some are for what is emitted.
template <class Step, class Cell>
constexpr bool has_step() {
  if constexpr (requires { Step::kOfEmitted; }) return Cell::kEmits;
  return true;
}

// Calls f(Cell{}) for the cell with this number if the step has a text per cell, else once.
struct AnyCell {};
template <class Step, class F>
void dispatch_step(int cell, F&& f) {
  if constexpr (requires { Step::kNormed; }) {
    dispatch_cell(
        cell - count(AllCells{}),
        [&](auto of) {
          if constexpr (has_step<Step, decltype(of)>()) f(of);
        },
        NormedCells{});
  } else if constexpr (requires { Step::kOfCell; }) {
    dispatch_cell(cell, static_cast<F&&>(f));
  } else {
    f(AnyCell{});
  }
}

}  // namespace rnn::cuda
