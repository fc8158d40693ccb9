// The backward loop over time. Step s takes the gate gradients of step s + 1 through W_hh, adds what else reaches the
// state, and runs the cell: the same form as forward, product first and cell behind it. Windows of truncated BPTT are
// rows like any other; rows run in blocks whose state fits the cache, however many there are.
#pragma once

#include <algorithm>

#include "cpu/loop.h"
#include "cpu/row_statistic.h"

namespace rnn::cpu::RNN_ISA {

template <class Cell, class IO>
class BackwardLoop : LoopBase<IO> {
  using Base = LoopBase<IO>;
  using Base::kLanes, Base::left, Base::load_or_zero, Base::padded, Base::padded_factors;
  using typename Base::F, typename Base::T, typename Base::V;
  using Unit = BackwardUnit<Cell, IO>;
  static constexpr int kWidth = kMaxVectors;
  static constexpr int kColumns = Unit::kColumns;
  static constexpr int64_t kBlockRows = 48;  // per thread; enough to read the weights rarely
  static constexpr int64_t kMostRows = 96;   // of a block, whatever the number of threads

 public:
  using Base::stale;
  BackwardLoop(const Backward<IO>& p, void* workspace, int threads) : p_(p), arena_(workspace) {
    const Sequence& q = p.seq;
    const bool norm = p.clip.kind == Clip::kNorm;
    row_count_ = q.rows();
    if (q.starts && q.truncated()) {  // windows that no row reaches are left out
      row_count_ = 0;
      for (int64_t t = 0; t < q.T; t += q.window) row_count_ += q.starts[t + 1] - q.starts[t];
    }
    slots_ = least(row_count_, kBlockRows * threads);
    rows_ = arena_.take<Row>(row_count_);
    products_ = arena_.take<T>(threads * kMostRows * kWidth * kLanes);
    for (int64_t d = 0; d < q.D; ++d) {
      Direction& dir = directions_[d];
      dir.hidden = {nullptr, Cell::G * q.H, q.R, 1, kWidth};
      dir.hidden.data = arena_.take<F>(dir.hidden.size());
      if (p.w_hr[d]) {
        dir.projection = {nullptr, q.R, q.H, 1, kWidth};
        dir.projection.data = arena_.take<F>(dir.projection.size());
        dir.dprojected = arena_.take<F>(slots_ * padded_factors(q.R));
      }
      dir.dgh[0] = arena_.take<F>(slots_ * padded_factors(Cell::G * q.H));
      dir.dgh[1] = q.steps() > 1 ? arena_.take<F>(slots_ * padded_factors(Cell::G * q.H)) : dir.dgh[0];
      dir.dh = arena_.take<T>(slots_ * padded(q.R));
      if (Cell::S > 1) dir.dc = arena_.take<T>(slots_ * padded(q.H));
      if (norm) dir.unbounded = arena_.take<T>(slots_ * kColumns * q.H);
      if (norm) dir.gate_squares = take_row_statistic(arena_, slots_, cells(d).tiles());
      for (RowStatistic& squares : dir.dh_squares)
        if (p.flow) squares = take_row_statistic(arena_, slots_, dir.hidden.tiles());
    }
  }

  int64_t workspace_bytes() const { return arena_.used(); }

  Partition partition(int threads) const { return Base::partition(p_.seq, directions_[0].hidden, Cell::G, threads); }

  void prepare(int thread, int threads) {
    for (int64_t d = 0; d < p_.seq.D; ++d) {
      const Direction& dir = directions_[d];
      for (int64_t j = thread; j < dir.hidden.tiles(); j += threads) dir.hidden.pack(p_.w_hh[d], j);
      for (int64_t j = thread; dir.dprojected && j < dir.projection.tiles(); j += threads)
        dir.projection.pack(p_.w_hr[d], j);
      for (int64_t slot = thread; slot < slots_; slot += threads) {
        for (F* dgh : dir.dgh) Base::clear_padding(dgh + slot * padded_factors(Cell::G * p_.seq.H), Cell::G * p_.seq.H);
        if (dir.dprojected) Base::clear_padding(dir.dprojected + slot * padded_factors(p_.seq.R), p_.seq.R);
      }
    }
    if (row_count_ < p_.seq.rows()) {
      if (thread == 0) find_windows();
    } else {
      for (int64_t r = thread; r < row_count_; r += threads) rows_[r] = p_.seq.row(r);
    }
  }

