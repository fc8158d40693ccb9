// What Python brings: tangents, and derivatives of gradients. It has them from kernels and torch operations, or from
// the reference, whose operations any transform, and any further derivative, takes.
#pragma once

#include <functional>

#include "ops/calls.h"

namespace rnn {

struct ByReference {
  // The tangents of y, h_n, c_n, ys and c; undefined where an output has none.
  std::function<std::vector<Tensor>(const ForwardCall&)> forward_tangents;
  // The tangents of the gradients that are wanted.
  std::function<std::vector<Tensor>(const GradientsCall&)> gradient_tangents;
  // The gradients at `positions` among those of the outputs (dy, dh_n, dc_n, dys, dc), x, h0, c0 and the weights, from
  // those of the gradients that are wanted, of which some may be undefined.
  std::function<std::vector<Tensor>(const GradientsCall&, const std::vector<Tensor>& of_gradients,
                                    const std::vector<int64_t>& positions)>
      second_order;
};

// What comes from the reference is not what batch_invariant asks for.
void refuse_invariant(bool invariant, const char* what);

// What Python has brought.
const ByReference& by_reference();
void set_by_reference(ByReference functions);

}  // namespace rnn
