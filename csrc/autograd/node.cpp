#include "autograd/node.h"

#include <torch/csrc/autograd/functions/utils.h>

#include "autograd/by_reference.h"
#include "autograd/make_node.h"
#include "autograd/saving.h"
#include "autograd/tangents.h"
#include "ops/sizes.h"

namespace rnn {
namespace {

using torch::autograd::variable_list;

// Whether tensors are those of a sequence, or of one step of a cell, without the dimensions of size 1.
enum class Form { kSequence, kStep };

class SequenceBackward final : public torch::autograd::Node {
 public:
  SequenceBackward(Form form, Library library, const Settings& settings, const OptionalTensor& flow, const Kept& kept)
      : form_(form),
        library_(library),
        settings_(lasting(settings)),
        invariant_(batch_invariant()),
        flow_(flow.value_or(Tensor())) {
    for (const Tensor& t : kept.inputs) add_next_edge(edge_to(t));
    for (const Tensor& t : kept.masks) add_next_edge(edge_to(t));
  }

  std::string name() const override { return "SequenceBackward"; }

  void save(const Kept& kept, bool all_states) { saved_.keep(kept, {reads_y(kept), all_states}); }

  void will_release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    last_ = true;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved_.for_all([](auto& t, bool) { t.reset_data(); });
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    TORCH_CHECK_NOT_IMPLEMENTED(!flow_.defined(),
                                "gradient_flow: compiled autograd does not record norms of gradients");
    args.collect(form_ == Form::kStep);
    args.collect(library_ == Library::kTriton);
    args.collect(invariant_);
    collect_fields(args, settings_);
    saved_.for_all([&](const auto& t, bool output) { args.collect(t, output); });
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    saved_.for_all([&](auto& t, bool) { swap.before(t); });
    variable_list result = apply(variable_list(grads));
    saved_.for_all([&](auto& t, bool) { swap.after(t); });
    return result;
  }

 protected:
  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool last = std::exchange(last_, false);
    // Forward has cast what autocast casts; a region around backward must not cast once more.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    Kept kept = saved_.unpacked(getptr());

    // One op where a further derivative or a transform is to see what happens; and for whoever is shown ops, such as
    // compilers, whose graphs have the very products of this project then. Of a single step they are shown each
    // product: a compiler adds the one of the next step to it at once.
    const bool shown = subclasses(kept.inputs) || subclasses(kept.masks) || subclasses(grads) ||
                       at::isTensorSubclassLike(kept.y.defined() ? kept.y : kept.inputs[kH0]);
    const bool as_op =
        c10::GradMode::is_enabled() || transformed(grads) || transformed(kept.inputs) || (shown && !one_step(kept));
    const bool plain = !as_op && !shown;
    // Nothing below asks for a history or tracks views, so that half of the dispatcher's work can be left out.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (plain) below_autograd.emplace();

    std::vector<bool> wanted(kept.inputs.size());
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = task_should_compute_output(i);
    const size_t edges = kept.inputs.size() + kept.masks.size();
    const bool overwrite = last && plain && find_cell(settings_.cell).fits_over_saved() && saved_.take(kept.saved);
    const OutputGradients out = expand(grads, kept);
    Gradients found;
    if (as_op) {
      found = gradients_as_op(settings_, kept, out, wanted, library_, invariant_, flow_.defined());
    } else {
      found = gradients(settings_, kept, out, wanted, {library_, invariant_, flow_.defined(), plain, overwrite});
    }
    if (form_ == Form::kStep) {
      for (size_t i = 0; i < kFirstWeight; ++i)
        if (found.inputs[i].defined()) found.inputs[i] = found.inputs[i].squeeze(0);
    }
    if (flow_.defined()) {
      const at::NoGradGuard no_history;
      flow_.copy_(found.flow);
    }
    found.inputs.resize(edges);  // masks have no gradient
    return std::move(found.inputs);
  }

 private:
  // Whether torch.func, a batch of gradients (is_grads_batched) or forward mode takes part.
  static bool transformed(TensorList tensors) {
    using Key = c10::DispatchKey;
    constexpr c10::DispatchKeySet keys({Key::FuncTorchBatched, Key::FuncTorchGradWrapper, Key::Batched});
    return has_tangents(tensors) ||
           std::ranges::any_of(tensors, [&](const Tensor& t) { return t.defined() && t.key_set().has_any(keys); });
  }
  static bool subclasses(TensorList tensors) {
    return std::ranges::any_of(tensors, [](const Tensor& t) { return t.defined() && at::isTensorSubclassLike(t); });
  }

  // The gradients of the outputs; brings what a step left out back to the layouts of a sequence.
  OutputGradients expand(const variable_list& grads, Kept& kept) const {
    const bool has_c = kept.inputs[kC0].defined(), step = form_ == Form::kStep;
    const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    if (!step) {
      if (!kept.y.defined()) kept.y = kept.inputs[kH0].view_symint(y_shape(kept));  // of its size, and never read
      return {optional(grads[0]), optional(grads[1]), optional(grads[2]), optional(grads[3]), optional(grads[4])};
    }
    for (size_t i = 0; i < kFirstWeight; ++i)
      if (kept.inputs[i].defined()) kept.inputs[i] = kept.inputs[i].unsqueeze(0);
    kept.y = kept.y.defined() ? kept.y.unsqueeze(0) : kept.inputs[kH0];
    if (has_c) kept.c = kept.c.unsqueeze(0).unsqueeze(0).unsqueeze(3);
    const auto row = [](const Tensor& t) { return t.defined() ? OptionalTensor(t.unsqueeze(0)) : std::nullopt; };
    return {std::nullopt, row(grads[0]), has_c ? row(grads[1]) : std::nullopt, std::nullopt, std::nullopt};
  }

