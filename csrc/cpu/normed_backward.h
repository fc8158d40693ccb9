// The backward loop of a cell whose products are normalised (common/normed.h). With x what a row was standardised to,
// and dx its gradient, that of the row itself is scale * (dx - mean(dx) - x mean(dx x)): two row statistics more for
// each norm. The mean and the deviation of forward are computed again, a step ahead, from what it has kept.
#pragma once

#include "cpu/backward.h"

namespace rnn::cpu::RNN_ISA {

template <class IO>
void BackwardLoop<IO>::take_norms(Direction& dir, const Panels<F>& product) {
  const int64_t H = p_.seq.H, tiles = product.tiles(), each = product.tile_units(), G = cell_.G;
  const auto sums = [&](RowStatistic(&to)[2]) {
    for (RowStatistic& sum : to) sum = take_row_statistic(arena_, slots_, tiles);
  };
  dir.hidden_gradient = arena_.template take<T>(slots_ * G * padded(H));
  for (int k = 0; k < cell_.groups(); ++k) {
    dir.hidden_moments[k] = take_row_moments(arena_, slots_, tiles, cell_.gates(k) * each, cell_.gates(k) * H);
    sums(dir.of_hidden[k]);
  }
  if (p_.clip.kind == Clip::kNorm) dir.unbounded_unit = arena_.template take<T>(slots_ * cell_.P * padded(H));
  if (!cell_.emits) return;
  dir.emitted = arena_.template take<T>(slots_ * 2 * padded(H));
  dir.state_moments = take_row_moments(arena_, slots_, tiles, each, H);
  sums(dir.of_state);
}

// This share's part of the means and deviations of step s.
template <class IO>
void BackwardLoop<IO>::measure(int64_t d, const Block& k, int64_t s, const Share& share) const {
  const Direction& dir = directions_[d];
  const Panels<F>& product = last_product(d);
  const int64_t H = p_.seq.H, G = cell_.G, K = cell_.K, C = cell_.C();
  for (int64_t r = k.first; r < k.last; ++r) {
    const RowStep now = RowStep::backward(p_.seq, d, rows_[r], s);
    if (!now.active) continue;
    for (int64_t j = share.begin(product.tiles()); j < share.end(product.tiles()); ++j) {
      const int64_t unit = j * product.tile_units();
      const int vectors = int(least(kWidth, (H - unit + kLanes - 1) / kLanes));
      const auto take = [&](const IO* from, V& x, int u) {
        const int n = left(H, unit + u * kLanes);
        x = load(from + unit + u * kLanes, n);
        return n;
      };
      for (int group = 0; group < cell_.groups(); ++group) {
        const IO* hidden = p_.saved + (now.n * K + K - G + cell_.first_gate(group)) * H;
        dir.hidden_moments[group].put(r + k.slot, j, moments_of<T, V>(cell_.gates(group) * vectors, [&](int v, V& x) {
                                        return take(hidden + v / vectors * H, x, v % vectors);
                                      }));
      }
      if (!cell_.emits) continue;
      const IO* state = p_.c + now.n * C * H;
      dir.state_moments.put(r + k.slot, j, moments_of<T, V>(vectors, [&](int v, V& x) { return take(state, x, v); }));
    }
  }
}

// The gradients of W_hh h at a step: to the result, and to the product of the step before. Where a row's gradients are
// bounded by their norm, all that its cells have written is multiplied by one factor, but for what they emitted.
template <class IO>
void BackwardLoop<IO>::hand_on_hidden(int64_t d, const Block& k, int64_t s, const Share& share) const {
  const Direction& dir = directions_[d];
  const int64_t H = p_.seq.H, G = cell_.G, K = cell_.K, X = columns();
  const bool bounded = p_.clip.kind == Clip::kNorm;
  int64_t row = -1;
  RowStep now{};
  T factor(1);
  for_units(last_product(d), k, share, [&](int64_t r, int64_t i) {
    if (r != row) {
      row = r;
      now = RowStep::backward(p_.seq, d, rows_[r], s);
      if (bounded && now.active) factor = T(p_.clip.factor(dir.gate_squares.sum(r + k.slot)));
    }
    const int n = left(H, i);
    const Norms& norms = k.norms[r - k.first];
    const T* from = dir.hidden_gradient + (r + k.slot) * G * padded(H) + i;
    F* dgh = dir.dgh[s & 1] + (r + k.slot) * padded_factors(G * H) + i;
    for (int64_t g = 0; g < G; ++g) {
      V gradient(T(0));
      if (now.active) {
        const int group = g >= G - cell_.alone;
        const V x = standardized<T>(load(p_.saved + (now.n * K + K - G + g) * H + i, n), norms.hidden[group]);
        gradient =
            V(factor) * destandardized<T>(load(from + g * padded(H)), x, norms.hidden[group], norms.of_hidden[group]);
      }
      if (!now.outside) store(p_.dgates + (now.n * X + G + g) * H + i, gradient, n);
      store(dgh + g * H, now.handed_on(gradient), n);
    }
    if (!bounded || !now.active) return;
    for (int64_t g = 0; g < G; ++g) {
      IO* written = p_.dgates + (now.n * X + g) * H + i;
      store(written, V(factor) * load(written, n), n);
    }
    for (int64_t p = 0; p < cell_.P - 2 * cell_.emits; ++p) {
      const int64_t at = ((r + k.slot) * cell_.P + p) * padded(H) + i;
      store(dir.dunit + at, load(dir.dunit + at) + V(factor) * load(dir.unbounded_unit + at));
    }
  });
}

template <class IO>
void BackwardLoop<IO>::run_normed_block(int64_t d, const Block& k, const Share& share, Barrier& barrier) {
  const Sequence& q = p_.seq;
  const Direction& dir = directions_[d];
  const NormedKernels<IO>& cell = kernels_.normed;
  const auto first_part = cell_.emits ? cell.emit_backward : cell.backward;
  const int64_t gates = padded_factors(cell_.G * q.H), tiles = last_product(d).tiles();
  T* product = products_ + share.thread * kProducts;
  bool* active = active_ + share.thread * kActiveBytes;
  Norms* norms = norms_ + share.thread * kMostRows;
  int64_t rows = q.starts ? 0 : k.last - k.first;
  const auto at_step = [&](int64_t s) {  // the rows that take part in it
    while (k.first + rows < k.last && rows_[k.first + rows].length > s) ++rows;
    return Block{k.first, k.first + rows, k.slot, norms};
  };
  // The means that a statistic of the gradients of n numbers has gathered.
  const auto means = [&](const RowStatistic(&sums)[2], int64_t row, int64_t n, T(&to)[2]) {
    for (int i = 0; i < 2; ++i) to[i] = T(sums[i].sum(k.first + row + k.slot) / double(n));
  };
  begin(d, k, share);
  const int64_t steps = q.starts ? rows_[k.first].length : q.steps();
  if (steps > 0) measure(d, at_step(steps - 1), steps - 1, share);
  barrier.wait(share.size);
  for (int64_t s = steps - 1; s >= 0; --s) {
    const Block now = at_step(s);
    for (int64_t r = 0; r < rows; ++r) {
      const Row& row = rows_[k.first + r];
      active[r] = linked(d, row, s + 1);
      if (s >= row.length) continue;
      for (int group = 0; group < cell_.groups(); ++group)
        norms[r].hidden[group] = dir.hidden_moments[group].standard(k.first + r + k.slot, kNormEpsilon);
      if (cell_.emits) norms[r].state = dir.state_moments.standard(k.first + r + k.slot, kNormEpsilon);
    }
    Base::for_tiles(dir.hidden, dir.dgh[(s + 1) & 1] + (k.first + k.slot) * gates, gates, rows, share, s, product,
                    active, [&](int64_t j, const T* dh) {
                      if (dir.dprojected) {
                        project(d, now, s, j, dh);
                      } else {
                        first_part(this, d, &now, s, j, dh);
                      }
                    });
    barrier.wait(share.size);
    if (dir.dprojected) {
      for (int64_t r = 0; r < rows; ++r) active[r] = s < rows_[k.first + r].length;
      const int64_t width = padded_factors(q.R);
      Base::for_tiles(dir.projection, dir.dprojected + (k.first + k.slot) * width, width, rows, share, s, product,
                      active, [&](int64_t j, const T* dh) { first_part(this, d, &now, s, j, dh); });
      barrier.wait(share.size);
    }
    if (cell_.emits) {
      for (int64_t r = 0; r < rows; ++r) means(dir.of_state, r, q.H, norms[r].of_state);
      for (int64_t j = share.begin(tiles); j < share.end(tiles); ++j) cell.backward(this, d, &now, s, j, nullptr);
      barrier.wait(share.size);
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int group = 0; group < cell_.groups(); ++group)
        means(dir.of_hidden[group], r, cell_.gates(group) * q.H, norms[r].of_hidden[group]);
    hand_on_hidden(d, now, s, share);
    if (p_.flow) write_flow(d, now, s, share);
    if (s > 0) measure(d, at_step(s - 1), s - 1, share);
    barrier.wait(share.size);
  }
  finish(d, k, share, product, active);
  barrier.wait(share.size);
}

// A normed cell's part in it.
template <class Cell, class IO>
class NormedBackwardCells : LoopBase<IO> {
  using Base = LoopBase<IO>;
  using Base::kLanes, Base::left, Base::padded;
  using typename Base::T, typename Base::V;
  using Loop = BackwardLoop<IO>;
  using Block = typename Loop::Block;
  using Direction = typename Loop::Direction;
  using Unit = BackwardUnit<Cell, IO>;
  static constexpr int kWidth = Loop::kWidth, G = Cell::G, kOwnA = Cell::kOwnA, kOwnK = Cell::kOwnK;

