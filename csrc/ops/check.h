// Checks of every tensor that an op is given.
#pragma once

#include "common/layout.h"
#include "ops/calls.h"
#include "ops/tables.h"
#include "ops/weights.h"

namespace rnn {

struct Sizes {
  int64_t T, B, I, L, D, H, R;
  int64_t N;    // of all steps that have a place in memory: T*B, or the sum of the lengths
  bool packed;  // [N] takes the place of [T, B]
  Merge merge;
  int64_t heads;  // of a direction; D counts each of all directions

  at::DimVector shape(std::initializer_list<int64_t> after) const {
    at::DimVector sizes = packed ? at::DimVector{N} : at::DimVector{T, B};
    sizes.append(after.begin(), after.end());
    return sizes;
  }
  at::DimVector shape_of(int64_t layers, std::initializer_list<int64_t> after) const {
    at::DimVector sizes{layers};
    sizes.append(shape(after));
    return sizes;
  }

  // Whether y is another tensor than what the last layer gives.
  bool merged() const { return D > heads && merge != Merge::kConcat; }
  int64_t width() const { return merged() ? heads * R : D * R; }
  // Layers whose own y is kept beside y.
  int64_t inner() const { return merged() ? L : L - 1; }
  // Of so many steps each; one at least: where there are no steps, the rows are there all the same.
  int64_t windows(int64_t window) const { return window > 0 && T > 0 ? (T - 1) / window + 1 : 1; }
};

// Check every tensor and make all but x and the weights contiguous; raise naming what is wrong.
Sizes check(ForwardCall& call);
Sizes check(BackwardCall& call);
void check_input_gradient(const Tensor& dgates, TensorList w_ih);

// Whether results of a row may not depend on the batch that it is in: a setting of the process, like those of torch's
// global context.
bool batch_invariant();
void set_batch_invariant(bool on);

}  // namespace rnn
