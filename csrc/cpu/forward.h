// The forward loop over time: product, then the cell while the tile is hot. A chunk of steps ahead, each thread
// projects the input for its own rows and units, so that the loop finds it in the thread's own cache; all of it is
// never in memory. The cell itself is in forward_cells.h and called by pointer: the loop is compiled once for all.
#pragma once

#include <algorithm>
#include <memory>

#include "common/cell_list.h"
#include "cpu/kept.h"
#include "cpu/kernels.h"
#include "cpu/loop.h"
#include "cpu/row_statistic.h"

namespace rnn::cpu::RNN_ISA {

// Units that a panel holds per gate, so that a panel is about kMaxVectors wide whatever the number of gates.
constexpr int vectors_per_gate(int gates) { return gates >= kMaxVectors ? 1 : kMaxVectors / gates; }

template <class IO>
class ForwardLoop final : public LoopBase<IO> {
  using Base = LoopBase<IO>;
  using Base::arena_, Base::kLanes, Base::left, Base::load_or_zero, Base::padded, Base::padded_factors;
  using typename Base::F, typename Base::T, typename Base::V;

  static constexpr int64_t kBlockRows = 128;         // at most so many go through all steps together
  static constexpr int64_t kChunkBytes = 384 << 10;  // of projected input, and of input, that a thread keeps

 public:
  ForwardLoop(const Forward<IO>& p, void* workspace, int threads, const CellKernels<IO>& kernels, const Packs& packs)
      : Base(workspace),
        p_(p),
        kernels_(kernels),
        cell_(kernels.sizes),
        packs_(packs),
        directions_(new Direction[p.seq.D]) {
    const Sequence& q = p.seq;
    const int G = cell_.G, width = vectors_per_gate(G);
    Arena kept(packs.memory);
    Arena& weights = packs.keep ? kept : arena_;
    rows_ = arena_.template take<Row>(q.B);
    for (int64_t d = 0; d < q.D; ++d) {
      Direction& dir = directions_[d];
      dir.d = d;
      dir.unit = q.of_head(p.unit, d, cell_.P * q.H);
      if (p.h_mask) dir.h_mask = p.h_mask + q.state_at(d, 0, q.R);
      dir.input = {{p.I, q.H, G, width}, q.of_head(p.w_ih, d, G * q.H * p.I), packs, weights};
      // Without a W_hh the product is one over nothing.
      const int64_t R = cell_.recurrent ? q.R : 0;
      dir.hidden = {{R, q.H, G, width}, q.of_head(p.w_hh, d, G * q.H * R), packs, weights};
      for (T*& bias : dir.bias) bias = arena_.template take<T>(G * padded(q.H));
      for (F*& h : dir.h) h = arena_.template take<F>(q.B * padded_factors(q.R));
      if (Base::kRounds || dir.h_mask) {
        dir.exact_h[0] = dir.exact_h[1] = arena_.template take<T>(q.B * padded(q.R));
      } else if constexpr (!Base::kRounds) {
        std::copy(dir.h, dir.h + 2, dir.exact_h);
      }
      if (cell_.C() > 0) dir.c = arena_.template take<T>(q.B * cell_.C() * padded(q.H));
      const int64_t tiles = dir.hidden.tiles(), each = dir.hidden.tile_units();
      for (int k = 0; k < cell_.groups(); ++k)
        dir.hidden_moments[k] = take_row_moments(arena_, q.B, tiles, cell_.gates(k) * each, cell_.gates(k) * q.H);
      if (cell_.emits) dir.state_moments = take_row_moments(arena_, q.B, tiles, each, q.H);
      if (const IO* w_hr = q.of_head(p.w_hr, d, 0)) {
        dir.projection = {{q.H, q.R, 1, kMaxVectors}, w_hr, packs, weights};
        dir.raw = arena_.template take<F>(q.B * padded_factors(q.H));
      }
    }
    packed_bytes_ = kept.used();
    if (packs.keep && !packs.filled) {
      for (const Matrix* w : {&directions_[0].input, &directions_[0].hidden, &directions_[0].projection})
        copy_size_ = most(copy_size_, w->copy_size());
      copies_ = arena_.template take<IO>(threads * copy_size_);
    }
    int64_t bytes = 0;  // of however many threads there will be
    for (int n = 1; n <= threads; ++n)
      bytes = most(bytes, partition(n).used() * thread_scratch(partition(n), nullptr).bytes);
    scratch_ = arena_.template take<char>(bytes);
  }

