#include "autograd/node.h"

#include "autograd/kernel_node.h"

namespace rnn {
namespace {

thread_local FlowSink next_flow_sink;

// What forward returns and backward reads, or the same of one step of a cell, without the dimensions of size 1.
enum class Form { kSequence, kStep };

class SequenceBackward final : public KernelNode {
 public:
  SequenceBackward(Form form, Settings settings, const Inputs& in)
      : KernelNode(std::move(settings), in.first), form_(form), flow_(std::exchange(next_flow_sink, {})) {
    add_edges(in.all);
  }

  std::string name() const override { return "SequenceBackward"; }

  // `seen`: callers see c.
  void save(const Inputs& in, const Steps& steps, const Kept& kept, bool seen) {
    keep_inputs(in.all);
    keep_steps(steps);
    if (reads_y(in)) {
      keep_shared(kept.y);
    } else {
      keep_output(Tensor());
    }
    if (seen) {
      keep_shared(kept.c);
    } else {
      keep_output(kept.c);
    }
    keep_output(kept.h_raw);
    keep_own(kept.saved);
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    TORCH_CHECK_NOT_IMPLEMENTED(!flow_, "gradient_flow: compiled autograd does not record norms of gradients");
    args.collect(form_ == Form::kStep);
    KernelNode::compiled_args(args);
  }

 protected:
  variable_list backward(const variable_list& grads, Pass& pass) override {
    Inputs in;
    in.first = first_;
    in.all = std::move(pass.inputs);
    auto& outputs = pass.outputs;
    Kept kept{std::move(outputs[kY]), std::move(outputs[kC]), std::move(outputs[kHRaw]), std::move(outputs[kSaved])};
    const OutputGradients out = expand(grads, in, kept);
    Gradients found;
    if (pass.differentiable) {
      TORCH_CHECK(!settings_.invariant,
                  "batch_invariant: a gradient that is to be differentiated again (create_graph=True) comes from the "
                  "reference, whose products depend on the batch. Run forward without batch_invariant.");
      found = differentiable_gradients(settings_, in, pass.steps, out, pass.wanted, bool(flow_));
    } else {
      const bool overwrite = pass.last && pass.plain && can_overwrite(settings_.cell) && take(kSaved, kept.saved);
      found = gradients(settings_, in, pass.steps, out, kept, pass.wanted, bool(flow_), pass.plain, overwrite);
    }
    if (form_ == Form::kStep) {
      for (size_t i = 0; i < Inputs::kFirst; ++i)
        if (found.all[i].defined()) found.all[i] = found.all[i].squeeze(0);
    }
    if (flow_) flow_(found.flow);
    return std::move(found.all);
  }

 private:
  enum : size_t { kY, kC, kHRaw, kSaved };  // the outputs that are kept

  // The gradients of y, h_n, c_n and c; brings what a step left out back to the layouts of a sequence.
  OutputGradients expand(const variable_list& grads, Inputs& in, Kept& kept) const {
    const bool has_c = in.all[Inputs::kC0].defined(), step = form_ == Form::kStep;
    for (size_t i = 0; step && i < Inputs::kFirst; ++i)
      if (in.all[i].defined()) in.all[i] = in.all[i].unsqueeze(0);
    if (!kept.y.defined()) {
      kept.y = in.h0();  // of the same sizes, and never read
    } else if (step) {
      kept.y = kept.y.unsqueeze(0);
    }
    if (!step) return {grads[0], grads[1], has_c ? grads[2] : Tensor(), has_c ? grads[3] : Tensor()};
    if (has_c) kept.c = kept.c.unsqueeze(0).unsqueeze(2);
    const auto row = [](const Tensor& t) { return t.defined() ? t.unsqueeze(0) : t; };
    return {Tensor(), row(grads[0]), has_c ? row(grads[1]) : Tensor(), Tensor()};
  }

