// The gradients of a call, above every backend: the loops over time backwards, then one product or sum for each input.
// All of it goes through torch's dispatcher, sizes included, so that torch.compile traces it as it stands.
#pragma once

#include "ops/calls.h"
#include "ops/tables.h"
#include "ops/weights.h"

namespace rnn {

// What a gradient may be asked for, in the order of the autograd node's edges; the weights follow.
enum Input : size_t { kX, kH0, kC0, kFirstWeight };

// What forward was given and has kept. c0 is undefined where the cell has none.
struct Kept {
  std::vector<Tensor> inputs;  // x, h0, c0 and the weights
  std::vector<Tensor> masks;
  OptionalTensor h_mask;
  Steps steps;
  Tensor y, ys, c, h_raw, saved;

  TensorList weights() const { return TensorList(inputs).slice(kFirstWeight); }
  OptionalTensor c0() const { return inputs[kC0].defined() ? OptionalTensor(inputs[kC0]) : std::nullopt; }
};

// What a call of an op was given; what forward has kept is still to be filled in.
template <class Call>
Kept given_to(const Call& call) {
  Kept kept;
  kept.inputs.reserve(kFirstWeight + call.weights.size());
  kept.inputs = {call.x, call.h0, call.c0.value_or(Tensor())};
  kept.inputs.insert(kept.inputs.end(), call.weights.begin(), call.weights.end());
  kept.masks = list_of(call.masks).vec();
  kept.h_mask = call.h_mask;
  kept.steps = call;
  return kept;
}

struct Gradients {
  std::vector<Tensor> inputs;  // undefined where not wanted
  Tensor flow;                 // [L, T, B, D] if recorded
};

// How a backward is done: `plain`: no subclass of a tensor takes part, and nothing traces; `overwrite`: the gradients
// of the gates may take the memory of kept.saved, whose values are lost; `lanes`: as in GradientsCall.
struct How {
  Library library;
  bool invariant, record, plain, overwrite;
  int64_t lanes = 0;
};

// Where `sums` are given, in the places of result.inputs, gradients of weights are added to those that are defined
// there and have the type of the weight; `how` is plain then.
Gradients gradients(const Settings& settings, const Kept& kept, const OutputGradients& out,
                    const std::vector<bool>& wanted, const How& how, std::vector<Tensor> sums = {});

// The same as one op, which transforms have a rule for, and which is a differentiable function of all inputs and of
// `out`.
Gradients gradients_as_op(const Settings& settings, const Kept& kept, const OutputGradients& out,
                          const std::vector<bool>& wanted, Library library, bool invariant, bool record);

}  // namespace rnn