  int64_t packed_bytes() const { return packed_bytes_; }
  bool stale() const override { return __atomic_load_n(&stale_, __ATOMIC_RELAXED); }

  Partition partition(int threads) const override {
    return Base::share_out(p_.seq, directions_[0].hidden, cell_.G, threads);
  }

  void prepare(int thread, int threads) override {
    const Sequence& q = p_.seq;
    for (int64_t b = thread; b < q.B; b += threads) rows_[b] = q.row(b);
    for (int64_t d = 0; d < q.D; ++d) {
      Direction& dir = directions_[d];
      for (const Matrix* w : {&dir.input, &dir.hidden, &dir.projection}) {
        for (int64_t j = thread; !packs_.trusted && w->K > 0 && j < w->tiles(); j += threads) {
          if (!w->prepare(j, packs_, copies_ + thread * copy_size_)) __atomic_store_n(&stale_, true, __ATOMIC_RELAXED);
        }
      }
      if (thread == 0) prepare_bias(d);
      for (int64_t b = thread; b < q.B; b += threads) {
        const bool zero = rows_[b].length > 0 && q.cut_before(d, rows_[b], 0);
        for (int64_t i = 0; i < q.R; i += kLanes) {
          const V h = zero ? V(T(0)) : load(p_.h0 + q.state_at(d, b, q.R) + i, left(q.R, i));
          keep(state(dir, b, -1), i, h, left(q.R, i));
        }
        for (F* h : dir.h) Base::clear_padding(h + b * padded_factors(q.R), q.R);
        if (dir.raw) Base::clear_padding(dir.raw + b * padded_factors(q.H), q.H);
        for_others(d, b, [&](int64_t at, T* c, int n) { store(c, zero ? V(T(0)) : load(p_.c0 + at, n)); });
      }
    }
  }

  void run(const Partition& parts, const Share& share, Barrier& barrier) override {
    const ThreadScratch scratch = thread_scratch(parts, scratch_ + share.thread * thread_scratch(parts, nullptr).bytes);
    const auto [first, last] = Base::rows_of(p_.seq, rows_, p_.seq.B, parts, share);
    const int64_t n = last - first, blocks = (n + kBlockRows - 1) / kBlockRows;
    for (int64_t d = share.first_direction; d < share.last_direction; ++d) {
      for (int64_t k = 0; k < blocks; ++k) {
        const int64_t from = first + n * k / blocks, to = first + n * (k + 1) / blocks;
        if (cell_.normed) {
          run_normed_block(d, from, to, share, scratch, barrier);
        } else {
          run_block(d, from, to, share, scratch, barrier);
        }
        write_last(d, from, to, share);
      }
    }
  }

  // What a cell is handed and may ask for.
  using Matrix = KeptPanels<F, IO>;
  struct Direction {
    Matrix input;                // W_ih
    Matrix hidden;               // W_hh
    Matrix projection;           // W_hr
    T* bias[2] = {};             // [G, H] each: of gx, and of gh of split gates; else their sum is in the first
    F* h[2] = {};                // [B, R] each: state entering even and odd steps, as the product takes it
    T* exact_h[2] = {};          // the same before it was masked, and rounded to what products take
    T* c = nullptr;              // [B, C, H]
    F* raw = nullptr;            // [B, H]: h before the projection
    const IO* unit = nullptr;    // [P, H]: parameters of the cell
    const IO* h_mask = nullptr;  // [B, R]
    int64_t d = 0;               // its number
    RowMoments hidden_moments[2] = {}, state_moments = {};  // of a normed cell: of W_hh h, and of what it emits
  };

