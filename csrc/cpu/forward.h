// The forward loop over time: product, then the cell while the tile is hot. A chunk of steps ahead, each thread
// projects the input for its own rows and units, so that the loop finds it in the thread's own cache; all of it is
// never in memory.
#pragma once

#include <algorithm>

#include "cpu/kept.h"
#include "cpu/loop.h"

namespace rnn::cpu::RNN_ISA {

// Units that a panel holds per gate, so that a panel is about kMaxVectors wide whatever the number of gates.
constexpr int vectors_per_gate(int gates) { return gates >= kMaxVectors ? 1 : kMaxVectors / gates; }

// W is what weights are packed in.
template <class Cell, class IO, class W>
class ForwardLoop : LoopBase<IO> {
  using Base = LoopBase<IO>;
  using Base::kLanes, Base::left, Base::load_or_zero, Base::padded, Base::padded_factors;
  using typename Base::F, typename Base::T, typename Base::V;
  static constexpr int kWidth = vectors_per_gate(Cell::G);
  static constexpr int kPanel = Cell::G * kWidth * kLanes;
  static_assert(Cell::G * kWidth <= kMaxVectors, "a cell of more gates needs a wider product");
  static constexpr int64_t kBlockRows = 128;         // at most so many go through all steps together
  static constexpr int64_t kChunkBytes = 384 << 10;  // of projected input, and of input, that a thread keeps

 public:
  ForwardLoop(const Forward<IO>& p, void* workspace, int threads, const Packs& packs)
      : p_(p), packs_(packs), arena_(workspace) {
    const Sequence& q = p.seq;
    Arena kept(packs.memory);
    Arena& weights = packs.keep ? kept : arena_;
    rows_ = arena_.take<Row>(q.B);
    for (int64_t d = 0; d < q.D; ++d) {
      Direction& dir = directions_[d];
      dir.input = {{nullptr, p.I, q.H, Cell::G, kWidth}, p.w_ih[d], packs.keep, weights};
      dir.hidden = {{nullptr, q.R, q.H, Cell::G, kWidth}, p.w_hh[d], packs.keep, weights};
      for (T*& bias : dir.bias) bias = arena_.take<T>(Cell::G * padded(q.H));
      for (F*& h : dir.h) h = arena_.take<F>(q.B * padded_factors(q.R));
      if constexpr (Base::kRounds) {
        dir.exact_h[0] = dir.exact_h[1] = arena_.take<T>(q.B * padded(q.R));
      } else {
        std::copy(dir.h, dir.h + 2, dir.exact_h);
      }
      if (Cell::S > 1) dir.c = arena_.take<T>(q.B * padded(q.H));
      if (p.w_hr[d]) {
        dir.projection = {{nullptr, q.H, q.R, 1, kMaxVectors}, p.w_hr[d], packs.keep, weights};
        dir.raw = arena_.take<F>(q.B * padded_factors(q.H));
      }
    }
    packed_bytes_ = kept.used();
    if (packs.keep && !packs.filled) {
      for (const Matrix* w : {&directions_[0].input, &directions_[0].hidden, &directions_[0].projection})
        copy_size_ = most(copy_size_, w->copy_size());
      copies_ = arena_.take<IO>(threads * copy_size_);
    }
    int64_t bytes = 0;  // of however many threads there will be
    for (int n = 1; n <= threads; ++n)
      bytes = most(bytes, partition(n).used() * thread_scratch(partition(n), nullptr).bytes);
    scratch_ = arena_.take<char>(bytes);
  }

  int64_t workspace_bytes() const { return arena_.used(); }
  int64_t packed_bytes() const { return packed_bytes_; }
  bool stale() const { return __atomic_load_n(&stale_, __ATOMIC_RELAXED); }

  Partition partition(int threads) const { return Base::partition(p_.seq, directions_[0].hidden, Cell::G, threads); }