  void run(const Partition& parts, const Share& share, Barrier& barrier) {
    const auto [first_row, last_row] = Base::rows_of(p_.seq, rows_, row_count_, parts, share);
    const int64_t n = last_row - first_row;
    if (n == 0) return;
    const int64_t slots = slots_ / parts.row_parts, slot = share.group % parts.row_parts * slots;  // this group's
    const int64_t blocks = (n - 1) / least(kMostRows, slots) + 1;
    for (int64_t d = share.first_direction; d < share.last_direction; ++d) {
      for (int64_t k = 0; k < blocks; ++k) {
        const int64_t first = first_row + n * k / blocks, last = first_row + n * (k + 1) / blocks;
        run_block(d, {first, last, slot - first}, share, barrier);
      }
    }
  }

 private:
  struct Direction {
    Panels<F> hidden;                 // W_hh
    Panels<F> projection;             // W_hr
    F* dprojected = nullptr;          // [slots, R]: gradient of the projected h of this step
    F* dgh[2] = {};                   // [slots, G*H] each: gradient of gh of even and odd steps
    T* dh = nullptr;                  // [slots, R]: what reaches h of this step around W_hh
    T* dc = nullptr;                  // [slots, H]
    T* unbounded = nullptr;           // [slots, (G+A)*H]: gradients of the gates before they are bounded by their norm
    RowStatistic gate_squares = {};   // of dgx, for its norm; rows are slots, parts tiles
    RowStatistic dh_squares[2] = {};  // of the gradient of h of even and odd steps, for the flow
  };

  // Rows first to last; row r keeps its state in slot r + slot.
  struct Block {
    int64_t first, last, slot;
  };

  // The windows of packed rows, the longest first, as rows of packed sequences always are: those that take part in a
  // step then stand in front of all others.
  void find_windows() {
    const Sequence& q = p_.seq;
    Row* row = rows_;
    for (int64_t t = 0; t < q.T; t += q.window)
      for (int64_t b = 0; b < q.starts[t + 1] - q.starts[t]; ++b) *row++ = q.row(t / q.window * q.B + b);
    std::sort(rows_, row, [](const Row& a, const Row& b) {
      return a.length != b.length ? a.length > b.length : a.start != b.start ? a.start < b.start : a.b < b.b;
    });
  }

  // The units of a step in the order of its cell: behind W_hh, or W_hr where there is one.
  const Panels<F>& cells(int64_t d) const { return p_.w_hr[d] ? directions_[d].projection : directions_[d].hidden; }

  void run_block(int64_t d, const Block& k, const Share& share, Barrier& barrier) {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    const int64_t gates = padded_factors(Cell::G * q.H);
    T* product = products_ + share.thread * kMostRows * kWidth * kLanes;
    int64_t rows = q.starts ? 0 : k.last - k.first;  // that take part in a step, if only in its padding
    begin(d, k, share);
    if (q.starts) barrier.wait(share.size);  // begin() has cleared what other threads of the group write and multiply
    for (int64_t s = (q.starts ? rows_[k.first].length : q.steps()) - 1; s >= 0; --s) {
      while (k.first + rows < k.last && rows_[k.first + rows].length > s) ++rows;
      const Block now{k.first, k.first + rows, k.slot};
      // The product carries what comes from step s + 1: there is none where no such step takes the state of this one.
      Base::for_tiles(
          dir.hidden, dir.dgh[(s + 1) & 1] + (k.first + k.slot) * gates, gates, rows, share, product,
          [&](int64_t r) { return linked(d, rows_[k.first + r], s + 1); },
          [&](int64_t r, int64_t j, const T* dh) {
            if (dir.dprojected) {
              project(d, k.first + r, k.first + r + k.slot, s, j, dh);
            } else {
              cell(d, k.first + r, k.first + r + k.slot, s, j, dh);
            }
          });
      barrier.wait(share.size);
      if (dir.dprojected) {
        Base::for_tiles(
            dir.projection, dir.dprojected + (k.first + k.slot) * padded_factors(q.R), padded_factors(q.R), rows, share,
            product, [&](int64_t r) { return s < rows_[k.first + r].length; },
            [&](int64_t r, int64_t j, const T* dh) { cell(d, k.first + r, k.first + r + k.slot, s, j, dh); });
        barrier.wait(share.size);
      }
      if (dir.unbounded) {
        bound_norm(d, now, s, share);
        barrier.wait(share.size);
      }
      if (p_.flow) write_flow(d, now, s, share);
    }
    finish(d, k, share, product);
    barrier.wait(share.size);
  }

