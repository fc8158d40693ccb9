// A cell's part in a step of the backward loop.
#pragma once

#include "cpu/backward.h"

namespace rnn::cpu::RNN_ISA {

template <class Cell, class IO, class Unit = BackwardUnit<Cell, IO>>
class BackwardCells : LoopBase<IO> {
  using Base = LoopBase<IO>;
  using Base::kLanes, Base::left, Base::padded;
  using typename Base::F, typename Base::T, typename Base::V;
  using Loop = BackwardLoop<IO>;
  using Block = typename Loop::Block;
  static constexpr int kWidth = Loop::kWidth;

 public:
  static void cells(const void* of, int64_t d, const void* block, int64_t s, int64_t j, const T* dh) {
    const Loop& loop = *static_cast<const Loop*>(of);
    const Block& k = *static_cast<const Block*>(block);
    for (int64_t r = k.first; r < k.last; ++r, dh += kWidth * kLanes) cell(loop, d, r, r + k.slot, s, j, dh);
  }

 private:
  // Sums over the units of a tile of a row.
  struct Squares {
    SumOfSquares<V> dh, gates;
  };

  // A row at a step, and what it keeps its state in.
  struct At {
    const Loop& loop;
    const typename Loop::Direction& dir;
    RowStep now;
    StateBefore before;
    int64_t d, r, slot, s;
  };

  // One step back of the units of tile j of a row. dh_tile [vectors, lanes] came through W_hh, or through W_hr.
  static void cell(const Loop& loop, int64_t d, int64_t r, int64_t slot, int64_t s, int64_t j, const T* dh_tile) {
    const Sequence& q = loop.p_.seq;
    const auto& dir = loop.directions_[d];
    const RowStep now = RowStep::backward(q, d, loop.rows_[r], s);
    const At at{loop, dir, now, StateBefore::of(q, d, loop.rows_[r], s, now.active && !now.cut), d, r, slot, s};
    Squares squares;
    for (int u = 0; u < kWidth; ++u, dh_tile += kLanes) {
      const int64_t i = (j * kWidth + u) * kLanes;
      if (now.active && i + kLanes <= q.H) {
        units(at, i, kLanes, dh_tile, squares);
      } else if (i < q.H) {
        rare_units(at, i, dh_tile, squares);
      }
    }
    if (loop.p_.flow && !dir.dprojected) dir.dh_squares[s & 1].part(slot, j) = squares.dh.sum();
    if (dir.unbounded) dir.gate_squares.part(slot, j) = squares.gates.sum();
  }

  // The last units of a row, or padding: apart from all others, as forward's.
  __attribute__((noinline)) static void rare_units(At at, int64_t i, const T* dh, Squares& squares) {
    units(at, i, left(at.loop.p_.seq.H, i), dh, squares);
  }

  // n units from unit i on.
  static RNN_HD void units(const At& at, int64_t i, int n, const T* through, Squares& squares) {
    const auto& [loop, dir, now, before, d, r, slot, s] = at;
    const Backward<IO>& p = loop.p_;
    const Sequence& q = p.seq;
    const bool projected = dir.dprojected;
    T* const dh = projected ? nullptr : dir.dh + slot * padded(q.H) + i;
    T* const dc = Cell::S > 1 ? dir.dc + beside<Cell>(slot, 1, padded(q.H), i) : nullptr;
    Unit unit;
    if (now.active) {
      unit.read(p, d, now, before, i, n, projected);
      unit.dnext[0] = load(through);
      if (!projected) {
        unit.dnext[0] = loop.unmasked(unit.dnext[0], d, loop.rows_[r], i, n) + (load(dh) + unit.dout[0]);
        if (p.flow) squares.dh.add(unit.dnext[0], n);
      } else if constexpr (requires { unit.of_raw; }) {
        unit.dnext[0] += unit.of_raw;
      }
      for (int k = 1; k < Cell::S; ++k) unit.dnext[k] = load(dc + (k - 1) * padded(q.H)) + unit.dout[k];
    }

    unit.run(now);

    if (now.active) {
      if (!projected) store(dh, unit.dprev[0]);
      for (int k = 1; k < Cell::S; ++k) store(dc + (k - 1) * padded(q.H), unit.dprev[k]);
      for (int k = 0; k < Unit::P; ++k) {
        T* const sum = dir.dunit + (slot * Unit::P + k) * padded(q.H) + i;
        store(sum, load(sum) + unit.dprev[Cell::S + k]);
      }
    }
    if (dir.unbounded) {  // until the norms are known
      for (int g = 0; g < Cell::G; ++g) squares.gates.add(unit.dgx[g], n);
      unit.put_columns(dir.unbounded + slot * Unit::kColumns * q.H + i, q.H, n);
      return;
    }
    if (p.clip.kind != Clip::kNone) {
      for (V& x : unit.dgx) x = p.clip.template elementwise<T>(x);
      for (V& x : unit.dgh) x = p.clip.template elementwise<T>(x);
    }
    // To the product of the step before, and to the result.
    F* dgh = dir.dgh[s & 1] + slot * Base::padded_factors(Cell::G * q.H) + i;
    for (int g = 0; g < Cell::G; ++g) store(dgh + g * q.H, now.handed_on(unit.dgh[g]), n);
    unit.write(p, now, i, n);
  }
};

}  // namespace rnn::cpu::RNN_ISA