  // What has to be ready before any thread starts its loop; thread of threads does a part of it.
  void prepare(int thread, int threads) {
    const Sequence& q = p_.seq;
    for (int64_t b = thread; b < q.B; b += threads) rows_[b] = q.row(b);
    for (int64_t d = 0; d < q.D; ++d) {
      Direction& dir = directions_[d];
      for (const Matrix* w : {&dir.input, &dir.hidden, &dir.projection}) {
        for (int64_t j = thread; j < w->tiles(); j += threads) {
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
        for (int64_t i = 0; Cell::S > 1 && i < q.H; i += kLanes) {
          const V c = zero ? V(T(0)) : load(p_.c0 + q.state_at(d, b, q.H) + i, left(q.H, i));
          store(dir.c + b * padded(q.H) + i, c);
        }
      }
    }
  }

  void run(const Partition& parts, const Share& share, Barrier& barrier) {
    const ThreadScratch scratch = thread_scratch(parts, scratch_ + share.thread * thread_scratch(parts, nullptr).bytes);
    const auto [first, last] = Base::rows_of(p_.seq, rows_, p_.seq.B, parts, share);
    const int64_t n = last - first, blocks = (n + kBlockRows - 1) / kBlockRows;
    for (int64_t d = share.first_direction; d < share.last_direction; ++d) {
      for (int64_t k = 0; k < blocks; ++k)
        run_block(d, first + n * k / blocks, first + n * (k + 1) / blocks, share, scratch, barrier);
    }
  }

 private:
  using Matrix = KeptPanels<F, IO, W>;
  struct Direction {
    Matrix input;        // W_ih
    Matrix hidden;       // W_hh
    Matrix projection;   // W_hr
    T* bias[2] = {};     // [G, H] each: of gx, and of gh of split gates; else their sum is in the first
    F* h[2] = {};        // [B, R] each: state entering even and odd steps
    T* exact_h[2] = {};  // the same before it was rounded to what products take
    T* c = nullptr;      // [B, H]
    F* raw = nullptr;    // [B, H]: h before the projection
  };

  // What one thread keeps for itself.
  struct ThreadScratch {
    int64_t places;  // of a chunk: steps of rows
    RowStep* now;    // [rows]
    F* x;            // [places, I]
    bool* filled;    // [places]: which of them are steps of a row
    T* gx;           // [tiles, places, kPanel]
    T* product;      // [rows, panel]: of one tile
    int64_t bytes;
  };
  ThreadScratch thread_scratch(const Partition& parts, void* base) const {
    const Sequence& q = p_.seq;
    const int64_t rows = least(kBlockRows, q.starts ? q.B : (q.B + parts.row_parts - 1) / parts.row_parts);
    const int64_t tiles = (directions_[0].hidden.tiles() + parts.unit_parts - 1) / parts.unit_parts;
    const int64_t row = most(1, rows * most(tiles * kPanel, padded(p_.I)));
    Arena arena(base);
    ThreadScratch scratch{};
    scratch.places = rows * most(1, least(q.T, kChunkBytes / int64_t(sizeof(T)) / row));
    scratch.now = arena.take<RowStep>(rows);
    scratch.x = arena.take<F>(scratch.places * padded_factors(p_.I));
    scratch.filled = arena.take<bool>(scratch.places);
    scratch.gx = arena.take<T>(tiles * scratch.places * kPanel);
    scratch.product = arena.take<T>(rows * kMaxVectors * kLanes);
    scratch.bytes = arena.used();
    return scratch;
  }

  void prepare_bias(int64_t d) {
    const Sequence& q = p_.seq;
    for (int g = 0; g < Cell::G; ++g) {
      for (int64_t i = 0; i < q.H; i += kLanes) {
        const V input = load_or_zero(p_.b_ih[d], g * q.H + i, left(q.H, i));
        const V hidden = load_or_zero(p_.b_hh[d], g * q.H + i, left(q.H, i));
        T* bias = directions_[d].bias[0] + g * padded(q.H) + i;
        store(bias, split(g) ? input : input + hidden);
        if (split(g)) store(directions_[d].bias[1] + g * padded(q.H) + i, hidden);
      }
    }
  }
  // A split gate needs its hidden part by itself, not only added to gx.
  static constexpr bool split(int gate) { return gate >= Cell::G - Cell::A; }

  // Rows first to last through all steps of direction d.
  void run_block(int64_t d, int64_t first, int64_t last, const Share& share, const ThreadScratch& scratch,
                 Barrier& barrier) {
    const Sequence& q = p_.seq;
    const Direction& dir = directions_[d];
    const int64_t tile = scratch.places * kPanel;
    const auto active = [&](int64_t r) { return scratch.now[r].active; };
    int64_t projected = 0, at = 0;  // steps whose input is, and the place in their chunk
    for (int64_t s = 0; s < q.T; ++s) {
      const int64_t rows = present(first, last, s);
      if (rows == 0) break;  // of packed rows, none goes on
      if (s == projected) {
        projected = project_input(d, first, last, s, share, scratch);
        at = 0;
      }
      for (int64_t r = 0; r < rows; ++r) scratch.now[r] = RowStep::forward(q, d, rows_[first + r], s);
      const T* gx = scratch.gx + at * kPanel - share.begin(dir.hidden.tiles()) * tile;
      at += rows;
      const F* h = dir.h[s & 1] + first * padded_factors(q.R);
      Base::for_tiles(dir.hidden, h, padded_factors(q.R), rows, share, scratch.product, active,
                      [&](int64_t r, int64_t j, const T* gh) {
                        const State now = state(dir, first + r, s);
                        for (int u = 0; u < kWidth; ++u) {
                          const int64_t i = (j * kWidth + u) * kLanes;
                          const T* input = gx + j * tile + r * kPanel + u * kLanes;
                          if (i + kLanes <= q.H) {
                            cell<true>(dir, scratch.now[r], now, i, input, gh + u * kLanes);
                          } else if (i < q.H) {
                            cell<false>(dir, scratch.now[r], now, i, input, gh + u * kLanes);
                          }
                        }
                      });
      barrier.wait(share.size);
      if (!dir.raw) continue;
      const F* raw = dir.raw + first * padded_factors(q.H);
      Base::for_tiles(
          dir.projection, raw, padded_factors(q.H), rows, share, scratch.product, active,
          [&](int64_t r, int64_t j, const T* out) { project(scratch.now[r], state(dir, first + r, s), j, out); });
      barrier.wait(share.size);
    }
    for (int64_t b = first + share.rank; b < last; b += share.size) {
      const T* h = dir.exact_h[(q.starts ? rows_[b].length : q.T) & 1];
      for (int64_t i = 0; i < q.R; i += kLanes)
        store(p_.h_n + q.state_at(d, b, q.R) + i, load(h + b * padded(q.R) + i), left(q.R, i));
      for (int64_t i = 0; Cell::S > 1 && i < q.H; i += kLanes)
        store(p_.c_n + q.state_at(d, b, q.H) + i, load(dir.c + b * padded(q.H) + i), left(q.H, i));
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
        Base::copy_factors(p_.input(q.position(d, rows_[b], s), b), p_.I, scratch.x + m * stride);
      }
    }
    const auto filled = [&](int64_t r) { return scratch.filled[r]; };
    const int64_t begin = share.begin(dir.input.tiles()), end = share.end(dir.input.tiles());
    for (int64_t j = begin; j < end; ++j)
      multiply(dir.input, j, scratch.x, stride, m, scratch.gx + (j - begin) * scratch.places * kPanel, filled);
    return s;
  }

