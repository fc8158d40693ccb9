// The backward loop of one cell.
#pragma once

#include "cpu/backward.h"

namespace rnn::cpu::RNN_ISA {

template <class Cell, class IO>
class BackwardCells final : public BackwardLoop<IO> {
  using Base = BackwardLoop<IO>;
  using Base::directions_, Base::kLanes, Base::kWidth, Base::left, Base::padded, Base::p_, Base::rows_;
  using typename Base::Block, typename Base::F, typename Base::T, typename Base::V;
  using Unit = BackwardUnit<Cell, IO>;

 public:
  template <class... More>
  explicit BackwardCells(const Backward<IO>& p, More&&... more)
      : Base(CellSizes::of(Cell{}), p, std::forward<More>(more)...) {}

 private:
  void cells(int64_t d, const Block& k, int64_t s, int64_t j, const T* dh) const override {
    for (int64_t r = k.first; r < k.last; ++r, dh += kWidth * kLanes) cell(d, r, r + k.slot, s, j, dh);
  }

  // One step back of the units of tile j of a row. dh_tile [vectors, lanes] came through W_hh, or through W_hr.
  void cell(int64_t d, int64_t r, int64_t slot, int64_t s, int64_t j, const T* dh_tile) const {
    const Sequence& q = p_.seq;
    const auto& dir = directions_[d];
    const bool projected = dir.dprojected;
    const RowStep now = RowStep::backward(q, d, rows_[r], s);
    const StateBefore before = StateBefore::of(q, d, rows_[r], s, now);
    SumOfSquares<V> dh_squares, gate_squares;
    for (int u = 0; u < kWidth; ++u) {
      const int64_t i = (j * kWidth + u) * kLanes;
      if (i >= q.H) break;
      const int n = left(q.H, i);
      T* const dh = projected ? nullptr : dir.dh + slot * padded(q.H) + i;
      T* const dc = Cell::S > 1 ? dir.dc + slot * padded(q.H) + i : nullptr;
      Unit unit;
      if (now.active) {
        unit.read(p_, now, before, i, n, projected);
        unit.dnext[0] = load(dh_tile + u * kLanes);
        if (!projected) {
          unit.dnext[0] += load(dh) + unit.dout[0];
          if (p_.flow) dh_squares.add(unit.dnext[0], n);
        }
        if constexpr (Cell::S > 1) unit.dnext[1] = load(dc) + unit.dout[1];
      }

      unit.run(now);

      if (now.active) {
        if (!projected) store(dh, unit.dprev[0]);
        if constexpr (Cell::S > 1) store(dc, unit.dprev[1]);
      }
      if (dir.unbounded) {  // until the norms are known
        for (int g = 0; g < Cell::G; ++g) gate_squares.add(unit.dgx[g], n);
        unit.put_columns(dir.unbounded + slot * Unit::kColumns * q.H + i, q.H, n);
        continue;
      }
      if (p_.clip.kind != Clip::kNone) {
        for (V& x : unit.dgx) x = p_.clip.template elementwise<T>(x);
        for (V& x : unit.dgh) x = p_.clip.template elementwise<T>(x);
      }
      // To the product of the step before, and to the result.
      F* dgh = dir.dgh[s & 1] + slot * Base::padded_factors(Cell::G * q.H) + i;
      for (int g = 0; g < Cell::G; ++g) store(dgh + g * q.H, now.handed_on(unit.dgh[g]), n);
      unit.write(p_, now, i, n);
    }
    if (p_.flow && !projected) dir.dh_squares[s & 1].part(slot, j) = dh_squares.sum();
    if (dir.unbounded) dir.gate_squares.part(slot, j) = gate_squares.sum();
  }
};

}  // namespace rnn::cpu::RNN_ISA
