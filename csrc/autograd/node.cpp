#include "autograd/node.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "autograd/gradients.h"

namespace rnn {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

thread_local FlowSink next_flow_sink;

// What forward returns and backward reads, or the same of one step of a cell, without the dimensions of size 1.
enum class Form { kSequence, kStep };

class SequenceBackward final : public Node {
 public:
  SequenceBackward(Form form, Settings settings, const Inputs& in)
      : form_(form), settings_(std::move(settings)), first_(in.first), flow_(std::exchange(next_flow_sink, {})) {
    for (const Tensor& t : in.all)
      add_next_edge(t.defined() ? torch::autograd::impl::gradient_edge(t) : torch::autograd::Edge());
  }

  // Called once the outputs have this node in their history.
  void save(const Inputs& in, const OptionalTensor& lengths, const OptionalTensor& reset, const Kept& kept) {
    saves_ = true;
    inputs_.reserve(in.all.size());
    for (const Tensor& t : in.all) inputs_.emplace_back(t, false);
    lengths_ = SavedVariable(lengths, false);
    reset_ = SavedVariable(reset, false);
    y_ = SavedVariable(kept.y, true);
    c_ = SavedVariable(kept.c, true);
    h_raw_ = SavedVariable(kept.h_raw, true);
    // An alias: an object that Python once had of the tensor itself would live, and count as an owner, as long as it.
    saved_ = SavedVariable(kept.saved.tensor_data(), true);
  }

  std::string name() const override { return "SequenceBackward"; }

  void will_release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    last_ = true;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& t : inputs_) t.reset_data();
    for (SavedVariable* t : others()) t->reset_data();
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    TORCH_CHECK_NOT_IMPLEMENTED(!flow_, "gradient_flow: compiled autograd does not record norms of gradients");
    args.collect(form_ == Form::kStep);
    args.collect(saves_);
    args.collect(settings_.library == Library::kTriton);
    args.collect(settings_.cell);
    args.collect(settings_.window);
    args.collect(settings_.clip);
    args.collect(settings_.bound);
    args.collect(settings_.invariant);
    for (const size_t n : first_) args.collect(static_cast<int64_t>(n));
    args.collect(inputs_, false);
    for (const SavedVariable* t : {&lengths_, &reset_}) args.collect(*t, false);
    for (const SavedVariable* t : {&y_, &c_, &h_raw_, &saved_}) args.collect(*t, true);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    swap.before(inputs_);
    for (SavedVariable* t : others()) swap.before(*t);
    variable_list result = apply(variable_list(grads));
    swap.after(inputs_);
    for (SavedVariable* t : others()) swap.after(*t);
    return result;
  }

 protected:
  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool last = std::exchange(last_, false);
    TORCH_CHECK(
        saves_,
        "sequence_forward: expected save=True where a gradient is asked for, got save=False. Pass save=True, or "
        "call it under torch.no_grad().");
    // Forward has cast what autocast casts; a region around backward must not cast once more.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    Inputs in = unpack_inputs();
    const OptionalTensor lengths = unpack(lengths_), reset = unpack(reset_);
    Kept kept{y_.unpack(getptr()), c_.unpack(getptr()), h_raw_.unpack(getptr()), saved_.unpack(getptr())};

    const bool differentiable = c10::GradMode::is_enabled();
    const bool plain =
        !differentiable && !subclasses(in.all) && !subclasses(grads) && !at::isTensorSubclassLike(kept.y);
    // Nothing below asks for a history or tracks views, so that half of the dispatcher's work can be left out.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (plain) below_autograd.emplace();

    const OutputGradients out = expand(grads, in, kept);
    std::vector<bool> wanted(in.all.size());
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = task_should_compute_output(i);
    Gradients found;
    if (differentiable) {
      TORCH_CHECK(!settings_.invariant,
                  "batch_invariant: a gradient that is to be differentiated again (create_graph=True) comes from the "
                  "reference, whose products depend on the batch. Run forward without batch_invariant.");
      found = differentiable_gradients(settings_, in, lengths, reset, out, wanted, bool(flow_));
    } else {
      const bool overwrite = last && plain && can_overwrite(settings_.cell) && take(kept.saved);
      found = gradients(settings_, in, lengths, reset, out, kept, wanted, bool(flow_), plain, overwrite);
    }
    if (form_ == Form::kStep) {
      for (size_t i = 0; i < Inputs::kFirst; ++i)
        if (found.all[i].defined()) found.all[i] = found.all[i].squeeze(0);
    }
    if (flow_) flow_(found.flow);
    return std::move(found.all);
  }

 private:
  std::array<SavedVariable*, 6> others() { return {&lengths_, &reset_, &y_, &c_, &h_raw_, &saved_}; }

  static OptionalTensor unpack(const SavedVariable& saved) {
    Tensor t = saved.unpack();
    return t.defined() ? OptionalTensor(std::move(t)) : std::nullopt;
  }

  Inputs unpack_inputs() const {
    Inputs in;
    in.first = first_;
    in.all.reserve(inputs_.size());
    for (const SavedVariable& t : inputs_) in.all.push_back(t.unpack());
    return in;
  }

  static bool subclasses(TensorList tensors) {
    for (const Tensor& t : tensors)
      if (t.defined() && at::isTensorSubclassLike(t)) return true;
    return false;
  }

  // The gradients of y, h_n, c_n and c; brings what a step left out back to the layouts of a sequence.
  OutputGradients expand(const variable_list& grads, Inputs& in, Kept& kept) const {
    const bool has_c = in.all[Inputs::kC0].defined();
    if (form_ == Form::kSequence) return {grads[0], grads[1], has_c ? grads[2] : Tensor(), has_c ? grads[3] : Tensor()};
    for (size_t i = 0; i < Inputs::kFirst; ++i)
      if (in.all[i].defined()) in.all[i] = in.all[i].unsqueeze(0);
    kept.y = kept.y.unsqueeze(0);
    if (has_c) kept.c = kept.c.unsqueeze(0).unsqueeze(2);
    const auto row = [](const Tensor& t) { return t.defined() ? t.unsqueeze(0) : t; };
    return {Tensor(), row(grads[0]), has_c ? row(grads[1]) : Tensor(), Tensor()};
  }

  // Whether the memory of `saved`, which was just unpacked, may be written over: nobody else can see it.
  bool take(const Tensor& saved) {
    if (saved_.has_hooks()) return false;  // it came from a hook, which may share it in ways that nothing here counts
    saved_.reset_data();
    return saved.use_count() == 1 && saved.storage().use_count() == 1;
  }

  const Form form_;
  const Settings settings_;
  const std::array<size_t, kWeights + 1> first_;  // of Inputs
  const FlowSink flow_;
  bool saves_ = false;
  bool last_ = false;  // the next apply is the last one: what is saved is released after it
  std::vector<SavedVariable> inputs_;
  SavedVariable lengths_, reset_, y_, c_, h_raw_, saved_;
};

