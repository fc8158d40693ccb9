// Some rows of a tensor side by side, and the way back, with gradients: between padded steps and packed ones, and
// between states in one order and in another. An operation of torch for each takes longer than a small layer; a plain
// copy is all that there is to do.
#pragma once

#include "ops/fields.h"

namespace rnn {

// Where rows stand in [A, B, W]: row (a, b) at B*a + b, no two alike, [N] int64 on the CPU.
struct Places {
  Tensor at;
  int64_t A = 0, B = 0;
};

// Rows of a tensor [A, B, W] on the CPU as [.., W], N of them in the order of their places; `shape` has what stands
// in front of the W.
Tensor pick_rows(const Tensor& all, const Places& places, at::IntArrayRef shape);

// The way back: rows [.., W] at their places in [A, B, W], and zeros elsewhere.
Tensor place_rows(const Tensor& rows, const Places& places);

}  // namespace rnn