  // One step of one direction takes the h before it from h0.
  bool reads_y(const Inputs& in) const {
    const bool one = form_ == Form::kStep || in.x().sym_size(0).maybe_as_int() == 1;
    return !one || in.weights(kWHh).size() > 1 || find_cell(settings_.cell).reads_h;
  }

  const Form form_;
  const FlowSink flow_;
};

template <Library library>
ForwardResults forward(c10::DispatchKeySet keys, c10::string_view cell, const Tensor& x, TensorList w_ih,
                       TensorList w_hh, const OptionalList& b_ih, const OptionalList& b_hh, const OptionalList& w_hr,
                       const Tensor& h0, const OptionalTensor& c0, const OptionalTensor& lengths,
                       const OptionalTensor& starts, const OptionalTensor& reset, bool save, bool all_c, int64_t layer,
                       int64_t window, c10::string_view clip, double bound) {
  const auto run = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return SequenceOps<library>::forward().redispatch(keys & c10::after_autograd_keyset, cell, x, w_ih, w_hh, b_ih,
                                                      b_hh, w_hr, h0, c0, lengths, starts, reset, save, all_c, layer,
                                                      window, clip, bound);
  };
  if (!needs_history(x, w_ih, w_hh, list_of(b_ih), list_of(b_hh), list_of(w_hr), h0, c0)) return run();
  save = true;  // decided here, so that callers, and graphs of their calls, are the same with gradients and without
  const Inputs in(x, h0, c0, {w_ih, w_hh, list_of(b_ih), list_of(b_hh), list_of(w_hr)});
  const auto node = make_node<SequenceBackward>(
      Form::kSequence, Settings{library, std::string(cell), window, std::string(clip), bound, batch_invariant()}, in);
  ForwardResults results = run();
  const auto& [y, h_n, c_n, c, h_raw, saved] = results;
  for (const Tensor* t : {&y, &h_n}) torch::autograd::set_history(*t, node);
  if (c0)
    for (const Tensor* t : {&c_n, &c}) torch::autograd::set_history(*t, node);
  node->save(in, {lengths, starts, reset}, {y, c, h_raw, saved}, all_c);
  return results;
}

}  // namespace

void set_flow_sink(FlowSink sink) { next_flow_sink = std::move(sink); }

State cell_step(c10::string_view cell, const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, TensorList b_ih,
                TensorList b_hh, const Tensor& h0, const OptionalTensor& c0) {
  const bool save = needs_history(x, w_ih, w_hh, b_ih, b_hh, h0, c0);
  Inputs in;
  decltype(make_node<SequenceBackward>(Form::kStep, Settings{}, in)) node;
  if (save) {
    in = Inputs(x, h0, c0, {TensorList(w_ih), TensorList(w_hh), b_ih, b_hh, TensorList()});
    node = make_node<SequenceBackward>(
        Form::kStep, Settings{Library::kCompiled, std::string(cell), 0, "none", 1.0, batch_invariant()}, in);
  }
  State next;
  Tensor h_raw, saved;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto results = SequenceOps<Library::kCompiled>::forward().call(
        cell, x.unsqueeze(0), w_ih, w_hh, given(b_ih), given(b_hh), std::nullopt, h0.unsqueeze(0),
        c0 ? OptionalTensor(c0->unsqueeze(0)) : std::nullopt, std::nullopt, std::nullopt, std::nullopt, save, false, -1,
        0, "none", 1.0);
    next.h = std::get<0>(results).squeeze(0);
    if (c0) next.c = std::get<2>(results).squeeze(0);
    h_raw = std::get<4>(results);
    saved = std::get<5>(results);
  }
  if (save) {
    torch::autograd::set_history(next.h, node);
    if (c0) torch::autograd::set_history(*next.c, node);
    // The c of a step is c_n: one of them is enough.
    node->save(in, {}, {next.h, next.c.value_or(h_raw), h_raw, saved}, true);
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
