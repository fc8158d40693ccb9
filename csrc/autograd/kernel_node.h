// What the autograd nodes of a layer and of a stack share: what is kept from forward to backward, the state in which a
// backward starts, compiled autograd, and when a node is made.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <c10/core/impl/COW.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "autograd/gradients.h"

namespace rnn {

using torch::autograd::variable_list;

class KernelNode : public torch::autograd::Node {
 public:
  void will_release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    last_ = true;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for_all_saved([](SavedVariable& t) { t.reset_data(); });
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(settings_.library == Library::kTriton);
    args.collect(settings_.cell);
    args.collect(settings_.window);
    args.collect(settings_.clip);
    args.collect(settings_.bound);
    args.collect(settings_.invariant);
    for (const size_t n : first_) args.collect(static_cast<int64_t>(n));
    args.collect(inputs_, false);
    for (const SavedVariable& t : steps_) args.collect(t, false);
    for (const SavedVariable& t : outputs_) args.collect(t, true);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for_all_saved([&](SavedVariable& t) { swap.before(t); });
    variable_list result = apply(variable_list(grads));
    for_all_saved([&](SavedVariable& t) { swap.after(t); });
    return result;
  }

 protected:
  using SavedVariable = torch::autograd::SavedVariable;

  // What one backward starts with.
  struct Pass {
    std::vector<Tensor> inputs;  // one for each edge
    Steps steps;
    c10::SmallVector<Tensor, 4> outputs;
    std::vector<bool> wanted;  // of the inputs
    bool last;                 // what is saved is released after this pass
    bool differentiable;       // the gradients come from torch's operators alone, for a history or a batch of them
    bool plain;                // nothing asks for a history or traces, and no subclass of a tensor is among these
  };

  // `first`: of the Inputs of a layer.
  KernelNode(Settings settings, const std::array<size_t, kWeights + 1>& first)
      : settings_(std::move(settings)), first_(first) {}

  virtual variable_list backward(const variable_list& grads, Pass& pass) = 0;

  void add_edges(TensorList inputs) {
    for (const Tensor& t : inputs)
      add_next_edge(t.defined() ? torch::autograd::impl::gradient_edge(t) : torch::autograd::Edge());
  }

  // These keep what backward reads, once the outputs have the node in their history.
  void keep_inputs(TensorList inputs) {
    inputs_.reserve(num_outputs());
    for (const Tensor& t : inputs) inputs_.emplace_back(t, false);
  }
  void keep_steps(const Steps& steps) {
    steps_ = {SavedVariable(steps.lengths, false), SavedVariable(steps.starts, false),
              SavedVariable(steps.reset, false)};
  }
  void keep_output(const Tensor& t) { outputs_.emplace_back(t, true); }
  // An output that callers may change before backward, as they may torch.nn's: its values are kept whatever becomes of
  // it, in the memory that both share until somebody writes to it.
  void keep_shared(const Tensor& t) {
    const Tensor values = shared_until_written(t);
    keep_output(values.defined() ? values : t);
  }
  // An alias: an object that Python once had of the tensor itself would live, and count as an owner, as long as it.
  void keep_own(const Tensor& t) { keep_output(t.tensor_data()); }

  // Whether the memory of output number i, which was just unpacked, may be written over: nobody else can see it.
  bool take(size_t i, const Tensor& unpacked) {
    if (outputs_[i].has_hooks()) return false;  // it came from a hook, which may share it in ways that nothing counts
    outputs_[i].reset_data();
    return unpacked.use_count() == 1 && unpacked.storage().use_count() == 1;
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    Pass pass;
    pass.last = std::exchange(last_, false);
    // Forward has cast what autocast casts; a region around backward must not cast once more.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    pass.inputs.reserve(inputs_.size());
    for (const SavedVariable& t : inputs_) pass.inputs.push_back(t.unpack());
    pass.steps = {unpack(steps_[0]), unpack(steps_[1]), unpack(steps_[2])};
    for (const SavedVariable& t : outputs_) pass.outputs.push_back(t.unpack(getptr()));

    // Kernels take no batches of gradients (is_grads_batched, vmap); torch's operators do.
    pass.differentiable = c10::GradMode::is_enabled() || std::ranges::any_of(grads, is_batched);
    pass.plain = !pass.differentiable && !subclasses(pass.inputs) && !subclasses(grads) &&
                 !at::isTensorSubclassLike(pass.outputs[0]);
    // Nothing below asks for a history or tracks views, so that half of the dispatcher's work can be left out.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (pass.plain) below_autograd.emplace();
    pass.wanted.resize(pass.inputs.size());
    for (size_t i = 0; i < pass.wanted.size(); ++i) pass.wanted[i] = task_should_compute_output(i);
    return backward(grads, pass);
  }

  const Settings settings_;
  const std::array<size_t, kWeights + 1> first_;

 private:
  // Undefined where memory cannot be shared so, or somebody has to see how the values of a backward came about.
  static Tensor shared_until_written(const Tensor& t) {
    if (at::isTensorSubclassLike(t) || !t.is_cpu() || !t.numel()) return {};
    auto storage = c10::impl::cow::lazy_clone_storage(*t.storage().unsafeGetStorageImpl());
    if (!storage) return {};  // it is not torch's own memory
    Tensor clone = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(std::move(storage)),
                                                            c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
    clone.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    return clone;
  }

  template <class F>
  void for_all_saved(F&& f) {
    for (SavedVariable& t : inputs_) f(t);
    for (SavedVariable& t : steps_) f(t);
    for (SavedVariable& t : outputs_) f(t);
  }

  static OptionalTensor unpack(const SavedVariable& saved) {
    Tensor t = saved.unpack();
    return t.defined() ? OptionalTensor(std::move(t)) : std::nullopt;
  }

  static bool is_batched(const Tensor& t) {
    return t.defined() &&
           t.key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched}));
  }

  static bool subclasses(TensorList tensors) {
    for (const Tensor& t : tensors)
      if (t.defined() && at::isTensorSubclassLike(t)) return true;
    return false;
  }

  bool last_ = false;  // the next apply is the last one
  std::vector<SavedVariable> inputs_;
  std::array<SavedVariable, 3> steps_;  // lengths, starts and reset
  c10::SmallVector<SavedVariable, 4> outputs_;
};

// torch counts references to its nodes itself from 2.12 on, and left it to std::shared_ptr before.
template <class Node, class... Args>
auto make_node(Args&&... args) {
  if constexpr (std::is_same_v<decltype(std::declval<Node&>().getptr()), std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<Node>(new Node(std::forward<Args>(args)...), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Node>(std::forward<Args>(args)...);
  }
}

// Whether a gradient may be asked for in any of these, tensors, lists and optional tensors alike.
template <class... Tensors>
bool needs_history(const Tensors&... tensors) {
  const auto dual = [](const auto& t) {
    if constexpr (std::is_same_v<std::decay_t<decltype(t)>, TensorList>) {
      return torch::autograd::isFwGradDefinedTensorList(t);
    } else {
      return torch::autograd::isFwGradDefined(t);
    }
  };
  TORCH_CHECK_NOT_IMPLEMENTED((!dual(tensors) && ...),
                              "rnnkernels: forward-mode AD is not implemented by the kernels. Use reverse mode, or "
                              "rnnkernels.use_backend('reference').");
  return torch::autograd::compute_requires_grad(tensors...);
}

}  // namespace rnn