  // By what W_hh h of each group of gates, and the state, of a row are standardised.
  struct Norms {
    Standard hidden[2], state;
  };

  // Of a direction, at step s: rows from `first` on, and what each does.
  struct Step {
    int64_t s, first, rows;
    const RowStep* now;
    const Norms* norms = nullptr;  // of each row, of a normed cell
  };

  // Where row b's state stands before and after a step.
  struct State {
    const T* h;
    T* h_next;
    F* factors;      // of the next product
    const IO* mask;  // of these, or null
    int64_t b;
  };
  State state(const Direction& dir, int64_t b, int64_t s) const {
    const int64_t row = b * padded(p_.seq.R);
    return {dir.exact_h[s & 1] + row, dir.exact_h[(s + 1) & 1] + row, dir.h[(s + 1) & 1] + b * padded_factors(p_.seq.R),
            dir.h_mask ? dir.h_mask + b * p_.seq.R : nullptr, b};
  }
  static void keep(const State& state, int64_t i, V h, int n) {
    store(state.h_next + i, h, n);  // what pads it stays zero: products may take it
    if (state.mask) {
      store(state.factors + i, h * load(state.mask + i, n), n);
    } else if constexpr (Base::kRounds) {
      store(state.factors + i, h, n);
    }
  }

  // A split gate needs its hidden part by itself, not only added to gx.
  static bool split(const CellSizes& cell, int gate) { return gate >= cell.G - cell.A; }

  const Forward<IO>& p_;

 private:
  // The cells of tile j at a step. gx and gh [rows, gates, vectors, lanes]: both parts of the gates, without biases.
  void cells(const Direction& dir, const Step& step, int64_t j, const T* gx, const T* gh) const {
    kernels_.forward(this, &dir, &step, j, gx, gh);
  }

  // What one thread keeps for itself.
  struct ThreadScratch {
    int64_t places;  // of a chunk: steps of rows
    RowStep* now;    // [rows]
    bool* active;    // [rows]: which of them are there at this step
    F* x;            // [places, I]
    bool* filled;    // [places]: which of them are steps of a row
    T* gx;           // [tiles, places, panel]
    T* product;      // [rows, panel]: of one tile
    Norms* norms;    // [rows], of a normed cell, whose W_hh h is in gx
    int64_t bytes;
  };
  ThreadScratch thread_scratch(const Partition& parts, void* base) const {
    const Sequence& q = p_.seq;
    const int64_t rows = least(kBlockRows, q.starts ? q.B : (q.B + parts.row_parts - 1) / parts.row_parts);
    const int64_t tiles = (directions_[0].hidden.tiles() + parts.unit_parts - 1) / parts.unit_parts;
    const int64_t row = most(1, rows * most(tiles * panel(), padded(p_.I)));
    Arena arena(base);
    ThreadScratch scratch{};
    scratch.places = rows * (cell_.normed ? 1 : most(1, least(q.T, kChunkBytes / int64_t(sizeof(T)) / row)));
    scratch.now = arena.take<RowStep>(rows);
    scratch.active = arena.take<bool>(rows);
    scratch.x = arena.take<F>(scratch.places * padded_factors(p_.I));
    scratch.filled = arena.take<bool>(scratch.places);
    scratch.gx = arena.take<T>(tiles * scratch.places * panel());
    scratch.product = arena.take<T>(Base::products_of(rows, most(panel(), kMaxVectors * kLanes)));
    scratch.norms = arena.take<Norms>(cell_.normed ? rows : 0);
    scratch.bytes = arena.used();
    return scratch;
  }

