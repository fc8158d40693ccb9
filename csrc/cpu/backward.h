// The backward loop over time. Step s takes the gate gradients of step s + 1 through W_hh, adds what else reaches the
// state, and runs the cell: the same form as forward, product first and cell behind it. Windows of truncated BPTT are
// rows like any other; rows run in blocks whose state fits the cache, however many there are. The cell itself is in
// backward_cells.h and called by pointer: the loop is compiled once for all.
#pragma once

#include <algorithm>
#include <memory>

#include "common/cell_list.h"
#include "cpu/kernels.h"
#include "cpu/loop.h"
#include "cpu/row_statistic.h"

namespace rnn::cpu::RNN_ISA {

template <class IO>
class BackwardLoop final : public LoopBase<IO> {
  using Base = LoopBase<IO>;
  using Base::arena_, Base::kLanes, Base::left, Base::load_or_zero, Base::padded, Base::padded_factors;
  using typename Base::F, typename Base::T, typename Base::V;

  static constexpr int64_t kBlockRows = 48;                            // per thread; enough to read the weights rarely
  static constexpr int64_t kMostRows = 96;                             // of a block, whatever the number of threads
  static constexpr int64_t kActiveBytes = (kMostRows + 63) / 64 * 64;  // cache lines of a thread's own

 public:
  BackwardLoop(const Backward<IO>& p, void* workspace, int threads, const CellKernels<IO>& kernels)
      : Base(workspace), p_(p), directions_(new Direction[p.seq.D]), kernels_(kernels), cell_(kernels.sizes) {
    const Sequence& q = p.seq;
    const int64_t gates = padded_factors(cell_.G * q.H);
    const bool norm = p.clip.kind == Clip::kNorm;
    row_count_ = q.rows();
    if (q.starts && q.truncated()) {  // windows that no row reaches are left out
      row_count_ = 0;
      for (int64_t t = 0; t < q.T; t += q.window) row_count_ += q.starts[t + 1] - q.starts[t];
    }
    slots_ = least(row_count_, kBlockRows * threads);
    rows_ = arena_.template take<Row>(row_count_);
    products_ = arena_.template take<T>(threads * kProducts);
    active_ = arena_.template take<bool>(threads * kActiveBytes);
    norms_ = arena_.template take<Norms>(cell_.normed ? threads * kMostRows : 0);
    for (int64_t d = 0; d < q.D; ++d) {
      Direction& dir = directions_[d];
      dir.hidden = {{cell_.recurrent ? cell_.G * q.H : 0, q.R, 1, kWidth}};  // without a W_hh, over nothing
      dir.hidden.data = arena_.template take<F>(dir.hidden.size());
      if (q.of_head(p.w_hr, d, 0)) {
        dir.projection = {{q.R, q.H, 1, kWidth}};
        dir.projection.data = arena_.template take<F>(dir.projection.size());
        dir.dprojected = arena_.template take<F>(slots_ * padded_factors(q.R));
      }
      dir.dgh[0] = arena_.template take<F>(slots_ * gates);
      dir.dgh[1] = q.steps() > 1 ? arena_.template take<F>(slots_ * gates) : dir.dgh[0];
      dir.dh = arena_.template take<T>(slots_ * padded(q.R));
      if (cell_.C() > 0) dir.dc = arena_.template take<T>(slots_ * cell_.C() * padded(q.H));
      if (cell_.P > 0) dir.dunit = arena_.template take<T>(slots_ * cell_.P * padded(q.H));
      if (norm && !cell_.normed) dir.unbounded = arena_.template take<T>(slots_ * columns() * q.H);
      if (norm) dir.gate_squares = take_row_statistic(arena_, slots_, last_product(d).tiles());
      if (cell_.normed) take_norms(dir, last_product(d));
      for (RowStatistic& squares : dir.dh_squares)
        if (p.flow) squares = take_row_statistic(arena_, slots_, dir.hidden.tiles());
    }
  }

  Partition partition(int threads) const override {
    return Base::share_out(p_.seq, directions_[0].hidden, cell_.G, threads);
  }

  void prepare(int thread, int threads) override {
    const int64_t gates = cell_.G * p_.seq.H;
    for (int64_t d = 0; d < p_.seq.D; ++d) {
      const Direction& dir = directions_[d];
      const IO* const w_hh = p_.seq.of_head(p_.w_hh, d, gates * p_.seq.R);
      const IO* const w_hr = p_.seq.of_head(p_.w_hr, d, 0);
      for (int64_t j = thread; j < dir.hidden.tiles(); j += threads) dir.hidden.pack(w_hh, j);
      for (int64_t j = thread; dir.dprojected && j < dir.projection.tiles(); j += threads) dir.projection.pack(w_hr, j);
      for (int64_t slot = thread; slot < slots_; slot += threads) {
        for (F* dgh : dir.dgh) Base::clear_padding(dgh + slot * padded_factors(gates), gates);
        if (dir.dprojected) Base::clear_padding(dir.dprojected + slot * padded_factors(p_.seq.R), p_.seq.R);
      }
    }
    if (row_count_ < p_.seq.rows()) {
      if (thread == 0) find_windows();
    } else {
      for (int64_t r = thread; r < row_count_; r += threads) rows_[r] = p_.seq.row(r);
    }
  }