  static std::vector<c10::SymInt> y_shape(const Kept& kept) {
    std::vector<c10::SymInt> shape = kept.inputs[kX].sym_sizes().vec();
    shape.back() = kept.inputs[kH0].sym_size(2);
    return shape;
  }

  bool one_step(const Kept& kept) const {
    return form_ == Form::kStep || kept.inputs[kX].sym_size(0).maybe_as_int() == 1;
  }

  // One step of one layer and direction takes the h before it from h0.
  bool reads_y(const Kept& kept) const {
    return !one_step(kept) || settings_.layers > 1 || all_directions(settings_) > 1 ||
           find_cell(settings_.cell).reads_h;
  }

  const Form form_;
  const Library library_;
  const Settings settings_;
  const bool invariant_;
  const Tensor flow_;  // to be filled
  bool last_ = false;  // the next apply is the last one
  Saved saved_;
};

using torch::autograd::isFwGradDefined;

bool takes_tangents(const ForwardCall& call) {
  return isFwGradDefined(call.x) || has_tangents(call.weights) || isFwGradDefined(call.h0) || isFwGradDefined(call.c0);
}

// Whether a gradient may be asked for in any of what a call takes.
bool needs_history(const ForwardCall& call) {
  const auto refuse = [](const char* name, bool requires_grad) {
    TORCH_CHECK(!requires_grad, name,
                ": expected tensors that require no gradient, which none is computed for, got one that does. Pass its "
                "detach().");
  };
  refuse("masks", call.masks && torch::autograd::compute_requires_grad(*call.masks));
  refuse("h_mask", torch::autograd::compute_requires_grad(call.h_mask));
  return torch::autograd::compute_requires_grad(call.x, call.weights, call.h0, call.c0);
}

template <Library library>
ForwardOp::Results forward(c10::DispatchKeySet keys, ForwardCall& call) {
  const auto run = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return ForwardOp::redispatch(SequenceOps<library>::forward(), keys & c10::after_autograd_keyset, call);
  };
  const bool tangents = takes_tangents(call);
  const auto add_tangents = [&](const ForwardOp::Results& results) {
    const auto& [y, h_n, c_n, ys, c, h_raw, saved] = results;
    if (!tangents) return;
    refuse_invariant(batch_invariant(), "a tangent (forward mode)");
    set_tangents({y, h_n, c_n, ys, c}, by_reference().forward_tangents(call));
  };
  if (!needs_history(call)) {
    ForwardOp::Results results = run();
    add_tangents(results);
    return results;
  }
  // Decided here, so that callers, and graphs of their calls, are the same with gradients and without.
  call.save = true;
  Kept kept = given_to(call);
  const auto node = make_node<SequenceBackward>(Form::kSequence, library, call, call.flow, kept);
  ForwardOp::Results results = run();
  const auto& [y, h_n, c_n, ys, c, h_raw, saved] = results;
  const auto history = [&](const Tensor& t, bool yes) { torch::autograd::set_history(yes ? t : Tensor(), node); };
  history(y, true);
  history(h_n, true);
  history(c_n, call.c0.has_value());
  history(ys, ys.dim() > 1);
  history(c, call.c0.has_value());
  add_tangents(results);
  std::tie(kept.y, kept.ys, kept.c, kept.h_raw, kept.saved) = std::tie(y, ys, c, h_raw, saved);
  node->save(kept, call.all_states);
  return results;
}

}  // namespace

State cell_step(c10::string_view cell, const Tensor& x, TensorList weights, const Tensor& h0,
                const OptionalTensor& c0) {
  ForwardCall call;
  call.cell = cell;
  call.x = x;
  call.weights = weights;
  call.h0 = h0;
  call.c0 = c0;
  call.step = true;
  Kept kept;
  State next;
  const auto run = [&] {
    call.x = x.unsqueeze(0);
    call.h0 = h0.unsqueeze(0);
    if (c0) call.c0 = c0->unsqueeze(0);
    auto [y, h_n, c_n, ys, c, h_raw, saved] = ForwardOp::call(SequenceOps<Library::kCompiled>::forward(), call);
    next.h = y.squeeze(0);
    if (c0) next.c = c_n.squeeze(0);
    kept.h_raw = h_raw;
    kept.saved = saved;
  };
  if (takes_tangents(call)) {  // through the node of a sequence, which knows of them
    run();
    return next;
  }
  call.save = needs_history(call);
  decltype(make_node<SequenceBackward>(Form::kStep, Library::kCompiled, call, call.flow, kept)) node;
  if (call.save) {
    kept = given_to(call);
    node = make_node<SequenceBackward>(Form::kStep, Library::kCompiled, call, call.flow, kept);
  }
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    run();
  }
  if (call.save) {
    torch::autograd::set_history(next.h, node);
    if (c0) torch::autograd::set_history(*next.c, node);
    kept.y = next.h;
    kept.c = next.c.value_or(kept.h_raw);  // the c of a step is c_n: one of them is enough
    node->save(kept, true);
  }
  return next;
}

}  // namespace rnn

TORCH_LIBRARY_IMPL(rnnkernels, Autograd, library) {
  using Op = rnn::ForwardOp;
  library.impl("sequence_forward",
               TORCH_FN((Op::Dispatched::entry_with_keys<Op::Results, rnn::forward<rnn::Library::kCompiled>>)));
}
TORCH_LIBRARY_IMPL(rnnkernels_triton, Autograd, library) {
  using Op = rnn::ForwardOp;
  library.impl("sequence_forward",
               TORCH_FN((Op::Dispatched::entry_with_keys<Op::Results, rnn::forward<rnn::Library::kTriton>>)));
}
