// Sizes, memory layouts and the order of steps, for every backend. Layouts are defined here and nowhere else.
//
//   T time, B batch, D directions, H hidden units, R size of the recurrent state (H, or the projection's size),
//   G gates, K saved values, A gates whose hidden gradient is kept apart
//
//   gx     [T, B, D, G*H]      y      [T, B, D*R]        h0, h_n, dh0  [D, B, R]
//   saved  [T, B, D, K*H]      c      [T, B, D, H]       c0, c_n, dc0  [D, B, H]
//   dgates [T, B, D, (G+A)*H]  h_raw  [T, B, D, H]       dproj         [T, B, D, R]
//
// dgates holds the G gradients of gx, then the hidden gradients of the last A gates.
#pragma once

#include <cstdint>

#include "macros.h"

namespace rnn {

struct Sequence {
  int64_t T, B, D, H, R;
  const int64_t* lengths;  // [B] or null: every row is T long
  const bool* reset;       // [T, B] or null: state is zeroed before the step at [t, b]

  RNN_HD int64_t length(int64_t b) const {
    if (!lengths) return T;
    const int64_t n = lengths[b];
    return n < 0 ? 0 : (n > T ? T : n);  // memory stays safe whatever a device-side tensor holds
  }

  // Step s of direction d happens at this position in time. Direction 1 starts at the row's own end.
  RNN_HD int64_t position(int64_t d, int64_t b, int64_t s) const { return d == 0 ? s : length(b) - 1 - s; }

  // Is the state entering step s zeroed? A reset at t cuts the boundary between t-1 and t, in both directions.
  RNN_HD bool cut_before(int64_t d, int64_t b, int64_t s) const {
    if (!reset) return false;
    if (d == 0) return reset[s * B + b];
    return s > 0 && reset[(length(b) - s) * B + b];
  }

  // Offset of unit 0 of row b, direction d at position t in a [T, B, D, width] tensor.
  RNN_HD int64_t at(int64_t t, int64_t b, int64_t d, int64_t width) const { return ((t * B + b) * D + d) * width; }
  // The same in a [D, B, width] tensor.
  RNN_HD int64_t state_at(int64_t d, int64_t b, int64_t width) const { return (d * B + b) * width; }
};

constexpr int kMaxDirections = 2;

// Pointers of one forward call. IO is the storage type.
template <class IO>
struct Forward {
  Sequence seq;
  const IO* gx;                    // [T, B, D, G*H]: W_ih x
  const IO* w_hh[kMaxDirections];  // [G*H, R] each
  const IO* b_ih[kMaxDirections];  // [G*H] each, or null; added here, not in a pass over gx of its own
  const IO* b_hh[kMaxDirections];  // [G*H] each, or null
  const IO* w_hr[kMaxDirections];  // [R, H] each, or null: no projection
  const IO* h0;                    // [D, B, R]
  const IO* c0;                    // [D, B, H] or null
  IO* y;                           // [T, B, D*R]
  IO* h_n;                         // [D, B, R]
  IO* c_n;                         // [D, B, H] or null
  IO* c;                           // [T, B, D, H] or null: not kept
  IO* h_raw;                       // [T, B, D, H] or null: h before the projection, not kept
  IO* saved;                       // [T, B, D, K*H] or null: not kept; may be gx itself where K == G
};

// Pointers of one backward call.
template <class IO>
struct Backward {
  Sequence seq;
  const IO* dy;                    // [T, B, D*R] or null: zero
  const IO* dh_n;                  // [D, B, R] or null: zero
  const IO* dc_n;                  // [D, B, H] or null: zero
  const IO* dc;                    // [T, B, D, H] or null: zero
  const IO* w_hh[kMaxDirections];  // [G*H, R] each
  const IO* w_hr[kMaxDirections];  // [R, H] each, or null: no projection
  const IO* h0;                    // [D, B, R]
  const IO* c0;                    // [D, B, H] or null
  const IO* y;                     // [T, B, D*R]
  const IO* c;                     // [T, B, D, H] or null
  const IO* saved;                 // [T, B, D, K*H] or null
  IO* dgates;                      // [T, B, D, (G+A)*H]
  IO* dproj;                       // [T, B, D, R] or null: gradient of the projected h, for dW_hr
  IO* dh0;                         // [D, B, R]
  IO* dc0;                         // [D, B, H] or null
};

}  // namespace rnn