  int64_t panel() const { return directions_[0].hidden.width(); }

  void prepare_bias(int64_t d) {
    const Sequence& q = p_.seq;
    const IO* const b_ih = q.of_head(p_.b_ih, d, cell_.G * q.H);
    const IO* const b_hh = q.of_head(p_.b_hh, d, cell_.G * q.H);
    for (int g = 0; g < cell_.G; ++g) {
      for (int64_t i = 0; i < q.H; i += kLanes) {
        const V input = load_or_zero(b_ih, g * q.H + i, left(q.H, i));
        const V hidden = load_or_zero(b_hh, g * q.H + i, left(q.H, i));
        T* bias = directions_[d].bias[0] + g * padded(q.H) + i;
        store(bias, split(cell_, g) ? input : input + hidden);
        if (split(cell_, g)) store(directions_[d].bias[1] + g * padded(q.H) + i, hidden);
      }
    }
  }

  // Rows first to last through all steps of direction d.
  void run_block(int64_t d, int64_t first, int64_t last, const Share& share, const ThreadScratch& scratch,
                 Barrier& barrier) {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    const int64_t tile = scratch.places * panel();
    int64_t projected = 0, at = 0;  // steps whose input is, and the place in their chunk
    for (int64_t s = 0; s < q.T; ++s) {
      const int64_t rows = present(first, last, s);
      if (rows == 0) break;  // of packed rows, none goes on
      if (s == projected) {
        projected = project_input(d, first, last, s, share, scratch);
        at = 0;
      }
      const Step step = step_of(d, first, rows, s, scratch);
      const T* gx = scratch.gx + at * panel() - share.begin(dir.hidden.tiles()) * tile;
      at += rows;
      const F* h = dir.h[s & 1] + first * padded_factors(q.R);
      Base::for_tiles(dir.hidden, h, padded_factors(q.R), rows, share, s, scratch.product, scratch.active,
                      [&](int64_t j, const T* gh) { cells(dir, step, j, gx + j * tile, gh); });
      barrier.wait(share.size);
      if (dir.raw) project(dir, step, share, scratch, barrier);
    }
  }

  // The same of a cell whose products are normalised: normed_forward.h.
  void run_normed_block(int64_t d, int64_t first, int64_t last, const Share& share, const ThreadScratch& scratch,
                        Barrier& barrier);

  // What the rows do at step s; the scratch has what they did at the step before.
  Step step_of(int64_t d, int64_t first, int64_t rows, int64_t s, const ThreadScratch& scratch) const {
    const Sequence& q = p_.seq;
    const bool side_by_side = s > 0 && !q.lengths && !q.reset;  // all rows do the same at all steps
    for (int64_t r = 0; side_by_side && r < rows; ++r) scratch.now[r].go_on(q, d);
    for (int64_t r = 0; !side_by_side && r < rows; ++r) {
      scratch.now[r] = RowStep::forward(p_.seq, d, rows_[first + r], s);
      scratch.active[r] = scratch.now[r].active;
    }
    return {s, first, rows, scratch.now, scratch.norms};
  }

  // The states that rows first to last leave behind.
  void write_last(int64_t d, int64_t first, int64_t last, const Share& share) {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    for (int64_t b = first + share.rank; b < last; b += share.size) {
      const T* h = dir.exact_h[(q.starts ? rows_[b].length : q.T) & 1];
      for (int64_t i = 0; i < q.R; i += kLanes)
        store(p_.h_n + q.state_at(d, b, q.R) + i, load(h + b * padded(q.R) + i), left(q.R, i));
      for_others(d, b, [&](int64_t at, const T* c, int n) { store(p_.c_n + at, load(c), n); });
    }
  }

