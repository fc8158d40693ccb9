// Sizes, memory layouts and the order of steps, for every backend. Layouts are defined here and nowhere else.
//
//   T time, B batch, D directions, H hidden units, R size of the recurrent state (H, or the projection's size),
//   G gates, S states, K saved values, A split gates: the last ones, whose hidden part has a gradient of its own,
//   P parameters of the cell, a number for each unit; E numbers that it draws for each unit and step
//
// Heads of a layer share what goes in and nothing else. Each is a direction here, with H and R of its own: first all
// those that run forwards. Weights have the rows of one head behind those of another.
//
//   gx     [T, B, D, G*H]      y      [T, B, D*R]        h0, h_n, dh0  [D, B, R]
//   saved  [T, B, D, K*H]      c      [T, B, D, C*H]     c0, c_n, dc0  [D, B, C*H]
//   dgates [T, B, D, X*H]      h_raw  [T, B, D, H]       dproj         [T, B, D, R]
//   flow   [T, B, D]          dunit  [W*B, D, P*H]
//
// C = S-1 states stand beside h, one behind the other in c.
//
// dgates holds X = G+A columns: the G gradients of gx, then the hidden gradients of the last A gates. dunit has what
// all steps of a row add to the gradients of the parameters, and of each of W windows, if there are any.
//
// Packed sequences have no padding: rows stand longest first, and of each step only those that reach it, so that [N]
// takes the place of [T, B] in all of these, and of x and reset, with N the sum of the lengths. `starts` has the place
// of each step's first row.
#pragma once

#include <cstdint>

#include "clip.h"
#include "macros.h"
#include "noise.h"
#include "storage.h"

namespace rnn {

// What a loop over time takes as one row: the steps [start, start + length) of row b of the batch.
struct Row {
  int64_t b, start, length;
};

// Where a row reads and writes at a step: place n of a [T, B, D, ...] tensor. Past the row's end it is the padding that
// the row zeroes, unless that is outside of the tensor.
struct Place {
  bool active, outside;
  int64_t n;
};

// Forward runs the rows of the batch. Backward runs every window of every row as a row of its own, so that all windows
// go through the loop at once and a step reaches into memory where the whole sequence lies.
struct Sequence {
  int64_t T, B, D, H, R;
  const int64_t* lengths;  // [B] or null: every row is T long
  const int64_t* starts;   // [T + 1] or null: nothing is packed; with lengths that descend, and none of 0
  const bool* reset;       // [T, B] or null: state is zeroed before the step at [t, b]
  int64_t window;          // 0, or the number of steps after which no gradient flows on (truncated BPTT)
  int64_t heads = 1;       // of D directions so many run forwards, and the others backwards

  // Does direction d run backwards, from each row's own end?
  RNN_HD bool turned(int64_t d) const { return d >= heads; }

  // Where a head begins in what those of its direction share, `n` numbers each.
  template <class P>
  RNN_HD P* of_head(P* const* shared, int64_t d, int64_t n) const {
    P* const all = turned(d) ? shared[1] : shared[0];
    return all ? all + (turned(d) ? d - heads : d) * n : all;
  }

  RNN_HD int64_t length(int64_t b) const {
    if (!lengths) return T;
    const int64_t n = lengths[b];
    return n < 0 ? 0 : (n > T ? T : n);  // memory stays safe whatever a device-side tensor holds
  }

  RNN_HD bool truncated() const { return window > 0 && window < T; }
  RNN_HD int64_t steps() const { return truncated() ? window : T; }
  // The number of a row among those of all windows.
  RNN_HD int64_t number(const Row& row) const { return (window > 0 ? row.start / window * B : 0) + row.b; }
  RNN_HD int64_t rows() const { return truncated() ? (T - 1) / window * B + B : B; }

  // Row r: windows in order of time, each with all rows of the batch.
  RNN_HD Row row(int64_t r) const {
    if (!truncated()) return {r, 0, length(r)};
    const int64_t b = r % B, start = r / B * window, left = length(b) - start;
    return {b, start, left < 0 ? 0 : (left > window ? window : left)};
  }

  // Does this window hold the first, or the last, of the steps that direction d takes? One window of each row does,
  // and of an empty row it is the one at 0.
  RNN_HD bool first(int64_t d, const Row& row) const { return turned(d) ? holds_end(row) : row.start == 0; }
  RNN_HD bool last(int64_t d, const Row& row) const { return turned(d) ? row.start == 0 : holds_end(row); }

  // Step s of direction d happens at this position in time.
  RNN_HD int64_t position(int64_t d, const Row& row, int64_t s) const {
    return row.start + (turned(d) ? row.length - 1 - s : s);
  }

