// The autograd node of a layer, registered for sequence_forward.
#pragma once

#include <functional>

#include "common/ops.h"

namespace rnn {

// Takes |dL/dh_t| [T, B, D] when a backward has run.
using FlowSink = std::function<void(const Tensor&)>;

// Hands a sink to the next call of this thread that makes a node: no schema has a type for it. An empty one takes it
// back.
void set_flow_sink(FlowSink sink);

struct State {
  Tensor h;
  OptionalTensor c;
};

// One step of a cell with its gradients: x [B, I], h0 and what it returns [B, H]; biases may be empty lists.
State cell_step(c10::string_view cell, const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, TensorList b_ih,
                TensorList b_hh, const Tensor& h0, const OptionalTensor& c0);

}  // namespace rnn