  // Where row b's state stands before and after a step.
  struct State {
    const T* h;
    T* h_next;
    F* rounded;
    int64_t b;
  };
  State state(const Direction& dir, int64_t b, int64_t s) const {
    const int64_t row = b * padded(p_.seq.R);
    return {dir.exact_h[s & 1] + row, dir.exact_h[(s + 1) & 1] + row, dir.h[(s + 1) & 1] + b * padded_factors(p_.seq.R),
            b};
  }
  static void keep(const State& state, int64_t i, V h, int n) {
    store(state.h_next + i, h, n);  // what pads it stays zero: products may take it
    if constexpr (Base::kRounds) store(state.rounded + i, h, n);
  }

  // One step of kLanes units of a row from unit i on; only H - i of them exist if not `all`.
  // gx, gh: [G, kWidth, lanes].
  template <bool all>
  void cell(const Direction& dir, const RowStep& now, const State& state, int64_t i, const T* gx, const T* gh) {
    const Sequence& q = p_.seq;
    const int n = all ? kLanes : int(q.H - i);
    T* c = Cell::S > 1 ? dir.c + state.b * padded(q.H) + i : nullptr;
    ForwardUnit<Cell, IO> unit;
    if (now.active) {
      for (int g = 0; g < Cell::G; ++g) {
        unit.gx[g] = load(gx + g * kWidth * kLanes) + load(dir.bias[0] + g * padded(q.H) + i);
        unit.gh[g] = load(gh + g * kWidth * kLanes);
        if (split(g)) unit.gh[g] += load(dir.bias[1] + g * padded(q.H) + i);
      }
    }
    unit.prev[0] = dir.raw ? V(T(0)) : load(state.h + i);
    if constexpr (Cell::S > 1) unit.prev[1] = load(c);

    unit.run(now);

    if (dir.raw) {
      store(dir.raw + state.b * padded_factors(q.H) + i, unit.next[0], n);
    } else {
      keep(state, i, unit.state(now, 0), n);
    }
    if constexpr (Cell::S > 1) store(c, unit.state(now, 1));
    unit.write(p_, now, i, n, dir.raw);
  }

  // The projected units of tile j of a row. out [vectors, lanes].
  void project(const RowStep& now, const State& state, int64_t j, const T* out) {
    const Sequence& q = p_.seq;
    for (int u = 0; u < kMaxVectors; ++u) {
      const int64_t i = (j * kMaxVectors + u) * kLanes;
      if (i >= q.R) break;
      const V value = now.active ? load(out + u * kLanes) : V(T(0));
      store(p_.y + now.n * q.R + i, value, left(q.R, i));
      keep(state, i, now.active ? now.handed_on(value) : load(state.h + i), left(q.R, i));
    }
  }

  const Forward<IO>& p_;
  const Packs packs_;
  bool stale_ = false;  // the packs hold other values than the weights do
  int64_t packed_bytes_, copy_size_ = 0;
  IO* copies_ = nullptr;  // [threads, copy_size_]: a tile of weights that is being packed and digested
  Arena arena_;
  Row* rows_;
  Direction directions_[kMaxDirections];
  char* scratch_;
};

}  // namespace rnn::cpu::RNN_ISA
