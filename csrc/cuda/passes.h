// The two passes over a sequence as the persistent loop sees them: what a round multiplies, what it computes and what
// it hands on. In forward, round n takes step n; backward takes the steps from the last to the first, and one more
// round for the gradients of the initial states.
//
//   kOut    numbers per unit that a product gives      kSent   numbers per unit that a round sends to the others
//   kState  numbers per unit that stay with the block  kFirst  there is something to multiply in the first round
//   kKept   numbers per unit that wait for the norm of their row
//
// run() computes a unit's step and says what is sent; write() leaves the results in memory, when that has been sent.
// What run() asks of a call and a round, Conditions answer before the wait: it has no time to look up anything.
//
// A layer of a stack may have an upstream, another layer that runs at the same time and whose results it multiplies,
// row by row: in forward the layer below it and rows of y, in backward the layer above it and rows of dgates, of which
// the first kSent * H numbers count.
//
// The norm of the gate gradients of a row is a row statistic (common/row_statistic.h), which takes all blocks: it is
// known when their messages have arrived. So they send what is not bounded yet, and beside it the sum over their own
// units: the next round scales what it multiplied, and writes what was kept.
#pragma once

#include "cuda/stages.h"
#include "cuda/unit.h"

namespace rnn::cuda {

// What the passes take: they carry one state beside h, and ask for neither parameters of the cell nor noise.
template <class Cell>
constexpr bool kWholeSequences = Cell::S <= 2 && Own<Cell>::P + Own<Cell>::E == 0;

// A row of what comes from upstream for a step, [kSent, H], and factors of its numbers; null where there is no such
// step, and no factors.
template <class IO>
struct UpstreamRow {
  const IO *numbers, *mask;
};

// The factor of recurrent dropout of unit i, of a call of either pass that has it.
template <class Call>
RNN_HD Scalar<float> mask_of(const Call& call, const Slot& slot, int64_t i) {
  return load(call.h_mask + call.seq.state_at(slot.d, slot.row.b, call.seq.H) + i);
}

template <class Cell_, class IO_>
struct ForwardPass {
  static_assert(kWholeSequences<Cell_>);
  using Cell = Cell_;
  using IO = IO_;
  using V = Scalar<float>;
  using Unit = ForwardUnit<Cell, IO>;
  using Constants = Biases<Cell, IO>;  // of a unit, at all steps
  static constexpr int kOut = Cell::G, kSent = 1, kState = Cell::S, kKept = 0;
  static constexpr bool kFirst = true, kBackward = false;

  ForwardStage<IO> call;
  int cell;  // its number

  RNN_HD const Sequence& sequence() const { return call.seq; }
  RNN_HD int64_t rounds() const { return call.seq.T; }

  // What number `in` of unit j, as it was sent, adds to number `out` of unit i, by one of the matrices below.
  RNN_HD V weight(const IO* matrix, int out, int64_t i, int, int64_t j) const {
    return load(matrix + (out * call.seq.H + i) * call.seq.H + j);
  }
  RNN_HD const IO* matrix(int64_t d) const { return d == 0 ? call.w_hh[0] : call.w_hh[1]; }

  // What the first round receives.
  RNN_HD V first(const Slot& slot, int64_t j) const {
    const V h = load(call.h0 + call.seq.state_at(slot.d, slot.row.b, call.seq.H) + j);
    return call.h_mask ? h * mask_of(call, slot, j) : h;
  }

  RNN_HD void begin(const Slot& slot, int64_t i, V* state) const {
    const int64_t at = call.seq.state_at(slot.d, slot.row.b, call.seq.H) + i;
    state[0] = load(call.h0 + at);
    if constexpr (Cell::S > 1) state[1] = load(call.c0 + at);
  }

  RNN_HD Constants constants(int64_t d, int64_t i) const {
    return {d == 0 ? call.b_ih[0] : call.b_ih[1], d == 0 ? call.b_hh[0] : call.b_hh[1], call.seq.H, i};
  }
  struct Conditions {
    bool last;  // the states of this round are the final ones
  };
  RNN_HD Conditions conditions(int64_t round) const { return {round + 1 == call.seq.T}; }
  RNN_HD Unit fetch(const Slot& slot, int64_t round, int64_t i) const { return Unit(call, slot, round, i); }

  // With an upstream; gx is null then.
  RNN_HD bool has_upstream(int64_t) const { return true; }
  RNN_HD int late() const { return 0; }
  RNN_HD const IO* upstream_matrix() const { return call.w_ih[0]; }
  RNN_HD bool masked() const { return call.mask_below; }
  RNN_HD UpstreamRow<IO> upstream_row(const Slot& slot, int64_t round) const {
    const Place place = call.seq.place(slot.d, slot.row, round);
    const int64_t at = place.n * call.seq.H;
    return place.active ? UpstreamRow<IO>{call.x + at, call.mask_below ? call.mask_below + at : nullptr}
                        : UpstreamRow<IO>{};
  }
  RNN_HD void add_upstream(const Unit&, int64_t, const V* product, Constants& added, V*) const {
    for (int g = 0; g < Cell::G; ++g) added.input[g] += product[g];
  }