  // Calls then(place in [D, B, C*H], in dir.c, count) for each vector of the states beside h of row b.
  template <class Then>
  void for_others(int64_t d, int64_t b, Then&& then) const {
    const int64_t H = p_.seq.H, C = cell_.C();
    for (int64_t k = 0; k < C; ++k) {
      for (int64_t i = 0; i < H; i += kLanes)
        then(p_.seq.state_at(d, b, C * H) + k * H + i, directions_[d].c + (b * C + k) * padded(H) + i, left(H, i));
    }
  }

  // How many of the rows first to last take part in step s: all of them, some perhaps in their padding; of packed rows
  // those that reach it.
  int64_t present(int64_t first, int64_t last, int64_t s) const {
    const int64_t* starts = p_.seq.starts;
    return starts ? most(0, least(last, starts[s + 1] - starts[s]) - first) : last - first;
  }

  // W_ih x of as many steps from s on as a chunk has places for, of rows first to last and this share's units. Returns
  // the step after the last.
  int64_t project_input(int64_t d, int64_t first, int64_t last, int64_t s, const Share& share,
                        const ThreadScratch& scratch) const {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    const int64_t stride = padded_factors(p_.I);
    int64_t m = 0;
    for (; s < q.T; ++s) {
      const int64_t end = first + present(first, last, s);
      if (m + end - first > scratch.places) break;
      for (int64_t b = first; b < end; ++b, ++m) {
        scratch.filled[m] = s < rows_[b].length;
        if (!scratch.filled[m]) continue;
        const IO* x = p_.I > 0 ? p_.input(q.position(d, rows_[b], s), b) : nullptr;
        Base::copy_factors(x, p_.I, scratch.x + m * stride);
      }
    }
    const bool* const filled = Base::unless_all(scratch.filled, m);
    const int64_t begin = share.begin(dir.input.tiles()), end = share.end(dir.input.tiles());
    for (int64_t j = begin; j < end; ++j)
      multiply(dir.input, j, least(j + 1, end - 1), scratch.x, stride, m,
               scratch.gx + (j - begin) * scratch.places * panel(), filled);
    return s;
  }

  // The projected h of a step.
  void project(const Direction& dir, const Step& step, const Share& share, const ThreadScratch& scratch,
               Barrier& barrier) const {
    const int64_t stride = padded_factors(p_.seq.H);
    Base::for_tiles(dir.projection, dir.raw + step.first * stride, stride, step.rows, share, step.s, scratch.product,
                    scratch.active, [&](int64_t j, const T* out) { project(dir, step, j, out); });
    barrier.wait(share.size);
  }

  // The projected units of tile j at a step. out [rows, vectors, lanes].
  void project(const Direction& dir, const Step& step, int64_t j, const T* out) const {
    const Sequence& q = p_.seq;
    for (int64_t r = 0; r < step.rows; ++r) {
      const RowStep& now = step.now[r];
      const State state = this->state(dir, step.first + r, step.s);
      for (int u = 0; u < kMaxVectors; ++u, out += kLanes) {
        const int64_t i = (j * kMaxVectors + u) * kLanes;
        if (i >= q.R) continue;
        V value = now.active ? load(out) : V(T(0));
        if (kernels_.carries_tangents && now.active)
          value += load_or_zero(static_cast<const ForwardTangents<IO>&>(p_).of_h, now.n * q.R + i, left(q.R, i));
        store(p_.y + now.n * q.R + i, value, left(q.R, i));
        keep(state, i, now.active ? now.handed_on(value) : load(state.h + i), left(q.R, i));
      }
    }
  }

  const CellKernels<IO>& kernels_;
  const CellSizes cell_;
  const Packs packs_;
  bool stale_ = false;  // the packs hold other values than the weights do
  int64_t packed_bytes_, copy_size_ = 0;
  IO* copies_ = nullptr;  // [threads, copy_size_]: a tile of weights that is being packed and digested
  Row* rows_;
  const std::unique_ptr<Direction[]> directions_;  // [D]
  char* scratch_;
};

}  // namespace rnn::cpu::RNN_ISA