  void run(const Partition& parts, const Share& share, Barrier& barrier) override {
    const auto [first_row, last_row] = Base::rows_of(p_.seq, rows_, row_count_, parts, share);
    const int64_t n = last_row - first_row;
    if (n == 0) return;
    const int64_t slots = slots_ / parts.row_parts, slot = share.group % parts.row_parts * slots;  // this group's
    const int64_t blocks = (n - 1) / least(kMostRows, slots) + 1;
    for (int64_t d = share.first_direction; d < share.last_direction; ++d) {
      for (int64_t k = 0; k < blocks; ++k) {
        const int64_t first = first_row + n * k / blocks, last = first_row + n * (k + 1) / blocks;
        if (cell_.normed) {
          run_normed_block(d, {first, last, slot - first}, share, barrier);
        } else {
          run_block(d, {first, last, slot - first}, share, barrier);
        }
      }
    }
  }

  // What a cell is handed and may ask for.
  static constexpr int kWidth = kMaxVectors;
  static constexpr int64_t kProducts = Base::products_of(kMostRows, kWidth* kLanes);  // sums of a thread
  struct Direction {
    Panels<F> hidden;                 // W_hh
    Panels<F> projection;             // W_hr
    F* dprojected = nullptr;          // [slots, R]: gradient of the projected h of this step
    F* dgh[2] = {};                   // [slots, G*H] each: gradient of gh of even and odd steps
    T* dh = nullptr;                  // [slots, R]: what reaches h of this step around W_hh
    T* dc = nullptr;                  // [slots, C, H]
    T* dunit = nullptr;               // [slots, P, H]: sums over the steps so far
    T* unbounded = nullptr;           // [slots, X*H]: dgates before those of gates are bounded by their norm
    RowStatistic gate_squares = {};   // of dgx, for its norm; rows are slots, parts tiles
    RowStatistic dh_squares[2] = {};  // of the gradient of h of even and odd steps, for the flow
    // Of a normed cell.
    T* emitted = nullptr;          // [slots, 2, H]: the gradients of what is emitted, standardised, and of slot 0
    T* unbounded_unit = nullptr;   // [slots, P, H]: what a step adds to dunit before it is bounded by the norm
    T* hidden_gradient = nullptr;  // [slots, G, H]: of W_hh h, standardised
    RowMoments hidden_moments[2] = {}, state_moments = {};  // of each group of gates
    RowStatistic of_hidden[2][2] = {}, of_state[2] = {};  // sums of these gradients, and of them times what they are of
  };

  // Of a row at a step of a normed cell: by what W_hh h and the state were standardised, and the mean of the gradients
  // of what came of that, and of them times it.
  struct Norms {
    Standard hidden[2], state;
    T of_hidden[2][2], of_state[2];
  };

  // Rows first to last; row r keeps its state in slot r + slot.
  struct Block {
    int64_t first, last, slot;
    Norms* norms = nullptr;  // of each row, of a normed cell
  };

  int columns() const { return cell_.columns(); }  // of dgates

  // What has come through W_hh to units i and following of a row, which may have been masked there.
  V unmasked(V dh, int64_t d, const Row& row, int64_t i, int n) const {
    return p_.h_mask ? dh * load(p_.h_mask + p_.seq.state_at(d, row.b, p_.seq.R) + i, n) : dh;
  }

  const Backward<IO>& p_;
  Row* rows_;
  const std::unique_ptr<Direction[]> directions_;  // [D]

 private:
  // One step back of the cells of tile j. dh [rows, vectors, lanes] came through W_hh, or through W_hr.
  void cells(int64_t d, const Block& k, int64_t s, int64_t j, const T* dh) const {
    kernels_.backward(this, d, &k, s, j, dh);
  }

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

  // What stands before the cell: W_hh, or W_hr where there is one. Its tiles are those of the cells.
  const Panels<F>& last_product(int64_t d) const {
    return directions_[d].projection.units ? directions_[d].projection : directions_[d].hidden;
  }

  // The same of a cell whose products are normalised, and its parts: normed_backward.h.
  void run_normed_block(int64_t d, const Block& k, const Share& share, Barrier& barrier);
  void take_norms(Direction& dir, const Panels<F>& product);
  void measure(int64_t d, const Block& k, int64_t s, const Share& share) const;
  void hand_on_hidden(int64_t d, const Block& k, int64_t s, const Share& share) const;