  RNN_HD void run(Unit& unit, const Slot& slot, Conditions now, int64_t i, const Constants& added, const V* product,
                  V* state, V* sent) const {
    unit.run(cell, added, product, state, false);
    sent[0] = state[0];
    if (!now.last) return;
    const int64_t at = call.seq.state_at(slot.d, slot.row.b, call.seq.H) + i;
    store(call.h_n + at, state[0]);
    if constexpr (Cell::S > 1) store(call.c_n + at, state[1]);
  }
  RNN_HD void write(const Unit& unit, int64_t, int64_t i) const { unit.write(call, i, false); }
};

template <class Cell_, class IO_>
struct BackwardPass {
  static_assert(kWholeSequences<Cell_>);
  using Cell = Cell_;
  using IO = IO_;
  using V = Scalar<float>;
  using Unit = BackwardUnit<Cell, IO>;
  struct Constants {};
  static constexpr int kOut = 1, kSent = Cell::G, kState = Cell::S, kKept = Unit::kGates;
  static constexpr bool kFirst = false, kBackward = true;

  BackwardStage<IO> call;
  int cell;  // its number

  RNN_HD const Sequence& sequence() const { return call.seq; }
  RNN_HD bool norm() const { return call.clip.kind == Clip::kNorm; }
  RNN_HD int64_t rounds() const { return call.seq.steps() + (call.dh0 || norm() ? 1 : 0); }

  RNN_HD V weight(const IO* matrix, int, int64_t i, int in, int64_t j) const {
    return load(matrix + (in * call.seq.H + j) * call.seq.H + i);
  }
  RNN_HD const IO* matrix(int64_t d) const { return d == 0 ? call.w_hh[0] : call.w_hh[1]; }

  RNN_HD void begin(const Slot& slot, int64_t i, V* state) const {
    const int64_t at = call.seq.state_at(slot.d, slot.row.b, call.seq.H) + i;
    const bool last = call.seq.last(slot.d, slot.row);
    state[0] = load_or_zero(last ? call.dh_n : nullptr, at);
    if constexpr (Cell::S > 1) state[1] = load_or_zero(last ? call.dc_n : nullptr, at);
  }

  RNN_HD int64_t step(int64_t round) const { return call.seq.steps() - 1 - round; }

  RNN_HD Constants constants(int64_t, int64_t) const { return {}; }
  struct Conditions {
    bool ends;      // there is no step: the gradients of the initial states are due
    bool recorded;  // the whole gradient of every h is asked for
    bool bounded;   // gradients are bounded one by one
  };
  RNN_HD Conditions conditions(int64_t round) const {
    return {step(round) < 0, call.all_dh != nullptr, call.clip.kind != Clip::kNone && !norm()};
  }
  RNN_HD Unit fetch(const Slot& slot, int64_t round, int64_t i) const {
    return step(round) >= 0 ? Unit(call, slot, step(round), i, false) : Unit();
  }

  RNN_HD bool has_upstream(int64_t round) const { return step(round) >= 0; }
  // Rounds after which the results of a round are written.
  RNN_HD int late() const { return norm() ? 1 : 0; }
  RNN_HD const IO* upstream_matrix() const { return call.w_ih_above; }
  RNN_HD bool masked() const { return false; }
  RNN_HD UpstreamRow<IO> upstream_row(const Slot& slot, int64_t round) const {
    const Place place = call.seq.place(slot.d, slot.row, step(round));
    return {place.active ? call.dgates_above + place.n * kKept * call.seq.H : nullptr, nullptr};
  }
  RNN_HD void add_upstream(const Unit& unit, int64_t i, const V* product, Constants&, V* state) const {
    if (!unit.place.active) return;
    const V mask = call.mask_above ? load(call.mask_above + unit.place.n * call.seq.H + i) : V(1);
    state[0] += product[0] * mask;
  }

  RNN_HD void run(Unit& unit, const Slot& slot, Conditions now, int64_t i, const Constants&, const V* product, V* state,
                  V* sent) const {
    if (now.ends) return finish(slot, i, product[0], state);
    V dh(0);
    if (unit.place.active) {
      dh = unit.dh(state[0], product[0]);
      if (now.recorded) call.all_dh[unit.place.n * call.seq.H + i] = dh.v;
    }
    unit.run(cell, dh, state);
    if (now.bounded) {
      for (V& x : unit.dgates) x = call.clip.template elementwise<float>(x);
    }
    for (int g = 0; g < Cell::G; ++g) sent[g] = unit.dgates[Unit::of_hidden(g)];
  }
  // Where there is a norm, bound() writes.
  RNN_HD void write(const Unit& unit, int64_t round, int64_t i) const {
    if (step(round) >= 0 && !norm() && !unit.place.outside) unit.write(call, i);
  }

  // What one unit contributes to the statistic of its row, the square of the norm; and the factor that follows of it.
  RNN_HD double contribution(const V* dgates) const {
    double sum = 0;
    for (int g = 0; g < Cell::G; ++g) sum += double(dgates[g].v) * double(dgates[g].v);
    return sum;
  }
  RNN_HD double factor(double sum) const { return call.clip.factor(sum); }
  // Writes the gradients that a round has left behind.
  RNN_HD void bound(const Slot& slot, int64_t round, int64_t i, double factor, const V* dgates) const {
    Unit unit;
    unit.place = call.seq.place(slot.d, slot.row, step(round));
    for (int g = 0; g < kKept; ++g) unit.dgates[g] = V(float(double(dgates[g].v) * factor));
    if (!unit.place.outside) unit.write(call, i);
  }

 private:
  RNN_HD void finish(const Slot& slot, int64_t i, V through, const V* state) const {
    const Sequence& q = call.seq;
    if (!call.dh0 || !q.first(slot.d, slot.row)) return;
    const int64_t at = q.state_at(slot.d, slot.row.b, q.H) + i;
    store(call.dh0 + at, state[0] + (linked(q, slot, 0) ? through : V(0)));
    if constexpr (Cell::S > 1) store(call.dc0 + at, state[1]);
  }
};

}  // namespace rnn::cuda
