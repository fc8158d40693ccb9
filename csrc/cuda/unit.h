// One step of one unit of one row of one direction, whatever runs it: what it reads of a call's tensors before the
// product of its step is known, and what it computes and writes after. Both directions of differentiation.
//
// Constructing a unit only reads, so that a kernel can ask for it early; run() takes the product and the state that the
// step before left, and leaves the next state in its place; write() can wait until others have been sent theirs.
// Nothing here needs a GPU.
#pragma once

#include "common/cell_list.h"
#include "common/layout.h"
#include "cuda/noise.h"
#include "cuda/scalar.cuh"

namespace rnn::cuda {

// A row of the loop in one direction: the n-th of the D * rows() in a [D, rows, ...] tensor.
struct Slot {
  int64_t n, d;
  Row row;

  Slot() = default;
  RNN_HD Slot(const Sequence& q, int64_t n, int64_t d) : n(n), d(d), row(q.row(n - d * q.rows())) {}
  RNN_HD Slot(const Sequence& q, int64_t n) : Slot(q, n, n < q.rows() ? 0 : n / q.rows()) {}
};

// Where unit i of state k >= 1 is found at place n of what holds all states beside h, [.., C*H].
template <class Cell>
RNN_HD int64_t beside(int64_t n, int k, int64_t H, int64_t i) {
  return (n * (Cell::S - 1) + k - 1) * H + i;
}

// What a cell reads behind its states: parameters of its own, and then its noise.
template <class Cell>
struct Own {
  static constexpr int P = CellSizes::of(Cell{}).P, E = CellSizes::of(Cell{}).E;

  // Of step s of a row, which is there; `call` is of either direction of differentiation.
  template <class Call, class V>
  static RNN_HD void read(const Call& call, const Slot& slot, int64_t s, int64_t i, V* to) {
    const Sequence& q = call.seq;
    if constexpr (P > 0) {
      const auto* unit = q.of_head(call.unit, slot.d, P * q.H);
      for (int k = 0; k < P; ++k) to[k] = load(unit + k * q.H + i);
    }
    if constexpr (E > 0) draw_noise<E>(call.noise, slot.row.b, q.position(slot.d, slot.row, s), slot.d, i, to + P);
  }
};

// Does step s take place, with the state that the step before left? If not, nobody reads the product of that state, or
// of the gradient that flows back to it: it may hold anything.
RNN_HD bool linked(const Sequence& q, const Slot& slot, int64_t s) {
  return s < slot.row.length && !q.cut_before(slot.d, slot.row, s);
}

// x as it comes back from storage.
template <class IO>
RNN_HD Scalar<Arithmetic<IO>> stored(Scalar<Arithmetic<IO>> x) {
  return Storage<IO>::read(Storage<IO>::write(x.v));
}

// What is added to the gates of a unit at every step.
template <class Cell, class IO>
struct Biases {
  using V = Scalar<Arithmetic<IO>>;
  V input[Cell::G], hidden[Cell::G];

  Biases() = default;
  // Of unit i of H, from those of its direction [G*H].
  RNN_HD Biases(const IO* b_ih, const IO* b_hh, int64_t H, int64_t i) {
    for (int g = 0; g < Cell::G; ++g) {
      input[g] = load_or_zero(b_ih, g * H + i);
      hidden[g] = load_or_zero(b_hh, g * H + i);
    }
  }
};

// The gates of step s. Where h is projected, its own value is neither known nor asked for. A Cell that is one of
// several is told apart by its number when it runs.
template <class Cell, class IO>
struct ForwardUnit {
  using V = Scalar<Arithmetic<IO>>;
  Place place;
  bool cut;
  Raw<IO> gx[Cell::G];
  V own[Own<Cell>::P + Own<Cell>::E + 1];
  V next[Cell::S], saved[Cell::K + 1];  // by run(), for write()