  void run_block(int64_t d, const Block& k, const Share& share, Barrier& barrier) {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    const int64_t gates = padded_factors(cell_.G * q.H);
    T* product = products_ + share.thread * kProducts;
    bool* active = active_ + share.thread * kActiveBytes;
    int64_t rows = q.starts ? 0 : k.last - k.first;  // that take part in a step, if only in its padding
    begin(d, k, share);
    if (q.starts) barrier.wait(share.size);  // begin() has cleared what other threads of the group write and multiply
    for (int64_t s = (q.starts ? rows_[k.first].length : q.steps()) - 1; s >= 0; --s) {
      while (k.first + rows < k.last && rows_[k.first + rows].length > s) ++rows;
      const Block now{k.first, k.first + rows, k.slot};
      // The product carries what comes from step s + 1: there is none where no such step takes the state of this one.
      for (int64_t r = 0; r < rows; ++r) active[r] = linked(d, rows_[k.first + r], s + 1);
      Base::for_tiles(dir.hidden, dir.dgh[(s + 1) & 1] + (k.first + k.slot) * gates, gates, rows, share, s, product,
                      active, [&](int64_t j, const T* dh) {
                        if (dir.dprojected) {
                          project(d, now, s, j, dh);
                        } else {
                          cells(d, now, s, j, dh);
                        }
                      });
      barrier.wait(share.size);
      if (dir.dprojected) {
        for (int64_t r = 0; r < rows; ++r) active[r] = s < rows_[k.first + r].length;
        const int64_t width = padded_factors(q.R);
        Base::for_tiles(dir.projection, dir.dprojected + (k.first + k.slot) * width, width, rows, share, s, product,
                        active, [&](int64_t j, const T* dh) { cells(d, now, s, j, dh); });
        barrier.wait(share.size);
      }
      if (dir.unbounded) {
        bound_norm(d, now, s, share);
        barrier.wait(share.size);
      }
      if (p_.flow) write_flow(d, now, s, share);
    }
    finish(d, k, share, product, active);
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

  // Calls then(r, place in [D, B, C*H], in dir.dc, count) for each vector of this share's states beside h.
  template <class Then>
  void for_others(int64_t d, const Block& k, const Share& share, Then&& then) const {
    const int64_t H = p_.seq.H, C = cell_.C();
    if (C == 0) return;
    for_units(last_product(d), k, share, [&](int64_t r, int64_t i) {
      const int64_t at = p_.seq.state_at(d, rows_[r].b, C * H) + i;
      T* dc = directions_[d].dc + (r + k.slot) * C * padded(H) + i;
      for (int64_t s = 0; s < C; ++s) then(r, at + s * H, dc + s * padded(H), left(H, i));
    });
  }

  // Does step s take place, with the state that the step before left?
  bool linked(int64_t d, const Row& row, int64_t s) const { return s < row.length && !p_.seq.cut_before(d, row, s); }

  // What reaches the last state of each row from outside.
  void begin(int64_t d, const Block& k, const Share& share) {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    const int64_t gates = padded_factors(cell_.G * q.H);
    for (int64_t r = k.first + share.rank; q.starts && r < k.last; r += share.size)  // products reach them before cells
      for (F* dgh : dir.dgh) std::memset(dgh + (r + k.slot) * gates, 0, gates * sizeof(F));
    for_units(dir.hidden, k, share, [&](int64_t r, int64_t i) {
      const IO* from = q.last(d, rows_[r]) ? p_.dh_n : nullptr;
      store(dir.dh + (r + k.slot) * padded(q.R) + i,
            load_or_zero(from, q.state_at(d, rows_[r].b, q.R) + i, left(q.R, i)));
    });
    for_others(d, k, share, [&](int64_t r, int64_t at, T* dc, int n) {
      store(dc, load_or_zero(q.last(d, rows_[r]) ? p_.dc_n : nullptr, at, n));
    });
    for_parameters(d, k, share, [&](int64_t, int64_t, T* sum, int) { store(sum, V(T(0))); });
  }

  // Calls then(r, parameter's unit in [P, H], sum, count) for each vector of this share's units of the parameters.
  template <class Then>
  void for_parameters(int64_t d, const Block& k, const Share& share, Then&& then) const {
    const int64_t H = p_.seq.H, P = cell_.P;
    if (P == 0) return;
    for_units(last_product(d), k, share, [&](int64_t r, int64_t i) {
      T* sum = directions_[d].dunit + (r + k.slot) * P * padded(H) + i;
      for (int64_t s = 0; s < P; ++s) then(r, s * H + i, sum + s * padded(H), left(H, i));
    });
  }

  // What reaches the initial state of each row.
  void finish(int64_t d, const Block& k, const Share& share, T* product, bool* active) {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    for_parameters(d, k, share, [&](int64_t r, int64_t at, const T* sum, int n) {
      store(p_.dunit + (q.number(rows_[r]) * q.D + d) * cell_.P * q.H + at, load(sum), n);
    });
    if (!p_.dh0) return;
    const int64_t gates = padded_factors(cell_.G * q.H), rows = k.last - k.first;
    for (int64_t r = 0; r < rows; ++r) {
      const Row& row = rows_[k.first + r];
      active[r] = linked(d, row, 0) && q.first(d, row);
    }
    Base::for_tiles(dir.hidden, dir.dgh[0] + (k.first + k.slot) * gates, gates, rows, share, -1, product, active,
                    [&](int64_t j, const T* dh) {
                      for (int64_t r = k.first; r < k.last; ++r, dh += kWidth * kLanes) {
                        for (int u = 0; u < kWidth && q.first(d, rows_[r]); ++u) {
                          const int64_t i = (j * kWidth + u) * kLanes;
                          if (i >= q.R) break;
                          const V around = load(dir.dh + (r + k.slot) * padded(q.R) + i);
                          const V through = unmasked(load(dh + u * kLanes), d, rows_[r], i, left(q.R, i));
                          store(p_.dh0 + q.state_at(d, rows_[r].b, q.R) + i, through + around, left(q.R, i));
                        }
                      }
                    });
    if (!p_.dc0) return;
    for_others(d, k, share, [&](int64_t r, int64_t at, const T* dc, int n) {
      if (q.first(d, rows_[r])) store(p_.dc0 + at, load(dc), n);
    });
  }

  // The gradient of the projected units of tile j at a step. dh [rows, vectors, lanes] came through W_hh.
  void project(int64_t d, const Block& k, int64_t s, int64_t j, const T* dh_tile) const {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    for (int64_t r = k.first; r < k.last; ++r, dh_tile += kWidth * kLanes) {
      const int64_t slot = r + k.slot;
      const RowStep now = RowStep::backward(q, d, rows_[r], s);
      SumOfSquares<V> squares;
      for (int u = 0; u < kWidth; ++u) {
        const int64_t i = (j * kWidth + u) * kLanes;
        if (i >= q.R) break;
        const int n = left(q.R, i);
        V dh(T(0));
        if (now.active) {
          T* around = dir.dh + slot * padded(q.R) + i;
          dh = unmasked(load(dh_tile + u * kLanes), d, rows_[r], i, n) + load(around);
          dh += load_or_zero(p_.dy, now.n * q.R + i, n);
          store(around, V(T(0)));
          if (p_.flow) squares.add(dh, n);
        }
        store(dir.dprojected + slot * padded_factors(q.R) + i, dh, n);
        if (!now.outside) store(p_.dproj + now.n * q.R + i, dh, n);
      }
      if (p_.flow) dir.dh_squares[s & 1].part(slot, j) = squares.sum();
    }
  }

  // Bounds the gate gradients of a step by their norms, which the cells of all tiles have left behind.
  void bound_norm(int64_t d, const Block& k, int64_t s, const Share& share) const {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    T factor(1);
    int64_t row = -1;
    RowStep now{};
    for_units(last_product(d), k, share, [&](int64_t r, int64_t i) {
      const int64_t slot = r + k.slot;
      if (r != row) {
        row = r;
        now = RowStep::backward(q, d, rows_[r], s);
        factor = T(p_.clip.factor(dir.gate_squares.sum(slot)));
      }
      hand_on_bounded(d, slot, s, i, now, V(factor));
    });
  }

  // The gate gradients of a vector of units, times a factor: to the result, and to the product of the step before. Of
  // the split gates, the columns behind all gates hold what goes through that product.
  void hand_on_bounded(int64_t d, int64_t slot, int64_t s, int64_t i, const RowStep& now, V factor) const {
    const int64_t H = p_.seq.H;
    const int n = left(H, i);
    const T* from = directions_[d].unbounded + slot * columns() * H + i;
    F* dgh = directions_[d].dgh[s & 1] + slot * padded_factors(cell_.G * H) + i;
    for (int column = 0; column < columns(); ++column) {
      const V gradient = load(from + column * H, n) * factor;
      if (!now.outside) store(p_.dgates + (now.n * columns() + column) * H + i, gradient, n);
      const bool split = column >= cell_.G - cell_.A;
      if (split && column < cell_.G) continue;
      store(dgh + (split ? column - cell_.A : column) * H, now.handed_on(gradient), n);
    }
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

  const CellKernels<IO>& kernels_;
  const CellSizes cell_;
  int64_t row_count_, slots_;
  T* products_;   // [threads, kProducts]
  bool* active_;  // [threads, kActiveBytes]: which rows of a step have a product
  Norms* norms_;  // [threads, kMostRows], of a normed cell
};

}  // namespace rnn::cpu::RNN_ISA
