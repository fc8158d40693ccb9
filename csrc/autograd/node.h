// The autograd node of a call, registered for sequence_forward; and one step of a cell with it.
#pragma once

#include "ops/calls.h"

namespace rnn {

struct State {
  Tensor h;
  OptionalTensor c;
};

// One step of a cell with its gradients: x [B, I], h0 and what it returns [B, H]; weights as w_ih, w_hh, b_ih, b_hh.
State cell_step(c10::string_view cell, const Tensor& x, TensorList weights, const Tensor& h0, const OptionalTensor& c0);

}  // namespace rnn
