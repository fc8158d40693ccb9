// The stepwise steps of a cell whose products are normalised, backward. In the places of the steps of rows of forward
// it has those that find the means that the gradient of a norm takes (row_statistic.h). What forward had standardised
// by is found again, a step ahead.
#pragma once

#include "cuda/normed_forward.h"

namespace rnn::cuda {

// What the backward steps leave for each other, [D, rows, ...], beside what those of every cell do.
template <class IO>
struct NormedBackward {
  Carried<IO> carried;
  Arithmetic<IO>* gates;    // [2*G*H]: gradients of gx, and of the normalised W_hh h, as bounded but for the norm
  Arithmetic<IO>* emitted;  // [2*H]: of what is emitted, standardised, and of slot 0; of a cell that emits
  RowNorms by[2];           // of even and odd steps: what was standardised by
  RowNorms means;           // of the gradients of what came of that
};

// The gradient of the h of a step that is there: what came through its projection, or all that reached it.
template <class IO>
RNN_HD Scalar<Arithmetic<IO>> gradient_of_h(const Backward<IO>& call, const Carried<IO>& carried, const Slot& slot,
                                            int64_t s, int64_t i) {
  const Sequence& q = call.seq;
  const int64_t state = slot.n * q.H + i;
  if (carried.dh_raw) return load(carried.dh_raw + state);
  const int64_t at = q.place(slot.d, slot.row, s).n * q.H + i;
  Scalar<Arithmetic<IO>> dh = load(carried.dh + state) + load_or_zero(call.dy, at);
  if (linked(q, slot, s + 1)) dh += through_product(q, carried.dh_through, call.h_mask, slot, i);
  if (carried.all_dh) carried.all_dh[at] = dh.v;
  return dh;
}

// The gradients of slot 0 and of the standardised c, of a cell that emits.
template <class IO>
struct BackwardEmit {
  using T = Arithmetic<IO>;
  using V = Scalar<T>;
  static constexpr bool kNormed = true, kOfEmitted = true;

  Backward<IO> call;
  int64_t s;
  NormedBackward<IO> of;

  template <class Cell>
  RNN_HD void unit(const Slot& slot, int64_t i) const {
    const Sequence& q = call.seq;
    const Place place = q.place(slot.d, slot.row, s);
    if (!place.active) return;
    const IO* affine = q.of_head(call.unit, slot.d, Cell::P * q.H) + (Cell::P - 2) * q.H + i;
    const V scale = load(affine), shift = load(affine + q.H);
    const V slot_0 = load(call.saved + (place.n * Cell::K + Cell::kEmitted) * q.H + i);
    const V x = standardized<T>(load(call.c + place.n * q.H + i), of.by[s & 1].state.standard(slot.n));
    V d_slot_0, dn;
    Cell::emit_backward(slot_0, x * scale + shift, gradient_of_h(call, of.carried, slot, s, i), d_slot_0, dn);
    T* const emitted = of.emitted + slot.n * 2 * q.H + i;
    store(emitted, dn * scale);
    store(emitted + q.H, d_slot_0);
    T* const sums = parameter_sums<Cell>(call, slot, i);
    sums[(Cell::P - 2) * q.H] += (dn * x).v;
    sums[(Cell::P - 1) * q.H] += dn.v;
  }
};

// The means of the gradients of the standardised c.
template <class IO>
struct StateMeans {
  using T = Arithmetic<IO>;
  static constexpr bool kNormed = true, kOfRow = true, kOfEmitted = true;

  Backward<IO> call;
  int64_t s;
  NormedBackward<IO> of;