  // Sums over the units of a tile, lane by lane and then over the lanes.
  struct Sums {
    V of[2];
    Sums() { of[0] = of[1] = V(T(0)); }  // written down: GCC has no instruction set for one that it makes
    void add(V gradient, V x, int n) {
      const V own = first_lanes(gradient, n);
      of[0] += own;
      of[1] += own * first_lanes(x, n);
    }
    void put(const RowStatistic (&to)[2], int64_t slot, int64_t j) const {
      for (int i = 0; i < 2; ++i) to[i].part(slot, j) = sum_of_lanes(of[i]);
    }
  };

  // A vector of units of a row at a step.
  struct At {
    const Loop& loop;
    const Direction& dir;
    const RowStep& now;
    const StateBefore& before;
    const typename Loop::Norms& norms;
    int64_t d, r, slot, i;
    int n;

    // What reaches h: through W_hh or W_hr, around them, and from outside.
    V reaching(V through) const {
      const Backward<IO>& p = loop.p_;
      if (dir.dprojected) return through;
      const V outside = Base::load_or_zero(p.dy, now.n * p.seq.H + i, n);
      return loop.unmasked(through, d, loop.rows_[r], i, n) + (load(dir.dh + slot * padded(p.seq.H) + i) + outside);
    }
    void write(int64_t column, V x) const {
      const int64_t H = loop.p_.seq.H;
      if (!now.outside) store(loop.p_.dgates + (now.n * Unit::kColumns + column) * H + i, x, n);
    }
    // What this step adds to the gradient of a parameter.
    void add(int parameter, V x) const {
      T* sum = of_unit(dir.dunit, parameter);
      store(sum, load(sum) + x);
    }
    T* of_unit(T* memory, int parameter) const {
      return memory + (slot * Cell::P + parameter) * padded(loop.p_.seq.H) + i;
    }
    T* emitted(int which) const {
      const int64_t width = padded(loop.p_.seq.H);
      return dir.emitted + (slot * 2 + which) * width + i;
    }
  };

