// The autograd node of a stack of layers, registered for stack_forward.
#include "common/stack.h"

#include "autograd/kernel_node.h"

namespace rnn {
namespace {

class StackBackward final : public KernelNode {
 public:
  // The edges are those of all layers, one layer after the other. The x of all but the first are undefined: they come
  // from outputs of this node. Those of the masks follow, and lead nowhere.
  StackBackward(Settings settings, const std::vector<Inputs>& layers, TensorList masks)
      : KernelNode(std::move(settings), layers[0].first), L_(layers.size()) {
    for (const Inputs& in : layers) add_edges(in.all);
    add_edges(masks);
  }

  std::string name() const override { return "StackBackward"; }

  void save(const std::vector<Inputs>& layers, TensorList masks, const Steps& steps,
            const StackForwardResults& results) {
    for (const Inputs& in : layers) keep_inputs(in.all);
    keep_inputs(masks);
    keep_steps(steps);
    const auto& [y, h_n, c_n, c, saved] = results;
    for (const Tensors* list : {&y, &c})
      for (const Tensor& t : *list) keep_output(t);
    for (const Tensor& t : saved) keep_own(t);
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(int64_t(L_));
    KernelNode::compiled_args(args);
  }

 protected:
  variable_list backward(const variable_list& grads, Pass& pass) override {
    std::vector<Layer> layers = split(grads, pass);
    variable_list all(pass.inputs.size());
    // No gradient comes from the layers above the last that one reaches, and nobody asks for those of the layers below
    // the first that wants one.
    const auto reached = [](const Layer& layer) {
      return std::ranges::any_of(layer.out, [](const Tensor& t) { return t.defined(); });
    };
    const auto wants = [](const Layer& layer) {
      return std::ranges::any_of(layer.wanted, [](bool wanted) { return wanted; });
    };
    size_t first = 0, end = layers.size();
    while (end > 0 && !reached(layers[end - 1])) --end;
    while (first < end && !wants(layers[first])) ++first;
    if (first == end) return all;

    const auto found = [&](size_t l, std::vector<Tensor> gradients) {
      std::ranges::move(gradients, all.begin() + ptrdiff_t(l * inputs()));
    };
    if (pass.differentiable) {
      differentiate(layers, first, end, pass, found);
    } else {
      run(layers, first, end, pass, found);
    }
    return all;
  }

 private:
  struct Layer {
    Inputs in;    // whose x is the y of the layer below, before the mask
    Tensor mask;  // between the two, if there is any
    Kept kept;
    OutputGradients out;
    std::vector<bool> wanted;
    size_t saved;  // the number of kept.saved among the outputs that are kept
  };

  size_t inputs() const { return first_.back(); }  // of each layer

  std::vector<Layer> split(const variable_list& grads, Pass& pass) const {
    const CellInfo& cell = find_cell(settings_.cell);
    const bool has_c = cell.S > 1, masked = pass.inputs.size() > L_ * inputs();
    std::vector<Layer> layers(L_);
    for (size_t l = 0; l < L_; ++l) {
      Layer& layer = layers[l];
      const auto begin = ptrdiff_t(l * inputs()), end = begin + ptrdiff_t(inputs());
      layer.in.first = first_;
      layer.in.all.assign(pass.inputs.begin() + begin, pass.inputs.begin() + end);
      layer.wanted.assign(pass.wanted.begin() + begin, pass.wanted.begin() + end);
      layer.out = {grads[l], grads[L_ + l], has_c ? grads[2 * L_ + l] : Tensor(), has_c ? grads[3 * L_ + l] : Tensor()};
      layer.kept.y = pass.outputs[l];
      if (l > 0) layer.in.all[Inputs::kX] = pass.outputs[l - 1];
      if (l > 0 && masked) layer.mask = pass.inputs[L_ * inputs() + l - 1];
      if (has_c) layer.kept.c = pass.outputs[L_ + l];
      layer.saved = (has_c ? 2 : 1) * L_ + l;
      if (cell.K > 0) layer.kept.saved = std::move(pass.outputs[layer.saved]);  // whose owners are counted
    }
    return layers;
  }

  static void apply_mask(Layer& layer) {
    Tensor& x = layer.in.all[Inputs::kX];
    if (layer.mask.defined()) x = x * layer.mask;
  }

