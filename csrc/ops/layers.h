// From a call of many layers to what a backend runs: one layer after the other, or several at once where it can. Here
// outputs are allocated, and what leads from a layer to the next one happens: directions are merged, masks multiplied.
#pragma once

#include <c10/util/SmallVector.h>

#include "ops/check.h"

namespace rnn {

// New memory. Large blocks on the CPU come from the kernel page by page, which costs more than what is computed on some
// of them: huge pages are asked for.
Tensor fresh(at::IntArrayRef shape, const at::TensorOptions& options);

// Contiguous, one per direction; empty where there is none. `unit` has the parameters of the cell side by side, [P, H],
// for each head.
struct LayerWeights {
  using List = c10::SmallVector<Tensor, 2>;
  List w_ih, w_hh, b_ih, b_hh, w_hr, unit;
};

// What a backend is asked to do for one layer; shapes as in layout.h. It writes the outputs, of which those that are
// not kept are empty.
struct ForwardLayer {
  const ForwardCall& call;
  const CellInfo& cell;
  Sizes n;  // whose I is that of this layer
  int64_t index;
  Tensor x;  // features next to each other
  LayerWeights w;
  OptionalTensor h_mask;
  Tensor h0;
  OptionalTensor c0;
  Tensor y, h_n, c_n, c, h_raw, saved;
};

struct BackwardLayer {
  const BackwardCall& call;
  const CellInfo& cell;
  Sizes n;  // whose I is not known
  int64_t index;
  Clip clip;
  OptionalTensor dy, dh_n, dc_n, dc;
  LayerWeights w;  // w_hh, w_hr and unit alone
  OptionalTensor h_mask;
  Tensor h0;
  OptionalTensor c0;
  Tensor y, c, saved;
  Tensor dgates, dh0, dc0, dproj, flow, dunit;  // outputs; dgates may be saved itself
};

// W_ih x of all steps [T, B, D, G*H], for backends whose loop does not project the input. saved takes its memory where
// their sizes agree.
Tensor project_input(const ForwardLayer& layer);

// Both directions of a layer [.., 2*R] as one output [.., R].
Tensor merge(const Tensor& y, Merge mode);

// Of each packed step the row that it is one of [N].
Tensor rows_of_steps(const Tensor& starts, const c10::SymInt& N);
// A mask as factors of all steps [T, B, ...] or, packed, [N, ...], of which it may leave out those that it repeats.
Tensor of_steps(const Tensor& mask, const Steps& steps, const c10::SymInt& N);

// A call that has been checked.
template <class Call>
class Run {
 public:
  const Call& call() const { return call_; }
  const CellInfo& cell() const { return cell_; }
  const Sizes& sizes() const { return n_; }
  bool projected() const { return weights_.has(kWHr); }
  Tensor mask(int64_t index) const { return of_steps((*call_.masks)[index], call_, n_.N); }

 protected:
  explicit Run(Call& call) : call_(call), cell_(find_cell(call.cell)), n_(check(call)), weights_(call.weights, call) {}

  // New memory for what all layers have at all steps [layers, T, B, ...], or [L*D, B, width] as states; an empty tensor
  // where it is not kept.
  Tensor steps(bool kept, int64_t layers, std::initializer_list<int64_t> after,
               const at::TensorOptions& options) const {
    return kept ? fresh(n_.shape_of(layers, after), options) : fresh({0}, options);
  }
  Tensor states(bool kept, int64_t width, const at::TensorOptions& options) const {
    return kept ? fresh({n_.L * n_.D, n_.B, width}, options) : fresh({0}, options);
  }

  Call& call_;
  const CellInfo& cell_;
  const Sizes n_;
  const Weights weights_;
};

class ForwardRun : public Run<ForwardCall> {
 public:
  explicit ForwardRun(ForwardCall& call);

  ForwardLayer layer(int64_t index, const Tensor& x);
  // The x of the layer above this one.
  Tensor above(const ForwardLayer& layer) const;

  // Runs the layers one after the other by run(ForwardLayer&).
  template <class F>
  void each(F&& run) {
    Tensor x = call_.x;
    for (int64_t l = 0; l < n_.L; ++l) {
      ForwardLayer current = layer(l, x);
      run(current);
      if (l + 1 < n_.L) x = above(current);
    }
  }

  ForwardOutputs outputs() &&;

 private:
  ForwardOutputs out_;
  Tensor last_;  // of the last layer, where its directions are to be merged
};

class BackwardRun : public Run<BackwardCall> {
 public:
  explicit BackwardRun(BackwardCall& call);

  BackwardLayer layer(int64_t index, OptionalTensor dy);
  // The gradient of the y of a layer: what comes from outside, and through the layer above once its dgates are there.
  OptionalTensor from_outside(int64_t index) const;
  OptionalTensor whole(int64_t index, const Tensor& dgates_above) const;
  const Tensor& w_ih(int64_t index) const { return weights_.get(kWIh, index, 0); }

  // Runs the layers from the last to the first by run(BackwardLayer&).
  template <class F>
  void each(F&& run) {
    OptionalTensor dy = from_outside(n_.L - 1);
    for (int64_t l = n_.L; l-- > 0;) {
      BackwardLayer current = layer(l, std::move(dy));
      run(current);
      current.dy.reset();  // its memory may serve the next
      if (l > 0) dy = whole(l - 1, current.dgates);
    }
  }

  BackwardOutputs outputs() && { return std::move(out_); }

 private:
  Tensor y_of(int64_t index) const;
  // Of the y of a layer from that of its merged directions.
  Tensor unmerged(const Tensor& gradient, int64_t index) const;

  const Clip clip_;
  BackwardOutputs out_;
};

// Registers a backend's forward(ForwardRun&) and backward(BackwardRun&) in its TORCH_LIBRARY_IMPL block.
template <void (*run)(ForwardRun&)>
ForwardOutputs run_forward(ForwardCall& call) {
  const at::AutoDispatchBelowADInplaceOrView below;  // what autograd is to know, its node has told it
  ForwardRun all(call);
  run(all);
  return std::move(all).outputs();
}
template <void (*run)(BackwardRun&), bool kOverSaved>
BackwardOutputs run_backward(BackwardCall& call) {
  const at::AutoDispatchBelowADInplaceOrView below;
  call.over_saved = kOverSaved;
  BackwardRun all(call);
  run(all);
  return std::move(all).outputs();
}
template <void (*forward)(ForwardRun&), void (*backward)(BackwardRun&)>
void register_sequence_ops(torch::Library& library) {
  const auto add = [&]<class O, typename O::Outputs (*run)(typename O::Call&)>(const char* name) {
    library.impl(name, O::Dispatched::template entry<typename O::Results, O::template implementation<run>>);
  };
  add.template operator()<ForwardOp, run_forward<forward>>("sequence_forward");
  add.template operator()<BackwardOp, run_backward<backward, false>>("sequence_backward");
  add.template operator()<BackwardOverSavedOp, run_backward<backward, true>>("sequence_backward_");
}

}  // namespace rnn
