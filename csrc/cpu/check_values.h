// What only a look into the tensors of a call can tell.
#pragma once

#include "ops/check.h"
#include "ops/pointers.h"

namespace rnn::cpu {

// A compiled graph reaches no check but this one.
inline void check_values(const Steps& steps, const Sizes& n) {
  if (!steps.lengths) return;
  const int64_t* lengths = pointer<const int64_t>(steps.lengths);
  for (int64_t b = 0; b < n.B; ++b) {
    TORCH_CHECK_VALUE(lengths[b] >= 0 && lengths[b] <= n.T, "lengths: expected values from 0 to ", n.T,
                      ", the length of the input, got ", lengths[b]);
  }
  if (!n.packed) return;
  const int64_t* starts = pointer<const int64_t>(steps.starts);
  TORCH_CHECK_VALUE(starts[0] == 0 && starts[n.T] == n.N, "starts: expected the first place to be 0 and the end ", n.N,
                    ", the packed steps of the input, got ", starts[0], " and ", starts[n.T]);
  for (int64_t t = 0, rows = n.B; t < n.T; ++t) {
    while (rows > 0 && lengths[rows - 1] <= t) --rows;
    TORCH_CHECK_VALUE((t > 0 || rows == n.B) && starts[t + 1] - starts[t] == rows, "starts: expected ", rows,
                      " places at step ", t, ", as many as rows that reach it, with lengths above 0 that descend, got ",
                      starts[t + 1] - starts[t]);
  }
  for (int64_t b = 1; b < n.B; ++b)
    TORCH_CHECK_VALUE(lengths[b] <= lengths[b - 1],
                      "lengths: expected the longest row first where steps are packed, "
                      "got ",
                      lengths[b], " behind ", lengths[b - 1]);
}

}  // namespace rnn::cpu
