// A cell's part in a step of the forward loop.
#pragma once

#include "cpu/forward.h"

namespace rnn::cpu::RNN_ISA {

template <class Cell, class IO, class Unit = ForwardUnit<Cell, IO>>
class ForwardCells : LoopBase<IO> {
  using Base = LoopBase<IO>;
  using Base::kLanes, Base::padded, Base::padded_factors;
  using typename Base::T, typename Base::V;
  using Loop = ForwardLoop<IO>;
  using Direction = typename Loop::Direction;
  using State = typename Loop::State;
  using Step = typename Loop::Step;
  static constexpr CellSizes kSizes = CellSizes::of(Cell{});
  static constexpr int kWidth = vectors_per_gate(Cell::G);
  static_assert(Cell::G * kWidth <= kMaxColumns, "a cell of more gates needs wider panels");

 public:
  static void cells(const void* of, const void* direction, const void* at, int64_t j, const T* gx, const T* gh) {
    const Loop& loop = *static_cast<const Loop*>(of);
    const Direction& dir = *static_cast<const Direction*>(direction);
    const Step& step = *static_cast<const Step*>(at);
    const int64_t H = loop.p_.seq.H;
    for (int64_t r = 0; r < step.rows; ++r) {
      const RowStep now = step.now[r];
      const State state = loop.state(dir, step.first + r, step.s);
      for (int u = 0; u < kWidth; ++u) {
        const int64_t i = (j * kWidth + u) * kLanes, at = (r * Cell::G * kWidth + u) * kLanes;
        if (now.active && i + kLanes <= H) {
          cell(loop.p_, dir, now, state, i, kLanes, gx + at, gh + at);
        } else if (i < H) {
          rare_cell(loop.p_, dir, now, state, i, gx + at, gh + at);
        }
      }
    }
  }

 private:
  // The last units of a row, or padding. Apart from all others, of which it is then known that they are there: a
  // compiler keeps them in registers.
  __attribute__((noinline)) static void rare_cell(const Forward<IO>& p, const Direction& dir, RowStep now,
                                                  const State& state, int64_t i, const T* gx, const T* gh) {
    cell(p, dir, now, state, i, LoopBase<IO>::left(p.seq.H, i), gx, gh);
  }

  // One step of n units of a row from unit i on. gx, gh: [G, kWidth, lanes].
  static RNN_HD void cell(const Forward<IO>& p, const Direction& dir, const RowStep& now, const State& state, int64_t i,
                          int n, const T* gx, const T* gh) {
    const int64_t H = p.seq.H;
    T* c = Cell::S > 1 ? dir.c + beside<Cell>(state.b, 1, padded(H), i) : nullptr;
    Unit unit;
    if (now.active) {
      for (int g = 0; g < Cell::G; ++g) {
        unit.gx[g] = load(gx + g * kWidth * kLanes) + load(dir.bias[0] + g * padded(H) + i);
        unit.gh[g] = load(gh + g * kWidth * kLanes);
        if (Loop::split(kSizes, g)) unit.gh[g] += load(dir.bias[1] + g * padded(H) + i);
      }
    }
    unit.prev[0] = dir.raw ? V(T(0)) : load(state.h + i);
    for (int k = 1; k < Cell::S; ++k) unit.prev[k] = load(c + (k - 1) * padded(H));
    unit.read_parameters(dir.unit, H, i, n);
    if (now.active) unit.draw(p.noise, dir.d, now, i);
    if constexpr (requires { unit.read_values(p, dir.d, now, i, n, false); })
      if (now.active) unit.read_values(p, dir.d, now, i, n, dir.raw);

    unit.run(now);

    if (dir.raw) {
      store(dir.raw + state.b * padded_factors(H) + i, unit.next[0], n);
    } else {
      Loop::keep(state, i, unit.state(now, 0), n);
    }
    for (int k = 1; k < Cell::S; ++k) store(c + (k - 1) * padded(H), unit.state(now, k));
    unit.write(p, now, i, n, dir.raw);
  }
};

}  // namespace rnn::cpu::RNN_ISA
