// The stepwise steps of a cell whose products are normalised (common/normed.h), forward. Between a product and the
// cells stands a step of rows, which finds what W_hh h is standardised by; and where a cell emits, another one behind
// them.
#pragma once

#include "common/cell_list.h"
#include "cuda/row_pair.h"
#include "cuda/step.h"

namespace rnn::cuda {

// Where a group of a cell's gates lies in [G*H].
template <class Cell>
struct GateGroup {
  int64_t first, n;

  RNN_HD GateGroup(int group, int64_t H) {
    constexpr CellSizes sizes = CellSizes::of(Cell{});
    first = sizes.first_gate(group) * H;
    n = sizes.gates(group) * H;
  }
  static RNN_HD constexpr int of_gate(int gate) { return gate >= Cell::G - Cell::kOwnA; }
};

// What the forward steps leave for each other, [D, B, ...]; the first ones as in ForwardCell.
template <class IO>
struct NormedForward {
  const IO* gh;
  IO *h, *masked;
  Arithmetic<IO>* c;
  IO* raw;
  Arithmetic<IO>* slot_0;  // [H]: of a cell that emits
  RowNorms norms;
};

// What W_hh h is standardised by, where there is an h: else it is zero, and so it stays.
template <class IO>
struct HiddenMoments {
  static constexpr bool kNormed = true, kOfRow = true;

  Forward<IO> call;
  int64_t s;
  NormedForward<IO> of;

  template <class Cell>
  RNN_HD void part(const Slot& slot, int k) const {
    const Sequence& q = call.seq;
    if (!linked(q, slot, s)) return;
    for (int g = 0; g < Cell::kGroups; ++g) {
      const GateGroup<Cell> group(g, q.H);
      of.norms.hidden[g].measure(slot.n, k, of.gh + slot.n * Cell::G * q.H + group.first, group.n);
    }
  }
  template <class Cell>
  static RNN_HD constexpr int finishers() {
    return Cell::kGroups;
  }
  template <class Cell>
  RNN_HD void finish(const Slot& slot, int g) const {
    if (linked(call.seq, slot, s)) of.norms.hidden[g].finish_measure(slot.n, GateGroup<Cell>(g, call.seq.H).n);
  }
};

// The gates of step s, and h where the cell does not emit it.
template <class IO>
struct NormedForwardCell {
  using T = Arithmetic<IO>;
  using V = Scalar<T>;
  static constexpr bool kNormed = true;

  Forward<IO> call;
  int64_t s;
  NormedForward<IO> of;

  template <class Cell>
  RNN_HD void unit(const Slot& slot, int64_t i) const {
    const Sequence& q = call.seq;
    const int64_t width = Cell::G * q.H, state = slot.n * q.H + i;
    ForwardUnit<Cell, IO> unit(call, slot, s, i);
    Biases<Cell, IO> biases(q.of_head(call.b_ih, slot.d, width), nullptr, q.H, i);
    V product[Cell::G], gh[Cell::G], carried[Cell::S];
    if (unit.place.active) {
      carried[0] = V(0);
      if constexpr (!Cell::kEmits) carried[0] = load(of.h + state);
      for (int k = 1; k < Cell::S; ++k) carried[k] = load(of.c + beside<Cell>(slot.n, k, q.H, i));
      for (int g = 0; g < Cell::G; ++g) {
        product[g] = unit.cut ? V(0) : load(of.gh + slot.n * width + g * q.H + i);
        gh[g] =
            standardized<T>(product[g], of.norms.hidden[GateGroup<Cell>::of_gate(g)].standard(slot.n)) * unit.own[g];
      }
      for (int a = 0; a < Cell::kOwnA; ++a) biases.hidden[Cell::G - Cell::kOwnA + a] = unit.own[Cell::G + a];
    }
    unit.run(0, biases, gh, carried, Cell::kEmits);
    if (unit.place.active)
      for (int g = 0; g < Cell::G; ++g) unit.saved[Cell::kOwnK + g] = product[g];
    if (unit.place.outside) return;
    unit.write_saved(call, i);
    if constexpr (!Cell::kEmits) unit.write_h(call, i, false);
    unit.write_others(call, i);
    if (!unit.place.active) return;
    for (int k = 1; k < Cell::S; ++k) store(of.c + beside<Cell>(slot.n, k, q.H, i), carried[k]);
    if constexpr (Cell::kEmits) {
      store(of.slot_0 + state, unit.next[0]);
    } else {
      store(of.h + state, carried[0]);
      if (of.masked) store(of.masked + state, carried[0] * load(call.h_mask + state));
    }
  }
};

// What c is standardised by, of a cell that emits.
template <class IO>
struct StateMoments {
  static constexpr bool kNormed = true, kOfRow = true, kOfEmitted = true;

  Forward<IO> call;
  int64_t s;
  NormedForward<IO> of;

  template <class Cell>
  RNN_HD void part(const Slot& slot, int k) const {
    if (s < slot.row.length) of.norms.state.measure(slot.n, k, of.c + slot.n * call.seq.H, call.seq.H);
  }
  template <class>
  static RNN_HD constexpr int finishers() {
    return 1;
  }
  template <class Cell>
  RNN_HD void finish(const Slot& slot, int) const {
    if (s < slot.row.length) of.norms.state.finish_measure(slot.n, call.seq.H);
  }
};

// h of step s, of a cell that emits.
template <class IO>
struct ForwardEmit {
  using T = Arithmetic<IO>;
  using V = Scalar<T>;
  static constexpr bool kNormed = true, kOfEmitted = true;

  Forward<IO> call;
  int64_t s;
  NormedForward<IO> of;

  template <class Cell>
  RNN_HD void unit(const Slot& slot, int64_t i) const {
    const Sequence& q = call.seq;
    const Place place = q.place(slot.d, slot.row, s);
    if (place.outside) return;
    const int64_t state = slot.n * q.H + i, at = place.n * q.H + i;
    V h(0);
    if (place.active) {
      const IO* affine = q.of_head(call.unit, slot.d, Cell::P * q.H) + (Cell::P - 2) * q.H + i;
      const V x = standardized<T>(load(of.c + state), of.norms.state.standard(slot.n));
      h = Cell::emit(load(of.slot_0 + state), x * load(affine) + load(affine + q.H));
    }
    if (!of.raw) store(call.y + at, h);
    if (call.h_raw) store(call.h_raw + at, h);
    if (!place.active) return;
    h = stored<IO>(h);
    store(of.raw ? of.raw + state : of.h + state, h);
    if (of.masked && !of.raw) store(of.masked + state, h * load(call.h_mask + state));
  }
};

}  // namespace rnn::cuda
