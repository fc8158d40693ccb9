// The forward loop of a cell whose products are normalised (common/normed.h): the product, then, once all threads know
// the mean and the deviation of each row of it, the cell, and, where that emits, the same once more for the state.
#pragma once

#include "cpu/forward.h"

namespace rnn::cpu::RNN_ISA {

template <class IO>
void ForwardLoop<IO>::run_normed_block(int64_t d, int64_t first, int64_t last, const Share& share,
                                       const ThreadScratch& scratch, Barrier& barrier) {
  const Direction& dir = directions_[d];
  const int64_t begin = share.begin(dir.hidden.tiles()), end = share.end(dir.hidden.tiles());
  const int64_t stride = padded_factors(p_.seq.R), H = p_.seq.H, each = dir.hidden.tile_units();
  const int G = cell_.G, width = vectors_per_gate(G);
  const NormedKernels<IO>& cell = kernels_.normed;
  const auto of_tile = [&](int64_t j) { return scratch.gx + (j - begin) * scratch.places * panel(); };
  // Calls then(r, tile of that row) for the rows that are there.
  const auto each_row = [&](int64_t j, int64_t rows, auto&& then) {
    const T* v = of_tile(j);
    for (int64_t r = 0; r < rows; ++r, v += panel())
      if (scratch.active[r]) then(r, v);
  };
  // How many of the lanes of a vector of tile j exist.
  const auto lanes = [&](int64_t j, int u) { return int(most(0, least(kLanes, H - j * each - u * kLanes))); };
  for (int64_t s = 0; s < p_.seq.T; ++s) {
    const int64_t rows = present(first, last, s);
    if (rows == 0) break;
    const Step step = step_of(d, first, rows, s, scratch);
    const F* h = dir.h[s & 1] + first * stride;
    Base::each_tile(dir.hidden, share, s, [&](int64_t j, int64_t next) {
      multiply(dir.hidden, j, next, h, stride, rows, of_tile(j), scratch.active);
      each_row(j, rows, [&](int64_t r, const T* v) {
        for (int group = 0; group < cell_.groups(); ++group) {
          const T* of_group = v + cell_.first_gate(group) * width * kLanes;
          dir.hidden_moments[group].put(first + r, j, moments_of<T, V>(cell_.gates(group) * width, [&](int k, V& x) {
                                          x = load(of_group + k * kLanes);
                                          return lanes(j, k % width);
                                        }));
        }
      });
    });
    barrier.wait(share.size);
    for (int64_t r = 0; r < rows; ++r)
      for (int k = 0; scratch.active[r] && k < cell_.groups(); ++k)
        scratch.norms[r].hidden[k] = dir.hidden_moments[k].standard(first + r, kNormEpsilon);
    for (int64_t j = begin; j < end; ++j) {
      cell.forward(this, &dir, &step, j, of_tile(j));
      if (!cell_.emits) continue;
      each_row(j, rows, [&](int64_t r, const T* v) {
        dir.state_moments.put(first + r, j, moments_of<T, V>(width, [&](int u, V& x) {
                                x = load(v + (width + u) * kLanes);
                                return lanes(j, u);
                              }));
      });
    }
    barrier.wait(share.size);
    if (cell_.emits) {
      for (int64_t r = 0; r < rows; ++r)
        if (scratch.active[r]) scratch.norms[r].state = dir.state_moments.standard(first + r, kNormEpsilon);
      for (int64_t j = begin; j < end; ++j) cell.emit(this, &dir, &step, j, of_tile(j));
      barrier.wait(share.size);
    }
    if (dir.raw) project(dir, step, share, scratch, barrier);
  }
}

// A normed cell's part in it.
template <class Cell, class IO>
class NormedForwardCells : LoopBase<IO> {
  using Base = LoopBase<IO>;
  using Base::kLanes, Base::left, Base::padded, Base::padded_factors;
  using typename Base::T, typename Base::V;
  using Loop = ForwardLoop<IO>;
  using Direction = typename Loop::Direction;
  using State = typename Loop::State;
  using Step = typename Loop::Step;
  using Unit = ForwardUnit<Cell, IO>;
  static constexpr int kWidth = vectors_per_gate(Cell::G), kPanel = Cell::G * kWidth * kLanes;
  static_assert(Cell::S <= Cell::G && (!Cell::kEmits || Cell::S == 2));