  RNN_HD Place place(int64_t d, const Row& row, int64_t s) const {
    const bool active = s < row.length;
    if (starts && !active) return {false, true, 0};
    const int64_t t = active ? position(d, row, s) : row.start + s;
    return {active, t >= T, at(t, row.b, d, 1)};
  }
  // The place of the step before s, in the order of direction d.
  RNN_HD int64_t before(int64_t d, const Row& row, int64_t s) const {
    return at(position(d, row, s) + (turned(d) ? 1 : -1), row.b, d, 1);
  }

  // Is the state entering step s < row.length zeroed? A reset at t cuts the boundary between t-1 and t, in both
  // directions.
  RNN_HD bool cut_before(int64_t d, const Row& row, int64_t s) const {
    if (!reset) return false;
    const int64_t boundary = position(d, row, s) + turned(d);
    return (!turned(d) || boundary < length(row.b)) && reset[step(boundary, row.b)];
  }

  // The place of row b's step at position t in a [T, B] tensor.
  RNN_HD int64_t step(int64_t t, int64_t b) const { return starts ? starts[t] + b : t * B + b; }
  // Offset of unit 0 of row b, direction d at position t in a [T, B, D, width] tensor.
  RNN_HD int64_t at(int64_t t, int64_t b, int64_t d, int64_t width) const { return (step(t, b) * D + d) * width; }
  // The same in a [D, B, width] tensor.
  RNN_HD int64_t state_at(int64_t d, int64_t b, int64_t width) const { return (d * B + b) * width; }

 private:
  RNN_HD bool holds_end(const Row& row) const {
    return row.start + row.length >= length(row.b) && (row.length > 0 || row.start == 0);
  }
};

constexpr int kMaxDirections = 2;  // apart from heads

// Pointers of one forward call. IO is the storage type. Of weights each direction has those of all its heads.
template <class IO>
struct Forward {
  Sequence seq;
  Noise noise;
  int64_t I;                       // input features
  int64_t x_time, x_batch;         // strides of x; where it is packed, the latter is that of N
  const IO* x;                     // [T, B, I]
  const IO* w_ih[kMaxDirections];  // [G*H, I] each
  const IO* gx;                    // [T, B, D, G*H]: W_ih x; null where the loop projects the input
  const IO* w_hh[kMaxDirections];  // [G*H, R] each
  const IO* b_ih[kMaxDirections];  // [G*H] each, or null; added here, not in a pass over gx of its own
  const IO* b_hh[kMaxDirections];  // [G*H] each, or null
  const IO* w_hr[kMaxDirections];  // [R, H] each, or null: no projection
  const IO* unit[kMaxDirections];  // [P, H] each, or null: the parameters of the cell
  const IO* h_mask;                // [D, B, R] or null: factors of the h that W_hh is multiplied by
  const IO* h0;                    // [D, B, R]
  const IO* c0;                    // [D, B, C*H] or null
  IO* y;                           // [T, B, D*R]
  IO* h_n;                         // [D, B, R]
  IO* c_n;                         // [D, B, C*H] or null
  IO* c;                           // [T, B, D, C*H] or null: not kept
  IO* h_raw;                       // [T, B, D, H] or null: h before the projection, not kept
  IO* saved;                       // [T, B, D, K*H] or null: not kept; may be gx itself where K == G

  RNN_HD const IO* input(int64_t t, int64_t b) const {
    return x + (seq.starts ? seq.step(t, b) * x_batch : t * x_time + b * x_batch);
  }
};

// Pointers of one backward call.
template <class IO>
struct Backward {
  Sequence seq;
  Clip clip;
  Noise noise;
  const IO* dy;                    // [T, B, D*R] or null: zero
  const IO* dh_n;                  // [D, B, R] or null: zero
  const IO* dc_n;                  // [D, B, C*H] or null: zero
  const IO* dc;                    // [T, B, D, C*H] or null: zero
  const IO* w_hh[kMaxDirections];  // [G*H, R] each
  const IO* w_hr[kMaxDirections];  // [R, H] each, or null: no projection
  const IO* unit[kMaxDirections];  // [P, H] each, or null: the parameters of the cell
  const IO* h_mask;                // [D, B, R] or null: factors of the h that W_hh was multiplied by
  const IO* h0;                    // [D, B, R]
  const IO* c0;                    // [D, B, C*H] or null
  const IO* y;                     // [T, B, D*R]
  const IO* c;                     // [T, B, D, C*H] or null
  const IO* saved;                 // [T, B, D, K*H] or null
  IO* dgates;                      // [T, B, D, X*H]; may be saved itself where K == X
  IO* dproj;                       // [T, B, D, R] or null: gradient of the projected h, for dW_hr
  Arithmetic<IO>* dunit;           // [W*B, D, P*H] or null; zero before
  IO* dh0;                         // [D, B, R] or null: not asked for
  IO* dc0;                         // [D, B, C*H] or null
  Arithmetic<IO>* flow;            // [T, B, D] or null: norm of the gradient of the h of each step, not kept
};

}  // namespace rnn
