// What the autograd node keeps from forward to backward.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <c10/core/impl/COW.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "autograd/gradients.h"

namespace rnn {

class Saved {
 public:
  using SavedVariable = torch::autograd::SavedVariable;

  // Whether y is read by backward, and whether callers see the c of all steps.
  struct Use {
    bool y, all_states;
  };

  // After the outputs have the node in their history.
  void keep(const Kept& kept, const Use& use) {
    inputs_.reserve(kept.inputs.size() + kept.masks.size());
    for (const Tensor& t : kept.inputs) inputs_.emplace_back(t, false);
    for (const Tensor& t : kept.masks) inputs_.emplace_back(t, false);
    masks_ = kept.masks.size();
    for (size_t i = 0; i < kSteps; ++i) constants_[i] = SavedVariable(kept.steps.*kOfSteps[i], false);
    constants_[kSteps] = SavedVariable(kept.h_mask, false);
    outputs_[kY] = use.y ? shared(kept.y) : SavedVariable(Tensor(), true);
    outputs_[kYs] = use.all_states ? shared(kept.ys) : SavedVariable(kept.ys, true);
    outputs_[kC] = use.all_states ? shared(kept.c) : SavedVariable(kept.c, true);
    outputs_[kHRaw] = SavedVariable(kept.h_raw, true);
    // An alias: an object that Python once had of the tensor itself would live, and count as an owner, as long as it.
    outputs_[kSaved] =
        SavedVariable(at::isTensorSubclassLike(kept.saved) ? kept.saved : kept.saved.tensor_data(), true);
  }

  template <class NodePointer>
  Kept unpacked(const NodePointer& node) const {
    Kept kept;
    kept.inputs.reserve(inputs_.size());
    for (size_t i = 0; i < inputs_.size(); ++i)
      (i + masks_ < inputs_.size() ? kept.inputs : kept.masks).push_back(inputs_[i].unpack());
    for (size_t i = 0; i < kSteps; ++i) kept.steps.*kOfSteps[i] = optional(constants_[i]);
    kept.h_mask = optional(constants_[kSteps]);
    for (size_t i = 0; i < kOutputs; ++i) (kept.*kPlaces[i]) = outputs_[i].unpack(node);
    return kept;
  }

  // Whether the memory of `saved`, which was just unpacked, may be written over: nobody else can see it.
  bool take(const Tensor& saved) {
    if (outputs_[kSaved].has_hooks()) return false;  // it came from a hook, which may share it in ways nothing counts
    outputs_[kSaved].reset_data();
    return saved.use_count() == 1 && saved.storage().use_count() == 1;
  }

  template <class F>
  void for_all(F&& f) {
    for (SavedVariable& t : inputs_) f(t, false);
    for (SavedVariable& t : constants_) f(t, false);
    for (SavedVariable& t : outputs_) f(t, true);
  }
  template <class F>
  void for_all(F&& f) const {
    for (const SavedVariable& t : inputs_) f(t, false);
    for (const SavedVariable& t : constants_) f(t, false);
    for (const SavedVariable& t : outputs_) f(t, true);
  }

 private:
  static constexpr size_t kSteps = kOfSteps.size();
  enum : size_t { kY, kYs, kC, kHRaw, kSaved, kOutputs };
  static constexpr std::array kPlaces{&Kept::y, &Kept::ys, &Kept::c, &Kept::h_raw, &Kept::saved};

  // An output that callers may change before backward, as they may torch.nn's: its values are kept whatever becomes of
  // it, in the memory that both share until somebody writes to it.
  static SavedVariable shared(const Tensor& t) {
    const Tensor values = shared_until_written(t);
    return SavedVariable(values.defined() ? values : t, true);
  }
  // Undefined where memory cannot be shared so, or somebody has to see how the values of a backward came about.
  static Tensor shared_until_written(const Tensor& t) {
    if (!t.defined() || at::isTensorSubclassLike(t) || !t.is_cpu() || !t.numel()) return {};
    auto storage = c10::impl::cow::lazy_clone_storage(*t.storage().unsafeGetStorageImpl());
    if (!storage) return {};  // it is not torch's own memory
    Tensor clone = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(std::move(storage)),
                                                            c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
    clone.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    return clone;
  }

  static OptionalTensor optional(const SavedVariable& saved) {
    Tensor t = saved.unpack();
    return t.defined() ? OptionalTensor(std::move(t)) : std::nullopt;
  }

  std::vector<SavedVariable> inputs_;                // x, h0, c0, the weights, the masks
  std::array<SavedVariable, kSteps + 1> constants_;  // what Steps has, and h_mask
  std::array<SavedVariable, kOutputs> outputs_;
  size_t masks_ = 0;
};

}  // namespace rnn