  // Calls then(r, i) for the units of this share's tiles, a vector at a time.
  template <class Then>
  static void for_units(const Panels<F>& w, const Block& k, const Share& share, Then&& then) {
    const int64_t begin = share.begin(w.tiles()) * w.tile_units();
    const int64_t end = least(share.end(w.tiles()) * w.tile_units(), w.units);
    for (int64_t r = k.first; r < k.last; ++r)
      for (int64_t i = begin; i < end; i += kLanes) then(r, i);
  }

  // Does step s take place, with the state that the step before left?
  bool linked(int64_t d, const Row& row, int64_t s) const { return s < row.length && !p_.seq.cut_before(d, row, s); }

  // What reaches the last state of each row from outside.
  void begin(int64_t d, const Block& k, const Share& share) {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    const int64_t gates = padded_factors(Cell::G * q.H);
    for (int64_t r = k.first + share.rank; q.starts && r < k.last; r += share.size)  // products reach them before cells
      for (F* dgh : dir.dgh) std::memset(dgh + (r + k.slot) * gates, 0, gates * sizeof(F));
    for_units(dir.hidden, k, share, [&](int64_t r, int64_t i) {
      const IO* from = q.last(d, rows_[r]) ? p_.dh_n : nullptr;
      store(dir.dh + (r + k.slot) * padded(q.R) + i,
            load_or_zero(from, q.state_at(d, rows_[r].b, q.R) + i, left(q.R, i)));
    });
    if (!dir.dc) return;
    for_units(cells(d), k, share, [&](int64_t r, int64_t i) {
      const IO* from = q.last(d, rows_[r]) ? p_.dc_n : nullptr;
      store(dir.dc + (r + k.slot) * padded(q.H) + i,
            load_or_zero(from, q.state_at(d, rows_[r].b, q.H) + i, left(q.H, i)));
    });
  }

  // What reaches the initial state of each row.
  void finish(int64_t d, const Block& k, const Share& share, T* product) {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    if (!p_.dh0) return;
    const int64_t gates = padded_factors(Cell::G * q.H);
    Base::for_tiles(
        dir.hidden, dir.dgh[0] + (k.first + k.slot) * gates, gates, k.last - k.first, share, product,
        [&](int64_t r) { return linked(d, rows_[k.first + r], 0) && q.first(d, rows_[k.first + r]); },
        [&](int64_t n, int64_t j, const T* dh) {
          const int64_t r = k.first + n;
          for (int u = 0; u < kWidth && q.first(d, rows_[r]); ++u) {
            const int64_t i = (j * kWidth + u) * kLanes;
            if (i >= q.R) break;
            const V around = load(dir.dh + (r + k.slot) * padded(q.R) + i);
            store(p_.dh0 + q.state_at(d, rows_[r].b, q.R) + i, load(dh + u * kLanes) + around, left(q.R, i));
          }
        });
    if (!p_.dc0) return;
    for_units(cells(d), k, share, [&](int64_t r, int64_t i) {
      if (!q.first(d, rows_[r])) return;
      const V dc = load(dir.dc + (r + k.slot) * padded(q.H) + i);
      store(p_.dc0 + q.state_at(d, rows_[r].b, q.H) + i, dc, left(q.H, i));
    });
  }