 public:
  static void emit(const void* of, int64_t d, const void* block, int64_t s, int64_t j, const T* dh) {
    if constexpr (Cell::kEmits) {
      each_row(of, d, block, s, j,
               [&](const Loop& loop, const Direction& dir, int64_t slot, bool active, auto&& units) {
                 SumOfSquares<V> dh_squares;
                 Sums sums;
                 units([&](const At& at, int u) {
                   const V gradient = at.reaching(load(dh + u * kLanes));
                   if (loop.p_.flow && at.now.active) dh_squares.add(gradient, at.n);
                   emit(at, gradient, sums);
                 });
                 if (active) sums.put(dir.of_state, slot, j);
                 if (loop.p_.flow && !dir.dprojected) dir.dh_squares[s & 1].part(slot, j) = dh_squares.sum();
                 dh += kWidth * kLanes;
               });
    }
  }

  static void cells(const void* of, int64_t d, const void* block, int64_t s, int64_t j, const T* dh) {
    each_row(of, d, block, s, j, [&](const Loop& loop, const Direction& dir, int64_t slot, bool active, auto&& units) {
      SumOfSquares<V> dh_squares, gate_squares;
      Sums sums[Cell::kGroups];
      units([&](const At& at, int u) {
        V gradient(T(0));  // of slot 0
        if constexpr (Cell::kEmits) {
          gradient = load(at.emitted(1));
        } else if (at.now.active) {
          gradient = at.reaching(load(dh + u * kLanes));
          if (loop.p_.flow) dh_squares.add(gradient, at.n);
        }
        cell(at, gradient, sums, gate_squares);
      });
      for (int group = 0; active && group < Cell::kGroups; ++group) sums[group].put(dir.of_hidden[group], slot, j);
      if (active && loop.p_.clip.kind == Clip::kNorm) dir.gate_squares.part(slot, j) = gate_squares.sum();
      if constexpr (!Cell::kEmits) {
        if (loop.p_.flow) dir.dh_squares[s & 1].part(slot, j) = dh_squares.sum();
        dh += kWidth * kLanes;
      }
    });
  }