  ForwardUnit() = default;
  RNN_HD ForwardUnit(const Forward<IO>& call, const Slot& slot, int64_t s, int64_t i) {
    const Sequence& q = call.seq;
    place = q.place(slot.d, slot.row, s);
    if (!place.active) return;
    cut = q.cut_before(slot.d, slot.row, s);
    for (int g = 0; g < Cell::G; ++g) gx[g] = Raw<IO>::or_zero(call.gx, place.n * Cell::G * q.H + g * q.H + i);
    Own<Cell>::read(call, slot, s, i, own);
  }

  // gh [G]: W_hh h; state [S]: h, as it is stored, and the others.
  RNN_HD void run(int cell, const Biases<Cell, IO>& biases, const V* gh, V* state, bool projected) {
    for (V& x : next) x = V(0);
    for (V& x : saved) x = V(0);
    if (!place.active) return;
    constexpr int kOwn = Own<Cell>::P + Own<Cell>::E;
    V input[Cell::G], hidden[Cell::G], prev[Cell::S + kOwn];
    for (int g = 0; g < Cell::G; ++g) {
      input[g] = gx[g].value() + biases.input[g];
      hidden[g] = biases.hidden[g] + (cut ? V(0) : gh[g]);
    }
    for (int k = 0; k < Cell::S; ++k) prev[k] = cut ? V(0) : state[k];
    if (projected) prev[0] = V(0);
    for (int k = 0; k < kOwn; ++k) prev[Cell::S + k] = own[k];
    cell_forward(Cell{}, cell, input, hidden, prev, next, saved);
    state[0] = stored<IO>(next[0]);
    for (int k = 1; k < Cell::S; ++k) state[k] = next[k];
  }

  RNN_HD void write(const Forward<IO>& call, int64_t i, bool projected) const {
    if (place.outside) return;  // packed steps have no padding to fill
    write_saved(call, i);
    write_h(call, i, projected);
    write_others(call, i);
  }
  RNN_HD void write_saved(const Forward<IO>& call, int64_t i) const {
    const Sequence& q = call.seq;
    if (call.saved) {
      for (int k = 0; k < Cell::K; ++k) store(call.saved + place.n * Cell::K * q.H + k * q.H + i, saved[k]);
    }
  }
  RNN_HD void write_h(const Forward<IO>& call, int64_t i, bool projected) const {
    const int64_t at = place.n * call.seq.H + i;
    if (!projected) store(call.y + at, next[0]);
    if (call.h_raw) store(call.h_raw + at, next[0]);
  }
  RNN_HD void write_others(const Forward<IO>& call, int64_t i) const {
    const int64_t H = call.seq.H;
    for (int k = 1; call.c && k < Cell::S; ++k) store(call.c + beside<Cell>(place.n, k, H, i), next[k]);
  }
};

// The gradients of the gates of step s.
template <class Cell, class IO>
struct BackwardUnit {
  using V = Scalar<Arithmetic<IO>>;
  static constexpr int kGates = Cell::G + Cell::A;  // in the order of dgates
  Place place;
  bool cut, linked_after;
  static constexpr int P = Own<Cell>::P;
  Raw<IO> saved[Cell::K + 1], prev[Cell::S], next[Cell::S], dout[Cell::S];
  V own[P + Own<Cell>::E + 1];
  V dgates[kGates];  // by run(), for write()
  V dunit[P + 1];    // by run(): what the step adds to the gradients of the cell's parameters, but for those of norms