  // All layers at once, then the products of each.
  template <class Found>
  void run(std::vector<Layer>& layers, size_t first, size_t end, const Pass& pass, Found&& found) {
    Tensors w_ih, w_hh, h0, c0, masks, y, c, saved, dgates, dh0, dc0;
    OptionalTensors dy, dh_n, dc_n, dc;
    bool initial = false, overwrite = pass.last && pass.plain && can_overwrite(settings_.cell);
    const auto add = [](Tensors& to, const Tensor& t) {
      if (t.defined()) to.push_back(t);
    };
    const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    for (size_t l = first; l < end; ++l) {
      Layer& layer = layers[l];
      if (l > first) {
        w_ih.push_back(layer.in.weights(kWIh)[0]);
        add(masks, layer.mask);
      }
      w_hh.push_back(layer.in.weights(kWHh)[0]);
      h0.push_back(layer.in.h0());
      add(c0, layer.in.all[Inputs::kC0]);
      y.push_back(layer.kept.y);
      add(c, layer.kept.c);
      overwrite = overwrite && take(layer.saved, layer.kept.saved);
      add(saved, layer.kept.saved);
      dy.push_back(optional(layer.out[0]));
      dh_n.push_back(optional(layer.out[1]));
      dc_n.push_back(optional(layer.out[2]));
      dc.push_back(optional(layer.out[3]));
      initial = initial || layer.wanted[Inputs::kH0] || layer.wanted[Inputs::kC0];
    }
    const auto call = [&](const auto& op) {
      return op.call(settings_.cell, dy, dh_n, dc_n, dc, given(w_ih), w_hh, h0, given(c0), given(masks), y, given(c),
                     saved, pass.steps.lengths, pass.steps.starts, pass.steps.reset, settings_.window, settings_.clip,
                     settings_.bound, initial);
    };
    if (overwrite) {
      std::tie(dh0, dc0) = call(StackOps::backward_over_saved());
      dgates = saved;
    } else {
      std::tie(dgates, dh0, dc0) = call(StackOps::backward());
    }
    for (size_t l = first; l < end; ++l) {
      Layer& layer = layers[l];
      if (layer.wanted[layer.in.index(kWIh, 0)]) apply_mask(layer);  // nothing else reads the values of x
      std::vector<Tensor> gradients =
          products(settings_, layer.in, pass.steps, layer.kept, dgates[l - first], Tensor(), layer.wanted, pass.plain);
      if (layer.wanted[Inputs::kH0]) gradients[Inputs::kH0] = dh0[l - first];
      if (layer.wanted[Inputs::kC0]) gradients[Inputs::kC0] = dc0[l - first];
      layer.in.all[Inputs::kX].reset();  // its memory may serve the next
      found(l, std::move(gradients));
    }
  }

  // One layer after the other: each is a differentiable function of the y below it, whose history is this node.
  template <class Found>
  void differentiate(std::vector<Layer>& layers, size_t first, size_t end, const Pass& pass, Found&& found) const {
    Tensor from_above;
    for (size_t l = end; l-- > first;) {
      Layer& layer = layers[l];
      Tensor& dy = layer.out[0];
      if (from_above.defined()) dy = dy.defined() ? dy + from_above : from_above;
      if (l > first) layer.wanted[Inputs::kX] = true;
      apply_mask(layer);
      std::vector<Tensor> gradients =
          differentiable_gradients(settings_, layer.in, pass.steps, layer.out, layer.wanted, false).all;
      if (l > first) {
        from_above = std::exchange(gradients[Inputs::kX], Tensor());
        if (layer.mask.defined()) from_above = from_above * layer.mask;
      }
      found(l, std::move(gradients));
    }
  }

  const size_t L_;
};

StackForwardResults forward(c10::DispatchKeySet keys, c10::string_view cell, const Tensor& x, TensorList w_ih,
                            TensorList w_hh, const OptionalList& biases_ih, const OptionalList& biases_hh,
                            TensorList h0, const OptionalList& initial_c, const OptionalList& factors,
                            const OptionalTensor& lengths, const OptionalTensor& starts, const OptionalTensor& reset,
                            bool save, bool all_c, int64_t window, c10::string_view clip, double bound) {
  const TensorList b_ih = list_of(biases_ih), b_hh = list_of(biases_hh), c0 = list_of(initial_c),
                   masks = list_of(factors);
  const auto run = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return StackOps::forward().redispatch(keys & c10::after_autograd_keyset, cell, x, w_ih, w_hh, biases_ih, biases_hh,
                                          h0, initial_c, factors, lengths, starts, reset, save, all_c, window, clip,
                                          bound);
  };
  TORCH_CHECK(!needs_history(masks),
              "masks: expected tensors that require no gradient, which none is computed for, got one that does. Pass "
              "its detach(), or run the layers one by one.");
  if (!needs_history(x, w_ih, w_hh, b_ih, b_hh, h0, c0)) return run();
  save = true;  // decided here, as for a layer
  const size_t L = count_layers(find_cell(cell), w_ih, w_hh, b_ih, b_hh, h0, c0);
  std::vector<Inputs> layers;
  layers.reserve(L);
  size_t first = L;  // whose results have a history
  for (size_t l = 0; l < L; ++l) {
    layers.emplace_back(
        l == 0 ? x : Tensor(), h0[l], optional_of(c0, l),
        std::array{layer_of(w_ih, l), layer_of(w_hh, l), layer_of(b_ih, l), layer_of(b_hh, l), TensorList()});
    if (first == L && torch::autograd::compute_requires_grad(TensorList(layers[l].all))) first = l;
  }
  const auto node = make_node<StackBackward>(
      Settings{Library::kCompiled, std::string(cell), window, std::string(clip), bound, false}, layers, masks);
  StackForwardResults results = run();
  const auto& [y, h_n, c_n, c, saved] = results;
  for (const Tensors* list : {&y, &h_n, &c_n, &c})
    for (size_t l = 0; l < list->size(); ++l)
      torch::autograd::set_history(l < first ? Tensor() : (*list)[l], node);  // numbered from all
  node->save(layers, masks, {lengths, starts, reset}, results);
  return results;
}

}  // namespace
}  // namespace rnn

TORCH_LIBRARY_IMPL(rnnkernels, Autograd, library) { library.impl("stack_forward", TORCH_FN(rnn::forward)); }