// torch counts references to its nodes itself from 2.12 on, and left it to std::shared_ptr before.
template <class... Args>
auto make_node(Args&&... args) {
  if constexpr (std::is_same_v<decltype(std::declval<Node&>().getptr()), std::shared_ptr<Node>>) {
    return std::shared_ptr<SequenceBackward>(new SequenceBackward(std::forward<Args>(args)...),
                                             [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<SequenceBackward>(std::forward<Args>(args)...);
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

template <Library library>
ForwardResults forward(c10::DispatchKeySet keys, c10::string_view cell, const Tensor& x, TensorList w_ih,
                       TensorList w_hh, TensorList b_ih, TensorList b_hh, TensorList w_hr, const Tensor& h0,
                       const OptionalTensor& c0, const OptionalTensor& lengths, const OptionalTensor& reset, bool save,
                       bool all_c, int64_t layer, int64_t window, c10::string_view clip, double bound) {
  const auto run = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return SequenceOps<library>::forward().redispatch(keys & c10::after_autograd_keyset, cell, x, w_ih, w_hh, b_ih,
                                                      b_hh, w_hr, h0, c0, lengths, reset, save, all_c, layer, window,
                                                      clip, bound);
  };
  if (!needs_history(x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0)) return run();
  const Inputs in(x, h0, c0, {w_ih, w_hh, b_ih, b_hh, w_hr});
  const auto node = make_node(
      Form::kSequence, Settings{library, std::string(cell), window, std::string(clip), bound, batch_invariant()}, in);
  ForwardResults results = run();
  const auto& [y, h_n, c_n, c, h_raw, saved] = results;
  for (const Tensor* t : {&y, &h_n}) torch::autograd::set_history(*t, node);
  if (c0)
    for (const Tensor* t : {&c_n, &c}) torch::autograd::set_history(*t, node);
  if (save) node->save(in, lengths, reset, {y, c, h_raw, saved});
  return results;
}

}  // namespace

void set_flow_sink(FlowSink sink) { next_flow_sink = std::move(sink); }

State cell_step(c10::string_view cell, const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, TensorList b_ih,
                TensorList b_hh, const Tensor& h0, const OptionalTensor& c0) {
  const bool save = needs_history(x, w_ih, w_hh, b_ih, b_hh, h0, c0);
  Inputs in;
  decltype(make_node(Form::kStep, Settings{}, in)) node;
  if (save) {
    in = Inputs(x, h0, c0, {TensorList(w_ih), TensorList(w_hh), b_ih, b_hh, TensorList()});
    node =
        make_node(Form::kStep, Settings{Library::kCompiled, std::string(cell), 0, "none", 1.0, batch_invariant()}, in);
  }
  State next;
  Tensor h_raw, saved;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto results = SequenceOps<Library::kCompiled>::forward().call(
        cell, x.unsqueeze(0), w_ih, w_hh, b_ih, b_hh, TensorList(), h0.unsqueeze(0),
        c0 ? OptionalTensor(c0->unsqueeze(0)) : std::nullopt, std::nullopt, std::nullopt, save, false, -1, 0, "none",
        1.0);
    next.h = std::get<0>(results).squeeze(0);
    if (c0) next.c = std::get<2>(results).squeeze(0);
    h_raw = std::get<4>(results);
    saved = std::get<5>(results);
  }
  if (save) {
    torch::autograd::set_history(next.h, node);
    if (c0) torch::autograd::set_history(*next.c, node);
    node->save(in, std::nullopt, std::nullopt, {next.h, next.c.value_or(h_raw), h_raw, saved});
  }
  return next;
}

}  // namespace rnn

TORCH_LIBRARY_IMPL(rnnkernels, Autograd, library) {
  library.impl("sequence_forward", TORCH_FN(rnn::forward<rnn::Library::kCompiled>));
}
TORCH_LIBRARY_IMPL(rnnkernels_triton, Autograd, library) {
  library.impl("sequence_forward", TORCH_FN(rnn::forward<rnn::Library::kTriton>));
}