 private:
  // Calls then(.., units) for each row of a block; units(f) calls f(At, vector of the tile).
  template <class Then>
  static void each_row(const void* of, int64_t d, const void* block, int64_t s, int64_t j, Then&& then) {
    const Loop& loop = *static_cast<const Loop*>(of);
    const Block& k = *static_cast<const Block*>(block);
    const Sequence& q = loop.p_.seq;
    const Direction& dir = loop.directions_[d];
    for (int64_t r = k.first; r < k.last; ++r) {
      const RowStep now = RowStep::backward(q, d, loop.rows_[r], s);
      const StateBefore before = StateBefore::of(q, d, loop.rows_[r], s, now.active && !now.cut);
      then(loop, dir, r + k.slot, now.active, [&](auto&& f) {
        for (int u = 0; u < kWidth; ++u) {
          const int64_t i = (j * kWidth + u) * kLanes;
          if (i >= q.H) break;
          f(At{loop, dir, now, before, k.norms[r - k.first], d, r, r + k.slot, i, left(q.H, i)}, u);
        }
      });
    }
  }

  // From the gradient of h to those of what it was emitted from.
  static void emit(const At& at, V dh, Sums& sums) {
    const Backward<IO>& p = at.loop.p_;
    const int64_t H = p.seq.H;
    if (!at.now.active) return;
    const IO* affine = p.unit[at.d] + (Cell::P - 2) * H + at.i;
    const V scale = load(affine, at.n), shift = load(affine + H, at.n);
    const V o = load(p.saved + (at.now.n * Cell::K + Cell::kEmitted) * H + at.i, at.n);
    const V x = standardized<T>(load(p.c + at.now.n * H + at.i, at.n), at.norms.state);
    V d_o, dn;
    Cell::emit_backward(o, x * scale + shift, dh, d_o, dn);
    const V dx = dn * scale;
    store(at.emitted(0), dx);
    store(at.emitted(1), d_o);
    sums.add(dx, x, at.n);
    at.add(Cell::P - 2, dn * x);
    at.add(Cell::P - 1, dn);
  }

  // One step back, from the gradient of slot 0, but for that of W_hh h.
  static void cell(const At& at, V gradient, Sums* sums, SumOfSquares<V>& gate_squares) {
    const Backward<IO>& p = at.loop.p_;
    const int64_t H = p.seq.H;
    const bool projected = at.dir.dprojected;
    T* const dc = Cell::S > 1 ? at.dir.dc + beside<Cell>(at.slot, 1, padded(H), at.i) : nullptr;
    Unit unit;
    V x[G];  // W_hh h, standardised
    if (at.now.active) {
      unit.read(p, at.d, at.now, at.before, at.i, at.n, projected);
      for (int g = 0; g < G; ++g) x[g] = standardized<T>(unit.saved[kOwnK + g], at.norms.hidden[g >= G - kOwnA]);
      for (int a = 0; a < kOwnA; ++a)
        unit.saved[kOwnK + a] = x[G - kOwnA + a] * unit.prev[Cell::S + G - kOwnA + a] + unit.prev[Cell::S + G + a];
      unit.dnext[0] = gradient;
      for (int k = 1; k < Cell::S; ++k) unit.dnext[k] = load(dc + (k - 1) * padded(H)) + unit.dout[k];
      if constexpr (Cell::kEmits) {
        const V c = standardized<T>(unit.next[1], at.norms.state);
        unit.dnext[1] += destandardized<T>(load(at.emitted(0)), c, at.norms.state, at.norms.of_state);
      }
    }

    unit.run(at.now);

    if (at.now.active) {
      if (!projected) store(at.dir.dh + at.slot * padded(H) + at.i, unit.dprev[0]);
      for (int k = 1; k < Cell::S; ++k) store(dc + (k - 1) * padded(H), unit.dprev[k]);
      if (p.clip.kind == Clip::kNorm) {
        for (const V& y : unit.dgx) gate_squares.add(y, at.n);
      } else if (p.clip.kind != Clip::kNone) {
        for (V& y : unit.dgx) y = p.clip.template elementwise<T>(y);
        for (V& y : unit.dgh) y = p.clip.template elementwise<T>(y);
      }
      const auto add = [&](int parameter, V gradient) {
        if (p.clip.kind == Clip::kNorm) {  // once the factor is known
          store(at.of_unit(at.dir.unbounded_unit, parameter), gradient);
        } else {
          at.add(parameter, gradient);
        }
      };
      for (int g = 0; g < G; ++g) {
        const V dx = unit.dgh[g] * unit.prev[Cell::S + g];
        store(at.dir.hidden_gradient + (at.slot * G + g) * padded(H) + at.i, dx);
        sums[g >= G - kOwnA].add(dx, x[g], at.n);
        add(g, unit.dgh[g] * x[g]);
      }
      for (int a = 0; a < kOwnA; ++a) add(G + a, unit.dgh[G - kOwnA + a]);
    }
    for (int g = 0; g < G; ++g) at.write(g, unit.dgx[g]);
  }
};

}  // namespace rnn::cpu::RNN_ISA