 public:
  static void cells(const void* of, const void* direction, const void* at, int64_t j, T* v) {
    each(of, direction, at, j,
         [&](const Loop& loop, const Direction& dir, const Step& step, int64_t r, int64_t i, int u) {
           cell(loop, dir, step, r, i, v + r * kPanel + u * kLanes);
         });
  }

  static void emit(const void* of, const void* direction, const void* at, int64_t j, const T* v) {
    if constexpr (Cell::kEmits) {
      each(of, direction, at, j,
           [&](const Loop& loop, const Direction& dir, const Step& step, int64_t r, int64_t i, int u) {
             emit(loop, dir, step, r, i, v + r * kPanel + u * kLanes);
           });
    }
  }

 private:
  // Calls then(.., row, unit, vector) for each vector of units of tile j of each row.
  template <class Then>
  static void each(const void* of, const void* direction, const void* at, int64_t j, Then&& then) {
    const Loop& loop = *static_cast<const Loop*>(of);
    const Step& step = *static_cast<const Step*>(at);
    for (int64_t r = 0; r < step.rows; ++r) {
      for (int u = 0; u < kWidth; ++u) {
        const int64_t i = (j * kWidth + u) * kLanes;
        if (i < loop.p_.seq.H) then(loop, *static_cast<const Direction*>(direction), step, r, i, u);
      }
    }
  }
  // One step of the units of a row from unit i on. v: of their first gate; gates are kWidth vectors apart.
  static void cell(const Loop& loop, const Direction& dir, const Step& step, int64_t r, int64_t i, T* v) {
    const Forward<IO>& p = loop.p_;
    const int64_t H = p.seq.H;
    const int n = left(H, i);
    const RowStep& now = step.now[r];
    const State state = loop.state(dir, step.first + r, step.s);
    T* c = Cell::S > 1 ? dir.c + beside<Cell>(state.b, 1, padded(H), i) : nullptr;
    Unit unit;
    V products[Cell::G];
    unit.read_parameters(dir.unit, H, i, n);
    if (now.active) {
      const IO* x = p.input(now.t, now.b) + dir.d * Cell::G * H + i;
      for (int g = 0; g < Cell::G; ++g) {
        const int a = g - (Cell::G - Cell::kOwnA);
        const Standard& by = step.norms[r].hidden[a >= 0];
        const V product = load(v + g * kWidth * kLanes);
        unit.gx[g] = load(x + g * H, n) + load(dir.bias[0] + g * padded(H) + i);
        unit.gh[g] = standardized<T>(product, by) * unit.prev[Cell::S + g];
        if (a >= 0) unit.gh[g] += unit.prev[Cell::S + Cell::G + a];
        products[g] = product;
      }
    }
    unit.prev[0] = dir.raw ? V(T(0)) : load(state.h + i);
    for (int k = 1; k < Cell::S; ++k) unit.prev[k] = load(c + (k - 1) * padded(H));

    unit.run(now);

    for (int g = 0; now.active && g < Cell::G; ++g) unit.saved[Cell::kOwnK + g] = products[g];
    for (int k = 1; k < Cell::S; ++k) store(c + (k - 1) * padded(H), unit.state(now, k));
    unit.write_all_but_h(p, now, i, n);
    if constexpr (Cell::kEmits) {
      for (int k = 0; k < Cell::S; ++k) store(v + k * kWidth * kLanes, unit.next[k]);
    } else {
      Loop::keep(state, i, unit.state(now, 0), n);
      Unit::write_h(p, now, i, n, false, unit.next[0]);
    }
  }

  // The h of these units, from both states.
  static void emit(const Loop& loop, const Direction& dir, const Step& step, int64_t r, int64_t i, const T* v) {
    const Forward<IO>& p = loop.p_;
    const int64_t H = p.seq.H;
    const int n = left(H, i);
    const RowStep& now = step.now[r];
    const State state = loop.state(dir, step.first + r, step.s);
    V h(T(0));
    if (now.active) {
      const IO* affine = dir.unit + (Cell::P - 2) * H + i;
      const Standard& by = step.norms[r].state;
      const V x = standardized<T>(load(v + kWidth * kLanes), by);
      h = Cell::emit(load(v), x * load(affine, n) + load(affine + H, n));
    }
    if (dir.raw) {
      store(dir.raw + state.b * padded_factors(H) + i, h, n);
    } else {
      Loop::keep(state, i, now.active ? now.handed_on(h) : load(state.h + i), n);
    }
    Unit::write_h(p, now, i, n, dir.raw, h);
  }
};

}  // namespace rnn::cpu::RNN_ISA