  // The gradient of the projected units of tile j of a row. dh [vectors, lanes] came through W_hh.
  void project(int64_t d, int64_t r, int64_t slot, int64_t s, int64_t j, const T* dh_tile) {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    const RowStep now = RowStep::backward(q, d, rows_[r], s);
    SumOfSquares<V> squares;
    for (int u = 0; u < kWidth; ++u) {
      const int64_t i = (j * kWidth + u) * kLanes;
      if (i >= q.R) break;
      const int n = left(q.R, i);
      V dh(T(0));
      if (now.active) {
        T* around = dir.dh + slot * padded(q.R) + i;
        dh = load(dh_tile + u * kLanes) + load(around) + load_or_zero(p_.dy, now.n * q.R + i, n);
        store(around, V(T(0)));
        if (p_.flow) squares.add(dh, n);
      }
      store(dir.dprojected + slot * padded_factors(q.R) + i, dh, n);
      if (!now.outside) store(p_.dproj + now.n * q.R + i, dh, n);
    }
    if (p_.flow) dir.dh_squares[s & 1].part(slot, j) = squares.sum();
  }

  // One step back of the units of tile j of a row. dh_tile [vectors, lanes] came through W_hh, or through W_hr.
  void cell(int64_t d, int64_t r, int64_t slot, int64_t s, int64_t j, const T* dh_tile) {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
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
        unit.put_columns(dir.unbounded + slot * kColumns * q.H + i, q.H, n);
        continue;
      }
      if (p_.clip.kind != Clip::kNone) {
        for (V& x : unit.dgx) x = p_.clip.template elementwise<T>(x);
        for (V& x : unit.dgh) x = p_.clip.template elementwise<T>(x);
      }
      hand_on(d, slot, s, i, n, now, unit);
    }
    if (p_.flow && !projected) dir.dh_squares[s & 1].part(slot, j) = dh_squares.sum();
    if (dir.unbounded) dir.gate_squares.part(slot, j) = gate_squares.sum();
  }

  // The gate gradients of a vector of units: to the result, and to the product of the step before.
  void hand_on(int64_t d, int64_t slot, int64_t s, int64_t i, int n, const RowStep& now, const Unit& unit) const {
    const Sequence& q = p_.seq;
    F* dgh = directions_[d].dgh[s & 1] + slot * padded_factors(Cell::G * q.H) + i;
    for (int g = 0; g < Cell::G; ++g) store(dgh + g * q.H, now.handed_on(unit.dgh[g]), n);
    unit.write(p_, now, i, n);
  }

  // Bounds the gate gradients of a step by their norms, which the cells of all tiles have left behind.
  void bound_norm(int64_t d, const Block& k, int64_t s, const Share& share) const {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    T factor(1);
    int64_t row = -1;
    RowStep now{};
    for_units(cells(d), k, share, [&](int64_t r, int64_t i) {
      const int64_t slot = r + k.slot;
      if (r != row) {
        row = r;
        now = RowStep::backward(q, d, rows_[r], s);
        factor = T(p_.clip.factor(dir.gate_squares.sum(slot)));
      }
      Unit unit;
      unit.take_columns(dir.unbounded + slot * kColumns * q.H + i, q.H, left(q.H, i), V(factor));
      hand_on(d, slot, s, i, left(q.H, i), now, unit);
    });
  }

  void write_flow(int64_t d, const Block& k, int64_t s, const Share& share) const {
    const Direction& dir = directions_[d];
    for (int64_t r = k.first + share.rank; r < k.last; r += share.size) {
      const RowStep now = RowStep::backward(p_.seq, d, rows_[r], s);
      if (now.outside) continue;
      const double squares = dir.dh_squares[s & 1].sum(r + k.slot);
      p_.flow[now.n] = now.active ? T(std::sqrt(squares)) : T(0);
    }
  }

  const Backward<IO>& p_;
  Arena arena_;
  int64_t row_count_, slots_;
  Row* rows_;
  T* products_;  // [threads, kMostRows, panel]: of one tile
  Direction directions_[kMaxDirections];
};

}  // namespace rnn::cpu::RNN_ISA
