// A step of units in a loop that carries tangents: what a small change of all that a call was given changes in it. Both
// loops are those of values, with these in the place of their units. What they read beside it are the values of the
// call.
//
// Forward a step is linear in the tangents: next' = J_gx gx' + J_gh gh' + J_prev prev', with the Jacobians of a unit,
// which the cell's backward gives for a gradient of one. Backward is forward mode over the cell's backward. This is the
// R-operator of Pearlmutter (1994).
#pragma once

#include "cpu/dual.h"
#include "cpu/kernels.h"
#include "cpu/unit.h"

namespace rnn::cpu::RNN_ISA {

template <class Cell, class IO>
struct ForwardTangentUnit : ForwardUnit<Cell, IO> {
  using typename ForwardUnit<Cell, IO>::V;
  using ForwardUnit<Cell, IO>::gx, ForwardUnit<Cell, IO>::gh, ForwardUnit<Cell, IO>::prev;
  using ForwardUnit<Cell, IO>::next, ForwardUnit<Cell, IO>::saved, ForwardUnit<Cell, IO>::load_or_zero;
  static constexpr int G = Cell::G, S = Cell::S, K = Cell::K;
  V saved_at[K + 1], prev_at[S], next_at[S];  // values

  // Of a step that is there: its values, and what else changes its gates.
  RNN_HD void read_values(const Forward<IO>& call, int64_t d, const RowStep& now, int64_t i, int n, bool projected) {
    const auto& p = static_cast<const ForwardTangents<IO>&>(call);
    const Sequence& q = p.seq;
    const int64_t H = q.H;
    const Row row = q.row(now.b);
    const int64_t s = q.turned(d) ? row.length - 1 - now.t : now.t;
    const StateBefore before = StateBefore::of(q, d, row, s, !q.cut_before(d, row, s));
    for (int k = 0; k < K; ++k) saved_at[k] = load(p.at.saved + (now.n * K + k) * H + i, n);
    if (projected) {  // no cell with a projection asks for its value
      prev_at[0] = next_at[0] = V(0);
    } else {
      prev_at[0] = before.load(p.at.h0, p.at.y, H, i, n);
      next_at[0] = load(p.at.y + now.n * H + i, n);
    }
    for (int k = 1; k < S; ++k) {
      prev_at[k] = before.load(p.at.c0, p.at.c, (S - 1) * H, beside<Cell>(0, k, H, i), n);
      next_at[k] = load(p.at.c + beside<Cell>(now.n, k, H, i), n);
    }
    for (int g = 0; g < G; ++g) {
      gx[g] += load_or_zero(p.of_gx, (now.n * G + g) * H + i, n);
      gh[g] += load_or_zero(p.of_gh, (now.n * G + g) * H + i, n);
    }
  }

  RNN_HD void run(const RowStep& now) {
    if (!now.active) {
      for (V& x : next) x = V(0);
      for (V& x : saved) x = V(0);
      return;
    }
    for (int s = 0; s < S; ++s) {
      V dnext[S], of_gx[G], of_gh[G], of_prev[S];
      for (int k = 0; k < S; ++k) dnext[k] = V(k == s);
      Cell::backward(saved_at, prev_at, next_at, dnext, of_gx, of_gh, of_prev);
      next[s] = V(0);
      for (int g = 0; g < G; ++g)
        next[s] += g < G - Cell::A ? of_gx[g] * (gx[g] + gh[g]) : of_gx[g] * gx[g] + of_gh[g] * gh[g];
      for (int k = 0; k < S; ++k) next[s] += of_prev[k] * prev[k];
    }
    if constexpr (K > 0) Cell::tangents(saved_at, gx, gh, saved);
  }
};

// Of values: it leaves the gradients of the states behind that each step was run with, which a loop of tangents takes.
template <class Cell, class IO>
struct RecordingUnit : BackwardUnit<Cell, IO> {
  RNN_HD void write(const Backward<IO>& call, const RowStep& now, int64_t i, int n) const {
    using V = typename BackwardUnit<Cell, IO>::V;
    BackwardUnit<Cell, IO>::write(call, now, i, n);
    const auto& p = static_cast<const BackwardRecord<IO>&>(call);
    for (int k = 0; k < Cell::S && !now.outside; ++k)
      store(p.dnext + (now.n * Cell::S + k) * p.seq.H + i, now.active ? this->dnext[k] : V(0), n);
  }
};

template <class Cell, class IO>
struct BackwardTangentUnit : BackwardUnit<Cell, IO> {
  using Base = BackwardUnit<Cell, IO>;
  using typename Base::V;
  static constexpr int G = Cell::G, S = Cell::S, K = Cell::K;
  // Values stand in what Base has of this name, and their tangents here; but dnext there has tangents, like dout, since
  // the loop adds them up.
  V saved_t[K + 1], prev_t[S], next_t[S], dnext_at[S];
  V of_raw;  // to the gradient of an h before its projection

  RNN_HD void read(const Backward<IO>& call, int64_t d, const RowStep& now, const StateBefore& before, int64_t i, int n,
                   bool projected) {
    Base::read(call, d, now, before, i, n, projected);
    const auto& p = static_cast<const BackwardTangents<IO>&>(call);
    const int64_t H = p.seq.H, at = now.n * H + i;
    for (int k = 0; k < K; ++k) saved_t[k] = load(p.tangents.saved + (now.n * K + k) * H + i, n);
    of_raw = projected ? this->load_or_zero(p.of_raw, at, n) : V(0);
    if (projected) {
      prev_t[0] = next_t[0] = V(0);
    } else {
      prev_t[0] = before.load(p.tangents.h0, p.tangents.y, H, i, n);
      next_t[0] = load(p.tangents.y + at, n);
    }
    for (int k = 1; k < S; ++k) {
      prev_t[k] = before.load(p.tangents.c0, p.tangents.c, (S - 1) * H, beside<Cell>(0, k, H, i), n);
      next_t[k] = load(p.tangents.c + beside<Cell>(now.n, k, H, i), n);
    }
    for (int k = 0; k < S; ++k) dnext_at[k] = load(p.dnext + (now.n * S + k) * H + i, n);
  }

  RNN_HD void run(const RowStep& now) {
    if (!now.active) {
      for (V& x : this->dgx) x = V(0);
      for (V& x : this->dgh) x = V(0);
      return;
    }
    using D = Dual<V>;
    D saved[K + 1], prev[S], next[S], dnext[S], dgx[G], dgh[G], dprev[S];
    for (int k = 0; k < K; ++k) saved[k] = D(this->saved[k], saved_t[k]);
    for (int k = 0; k < S; ++k) {
      prev[k] = D(this->prev[k], prev_t[k]);
      next[k] = D(this->next[k], next_t[k]);
      dnext[k] = D(dnext_at[k], this->dnext[k]);
    }
    Cell::backward(saved, prev, next, dnext, dgx, dgh, dprev);
    for (int g = 0; g < G; ++g) {
      this->dgx[g] = dgx[g].t;
      this->dgh[g] = dgh[g].t;
    }
    for (int k = 0; k < S; ++k) this->dprev[k] = now.handed_on(dprev[k].t);
  }
};

}  // namespace rnn::cpu::RNN_ISA