  BackwardUnit() = default;
  RNN_HD BackwardUnit(const Backward<IO>& call, const Slot& slot, int64_t s, int64_t i, bool projected) {
    const Sequence& q = call.seq;
    place = q.place(slot.d, slot.row, s);
    if (!place.active) return;
    cut = q.cut_before(slot.d, slot.row, s);
    linked_after = linked(q, slot, s + 1);
    const int64_t at = place.n * q.H + i;
    for (int k = 0; k < Cell::K; ++k) saved[k] = Raw<IO>(call.saved[place.n * Cell::K * q.H + k * q.H + i]);
    prev[0] = next[0] = dout[0] =
        Raw<IO>::zero();  // h before the projection: no cell with a projection asks for its value
    if (!projected) {
      prev[0] = before(call, call.h0, call.y, slot, s, q.H, i);
      next[0] = Raw<IO>(call.y[at]);
      dout[0] = Raw<IO>::or_zero(call.dy, at);
    }
    // One state beside h lies as y does. Said so, for the compiler does not find it, and whole sequences lack
    // registers.
    constexpr bool kAsY = Cell::S == 2;
    for (int k = 1; k < Cell::S; ++k) {
      const int64_t there = kAsY ? at : beside<Cell>(place.n, k, q.H, i);
      prev[k] = kAsY ? before(call, call.c0, call.c, slot, s, q.H, i)
                     : before(call, call.c0, call.c, slot, s, (Cell::S - 1) * q.H, (k - 1) * q.H + i);
      next[k] = Raw<IO>(call.c[there]);
      dout[k] = Raw<IO>::or_zero(call.dc, there);
    }
    Own<Cell>::read(call, slot, s, i, own);
  }

  // The gradient of h of this step, of what reached it `around` W_hh and `through` it.
  RNN_HD V dh(V around, V through) const { return around + dout[0].value() + (linked_after ? through : V(0)); }

  // dh, and carried [S], of which those behind [0] are what reaches the states beside h: in their place what reaches
  // the states of the step before around W_hh. The gradients of the gates are zero where there is no step.
  RNN_HD void run(int cell, V dh, V* carried) {
    run(cell, [&](int k) { return saved[k].value(); }, dh, carried);
  }
  // The same where value(k) is what was saved.
  template <class Value>
  RNN_HD void run(int cell, Value&& value, V dh, V* carried) {
    for (V& x : dgates) x = V(0);
    if (!place.active) return;
    constexpr int kOwn = P + Own<Cell>::E;
    V kept[Cell::K + 1], entered[Cell::S + kOwn], left[Cell::S], dnext[Cell::S], dprev[Cell::S + P], dhidden[Cell::G];
    for (int k = 0; k < Cell::K; ++k) kept[k] = value(k);
    for (int k = 0; k < Cell::S; ++k) {
      entered[k] = prev[k].value();
      left[k] = next[k].value();
      dnext[k] = k == 0 ? dh : carried[k] + dout[k].value();
    }
    for (int k = 0; k < kOwn; ++k) entered[Cell::S + k] = own[k];
    cell_backward(Cell{}, cell, kept, entered, left, dnext, dgates, dhidden, dprev);
    for (int a = 0; a < Cell::A; ++a) dgates[Cell::G + a] = dhidden[Cell::G - Cell::A + a];
    for (int k = 0; k < Cell::S; ++k) carried[k] = cut ? V(0) : dprev[k];
    if constexpr (!CellSizes::of(Cell{}).normed)
      for (int k = 0; k < P; ++k) dunit[k] = dprev[Cell::S + k];
  }

  // The gradient of gh of a gate, in dgates.
  static RNN_HD constexpr int of_hidden(int gate) { return gate < Cell::G - Cell::A ? gate : gate + Cell::A; }

  RNN_HD void write(const Backward<IO>& call, int64_t i) const {
    const int64_t H = call.seq.H;
    IO* result = call.dgates + place.n * kGates * H + i;
    for (int g = 0; g < kGates; ++g) store(result + g * H, dgates[g]);
  }

 private:
  // Number i of the states that entered step s: from all states [T, B, D, width], or from the initial ones.
  RNN_HD Raw<IO> before(const Backward<IO>& call, const IO* initial, const IO* all, const Slot& slot, int64_t s,
                        int64_t width, int64_t i) const {
    const Sequence& q = call.seq;
    if (cut) return Raw<IO>::zero();
    if (s == 0 && q.first(slot.d, slot.row)) return Raw<IO>(initial[q.state_at(slot.d, slot.row.b, width) + i]);
    return Raw<IO>(all[q.before(slot.d, slot.row, s) * width + i]);
  }
};

}  // namespace rnn::cuda