  template <class Cell>
  RNN_HD void part(const Slot& slot, int k) const {
    const Sequence& q = call.seq;
    const Place place = q.place(slot.d, slot.row, s);
    if (!place.active) return;
    const T* gradients = of.emitted + slot.n * 2 * q.H;
    const IO* c = call.c + place.n * q.H;
    const Standard by = of.by[s & 1].state.standard(slot.n);
    of.means.state.template add_up<T>(slot.n, k, q.H, [&](int64_t i, Scalar<T>& gradient, Scalar<T>& x) {
      gradient = load(gradients + i);
      x = standardized<T>(load(c + i), by);
    });
  }
  template <class>
  static RNN_HD constexpr int finishers() {
    return 1;
  }
  template <class Cell>
  RNN_HD void finish(const Slot& slot, int) const {
    if (s < slot.row.length) of.means.state.finish_means(slot.n, call.seq.H);
  }
};

// The gradients of the gates of step s, but for those of W_hh h itself.
template <class IO>
struct NormedBackwardCell {
  using T = Arithmetic<IO>;
  using V = Scalar<T>;
  static constexpr bool kNormed = true;

  Backward<IO> call;
  int64_t s;
  NormedBackward<IO> of;

  template <class Cell>
  RNN_HD void unit(const Slot& slot, int64_t i) const {
    const Sequence& q = call.seq;
    BackwardUnit<Cell, IO> unit(call, slot, s, i, Cell::kEmits);
    if (!unit.place.active) return;
    const RowNorms& by = of.by[s & 1];
    V kept[Cell::K + 1], around[Cell::S], dh;
    for (int k = 0; k < Cell::K; ++k) kept[k] = unit.saved[k].value();
    for (int a = 0; a < Cell::kOwnA; ++a) {  // the hidden part of a split gate, which was not kept
      const int g = Cell::G - Cell::kOwnA + a;
      const V x = standardized<T>(kept[Cell::kOwnK + g], by.hidden[GateGroup<Cell>::of_gate(g)].standard(slot.n));
      kept[Cell::kOwnK + a] = x * unit.own[g] + unit.own[Cell::G + a];
    }
    for (int k = 1; k < Cell::S; ++k) around[k] = load(of.carried.dc + beside<Cell>(slot.n, k, q.H, i));
    if constexpr (Cell::kEmits) {
      const T* emitted = of.emitted + slot.n * 2 * q.H + i;
      const Standard of_state = by.state.standard(slot.n);
      T means[2];
      of.means.state.means(slot.n, means);
      around[1] += destandardized<T>(load(emitted), standardized<T>(unit.next[1].value(), of_state), of_state, means);
      dh = load(emitted + q.H);
    } else {
      dh = gradient_of_h(call, of.carried, slot, s, i);
    }
    unit.run(0, [&](int k) { return kept[k]; }, dh, around);
    if (!of.carried.dh_raw) store(of.carried.dh + slot.n * q.H + i, around[0]);
    for (int k = 1; k < Cell::S; ++k) store(of.carried.dc + beside<Cell>(slot.n, k, q.H, i), around[k]);
    T* const gates = of.gates + slot.n * 2 * Cell::G * q.H + i;
    for (int g = 0; g < 2 * Cell::G; ++g) store(gates + g * q.H, call.clip.template elementwise<T>(unit.dgates[g]));
  }
};

// The means of the gradients of the standardised W_hh h of step s, if there is one; and by what the step before it was
// standardised.
template <class IO>
struct HiddenMeans {
  using T = Arithmetic<IO>;
  static constexpr bool kNormed = true, kOfRow = true;

  Backward<IO> call;
  int64_t s;
  NormedBackward<IO> of;

