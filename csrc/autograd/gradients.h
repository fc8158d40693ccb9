// The gradients of a layer, above every backend: the loop over time backwards, then one product or sum for each input.
// All of it goes through torch's dispatcher, sizes included, so that torch.compile traces it as it stands.
#pragma once

#include <array>

#include "common/ops.h"

namespace rnn {

enum Weight { kWIh, kWHh, kBIh, kBHh, kWHr, kWeights };

// What a gradient may be asked for, in the order of the autograd node's edges: x, h0, c0, then the weights of each
// kind, one per direction. Shapes as in layout.h; c0 is undefined where the cell has none, a kind of weights may be
// missing.
struct Inputs {
  enum : size_t { kX, kH0, kC0, kFirst };

  Inputs() = default;
  Inputs(const Tensor& x, const Tensor& h0, const OptionalTensor& c0, const std::array<TensorList, kWeights>& weights);

  const Tensor& x() const { return all[kX]; }
  const Tensor& h0() const { return all[kH0]; }
  OptionalTensor c0() const { return all[kC0].defined() ? OptionalTensor(all[kC0]) : std::nullopt; }
  size_t index(Weight kind, size_t direction) const { return first[kind] + direction; }
  TensorList weights(Weight kind) const { return TensorList(all).slice(first[kind], first[kind + 1] - first[kind]); }

  std::vector<Tensor> all;
  std::array<size_t, kWeights + 1> first{};
};

// What is neither differentiated nor a result of forward.
struct Settings {
  Library library;
  std::string cell;
  int64_t window;
  std::string clip;
  double bound;
  bool invariant;  // of the batch: see batch_invariant()
};

// Outputs of forward that backward reads.
struct Kept {
  Tensor y, c, h_raw, saved;
};

// Gradients of y, h_n, c_n and c; undefined where nothing depends on one.
using OutputGradients = std::array<Tensor, 4>;

struct Gradients {
  std::vector<Tensor> all;  // in the order of Inputs; undefined where not wanted
  Tensor flow;              // [T, B, D] if asked for
};

// `plain`: no subclass of a tensor is among these, and nothing traces. `overwrite` allows the gradients of the gates to
// take the memory of kept.saved, whose values are lost.
Gradients gradients(const Settings& settings, const Inputs& in, const Steps& steps, const OutputGradients& out,
                    const Kept& kept, const std::vector<bool>& wanted, bool flow, bool plain, bool overwrite);

// What of these follows the loop over time: from the gradients of the gates, and of the projected h where there is a
// projection, the gradients of all inputs but the initial states.
std::vector<Tensor> products(const Settings& settings, const Inputs& in, const Steps& steps, const Kept& kept,
                             const Tensor& dgates, const Tensor& dproj, const std::vector<bool>& wanted, bool plain);

// The same as gradients(), as differentiable functions of all inputs and of `out`, from the reference in Python.
Gradients differentiable_gradients(const Settings& settings, const Inputs& in, const Steps& steps,
                                   const OutputGradients& out, const std::vector<bool>& wanted, bool flow);

// Whether the gradients of the gates fit the memory of what forward saved.
bool can_overwrite(const std::string& cell);

}  // namespace rnn