  template <class Cell>
  RNN_HD void part(const Slot& slot, int k) const {
    const Sequence& q = call.seq;
    const RowNorms& before = of.by[(s + 1) & 1];
    for (int g = 0; g < Cell::kGroups; ++g) {
      const GateGroup<Cell> group(g, q.H);
      if (s < slot.row.length) {
        const T* gradients = of.gates + slot.n * 2 * Cell::G * q.H + Cell::G * q.H + group.first;
        const IO* scales = q.of_head(call.unit, slot.d, Cell::P * q.H) + group.first;
        const IO* product = products<Cell>(slot, s) + group.first;
        const Standard by = of.by[s & 1].hidden[g].standard(slot.n);
        of.means.hidden[g].template add_up<T>(slot.n, k, group.n, [&](int64_t i, Scalar<T>& gradient, Scalar<T>& x) {
          gradient = load(gradients + i) * load(scales + i);
          x = standardized<T>(load(product + i), by);
        });
      }
      if (goes_on(slot)) before.hidden[g].measure(slot.n, k, products<Cell>(slot, s - 1) + group.first, group.n);
    }
    if constexpr (Cell::kEmits) {
      if (goes_on(slot)) before.state.measure(slot.n, k, call.c + q.place(slot.d, slot.row, s - 1).n * q.H, q.H);
    }
  }
  template <class Cell>
  static RNN_HD constexpr int finishers() {
    return 2 * Cell::kGroups + Cell::kEmits;
  }
  template <class Cell>
  RNN_HD void finish(const Slot& slot, int n) const {
    const int64_t H = call.seq.H;
    const RowNorms& before = of.by[(s + 1) & 1];
    if (n < Cell::kGroups) {
      if (s < slot.row.length) of.means.hidden[n].finish_means(slot.n, GateGroup<Cell>(n, H).n);
    } else if (goes_on(slot)) {
      n -= Cell::kGroups;
      if (n < Cell::kGroups) return before.hidden[n].finish_measure(slot.n, GateGroup<Cell>(n, H).n);
      before.state.finish_measure(slot.n, H);
    }
  }

 private:
  // Is there a step before this one?
  RNN_HD bool goes_on(const Slot& slot) const { return s > 0 && s - 1 < slot.row.length; }
  // W_hh h [G*H] of a step, as forward has kept it.
  template <class Cell>
  RNN_HD const IO* products(const Slot& slot, int64_t step) const {
    const Sequence& q = call.seq;
    return call.saved + (q.place(slot.d, slot.row, step).n * Cell::K + Cell::kOwnK) * q.H;
  }
};

// The gradients of gx and W_hh h of step s, to the result and to the next product; and what they add to those of the
// parameters of the norm of W_hh h. All are bounded by the norm here, where they are.
template <class IO>
struct HandOnGates {
  using T = Arithmetic<IO>;
  using V = Scalar<T>;
  static constexpr bool kNormed = true;

  Backward<IO> call;
  int64_t s;
  NormedBackward<IO> of;

  template <class Cell>
  RNN_HD void unit(const Slot& slot, int64_t i) const {
    constexpr int G = Cell::G;
    const Sequence& q = call.seq;
    const Place place = q.place(slot.d, slot.row, s);
    if (place.outside) return;
    IO* const result = call.dgates + place.n * 2 * G * q.H + i;
    if (!place.active) {
      for (int g = 0; g < 2 * G; ++g) store(result + g * q.H, V(0));
      return;
    }
    V factor(1);
    if (call.clip.kind == Clip::kNorm) {
      const double norm = of.carried.norms[slot.n];
      factor = V(T(call.clip.factor(norm * norm)));
    }
    const T* const gates = of.gates + slot.n * 2 * G * q.H + i;
    const IO* const own = q.of_head(call.unit, slot.d, Cell::P * q.H) + i;
    const IO* const product = call.saved + (place.n * Cell::K + Cell::kOwnK) * q.H + i;
    IO* const dgh = of.carried.dgh + slot.n * G * q.H + i;
    T* const sums = parameter_sums<Cell>(call, slot, i);
    for (int g = 0; g < G; ++g) {
      const int group = GateGroup<Cell>::of_gate(g);
      const Standard by = of.by[s & 1].hidden[group].standard(slot.n);
      T means[2];
      of.means.hidden[group].means(slot.n, means);
      const V gradient = load(gates + (G + g) * q.H), x = standardized<T>(load(product + g * q.H), by);
      const V hidden = factor * destandardized<T>(gradient * load(own + g * q.H), x, by, means);
      store(result + g * q.H, factor * load(gates + g * q.H));
      store(result + (G + g) * q.H, hidden);
      store(dgh + g * q.H, hidden);
      sums[g * q.H] += (factor * (gradient * x)).v;
      if (group) sums[(g + Cell::kOwnA) * q.H] += (factor * gradient).v;
    }
  }
};

}  // namespace rnn::cuda
