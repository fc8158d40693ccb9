// A stack of layers of one direction as one op: the schemas, how a backend implements and registers it, and the layers
// one after the other, for whatever cannot run them at once.
#pragma once

#include "common/ops.h"

namespace rnn {

// Lists hold one tensor per layer; shapes: layout.h with D = 1, every layer of the same H. Options: as of the sequence
// ops. A list is missing where there is no bias or no c; one of results is empty where its tensors are not kept or not
// asked for.
// In backward, dy are the gradients that reach the y of each layer from outside of the stack: what reaches them through
// the layer above, the op adds itself. A missing list is one of None. w_ih are those of all layers but the first.
// masks, of the shape of y, are factors of y on its way to the next layer (dropout), one between any two layers, or
// none at all. `stack_backward_` writes dgates over `saved`, where a cell's K is G + A.
inline void define_stack_ops(torch::Library& library) {
  library.def(
      "stack_forward(str cell, Tensor x, Tensor[] w_ih, Tensor[] w_hh, Tensor[]? b_ih, Tensor[]? b_hh, Tensor[] h0, "
      "Tensor[]? c0, Tensor[]? masks, Tensor? lengths, Tensor? starts, Tensor? reset, bool save, bool all_c, int "
      "window, str clip, "
      "float bound) -> (Tensor[] y, Tensor[] h_n, Tensor[] c_n, Tensor[] c, Tensor[] saved)");
  library.def(
      "stack_backward(str cell, Tensor?[] dy, Tensor?[] dh_n, Tensor?[] dc_n, Tensor?[] dc, Tensor[]? w_ih, "
      "Tensor[] w_hh, Tensor[] h0, Tensor[]? c0, Tensor[]? masks, Tensor[] y, Tensor[]? c, Tensor[]? saved, "
      "Tensor? lengths, Tensor? starts, Tensor? reset, int window, str clip, float bound, bool initial) "
      "-> (Tensor[] dgates, Tensor[] dh0, Tensor[] dc0)");
  library.def(
      "stack_backward_(str cell, Tensor?[] dy, Tensor?[] dh_n, Tensor?[] dc_n, Tensor?[] dc, Tensor[]? w_ih, "
      "Tensor[] w_hh, Tensor[] h0, Tensor[]? c0, Tensor[]? masks, Tensor[] y, Tensor[]? c, Tensor(a!)[] saved, "
      "Tensor? lengths, Tensor? starts, Tensor? reset, int window, str clip, float bound, bool initial) "
      "-> (Tensor[] dh0, Tensor[] dc0)");
}

using Tensors = std::vector<Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;
using StackForwardResults = std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors>;
using StackBackwardResults = std::tuple<Tensors, Tensors, Tensors>;
using StackBackwardOverSavedResults = std::tuple<Tensors, Tensors>;

using StackForwardSchema = StackForwardResults(c10::string_view, const Tensor&, TensorList, TensorList,
                                               const OptionalList&, const OptionalList&, TensorList,
                                               const OptionalList&, const OptionalList&, const OptionalTensor&,
                                               const OptionalTensor&, const OptionalTensor&, bool, bool, int64_t,
                                               c10::string_view, double);
// Saved: how the list `saved` comes, which sequence_backward_ has to have.
template <class Results, class Saved>
using StackBackwardSchema = Results(c10::string_view, const OptionalTensors&, const OptionalTensors&,
                                    const OptionalTensors&, const OptionalTensors&, const OptionalList&, TensorList,
                                    TensorList, const OptionalList&, const OptionalList&, TensorList,
                                    const OptionalList&, Saved, const OptionalTensor&, const OptionalTensor&,
                                    const OptionalTensor&, int64_t, c10::string_view, double, bool);

struct StackOps {
  static const auto& forward() {
    static const auto op = find_op<StackForwardSchema>("rnnkernels::stack_forward");
    return op;
  }
  static const auto& backward() {
    static const auto op =
        find_op<StackBackwardSchema<StackBackwardResults, const OptionalList&>>("rnnkernels::stack_backward");
    return op;
  }
  static const auto& backward_over_saved() {
    static const auto op =
        find_op<StackBackwardSchema<StackBackwardOverSavedResults, TensorList>>("rnnkernels::stack_backward_");
    return op;
  }
};

// Raises where a list has not so many tensors, one for each of `places`; `empty`: it may have none, or has to.
enum class Empty { kNever, kMaybe, kAlways };
template <class List>
void check_layers(const List& list, size_t count, const char* name, Empty empty = Empty::kNever,
                  const char* places = "per layer") {
  const size_t expected = empty == Empty::kAlways ? 0 : count;
  TORCH_CHECK_VALUE(list.size() == expected || (empty == Empty::kMaybe && list.empty()), name, ": expected ", expected,
                    " tensors, one ", places, empty == Empty::kMaybe ? " or none" : "", ", got ", list.size());
}

// Raises where a tensor differs from the one that it stands beside.
inline void check_alike(const Tensor& t, const Tensor& like, const char* name, size_t layer) {
  TORCH_CHECK(t.sizes() == like.sizes(), name, " of layer ", layer, ": expected shape ", like.sizes(),
              ", as all layers of a stack have, got ", t.sizes());
  TORCH_CHECK_VALUE(t.scalar_type() == like.scalar_type(), name, " of layer ", layer, ": expected dtype ",
                    like.scalar_type(), ", as all layers of a stack have, got ", t.scalar_type());
  TORCH_CHECK(t.device() == like.device(), name, " of layer ", layer, ": expected device ", like.device(),
              ", as all layers of a stack have, got ", t.device());
}

// The number of layers, once every list has so many tensors.
inline size_t count_layers(const CellInfo& cell, TensorList w_ih, TensorList w_hh, TensorList b_ih, TensorList b_hh,
                           TensorList h0, TensorList c0) {
  const size_t layers = w_hh.size();
  TORCH_CHECK_VALUE(layers > 0, "w_hh: expected at least 1 tensor, one per layer, got none");
  check_layers(w_ih, layers, "w_ih");
  check_layers(b_ih, layers, "b_ih", Empty::kMaybe);
  check_layers(b_hh, layers, "b_hh", Empty::kMaybe);
  check_layers(h0, layers, "h0");
  check_layers(c0, layers, "c0", cell.S > 1 ? Empty::kNever : Empty::kAlways);
  return layers;
}

// That of one layer in a list that may be empty.
inline TensorList layer_of(TensorList list, size_t layer) { return list.empty() ? list : list.slice(layer, 1); }
inline OptionalTensor optional_of(TensorList list, size_t layer) {
  return list.empty() ? std::nullopt : OptionalTensor(list[layer]);
}
inline OptionalTensor optional_of(const OptionalTensors& list, size_t layer) {
  return list.empty() ? std::nullopt : list.get(layer);
}

// What leads from each layer to the next one, contiguous. Place n of a list is between the layers n and n + 1.
struct Links {
  Tensors w_ih, masks;  // the former in backward alone; masks may be an empty list

  Links(TensorList w_ih, TensorList masks) {
    for (const Tensor& t : w_ih) this->w_ih.push_back(t.contiguous());
    for (const Tensor& t : masks) this->masks.push_back(t.contiguous());
  }

  // x of the layer above.
  Tensor above(const Tensor& y, size_t n) const { return masks.empty() ? y : y.mul(masks[n]); }

  // The whole gradient of y of the layer below: what reaches it from outside, if anything, and through the layer above.
  Tensor below(const OptionalTensor& outside, const Tensor& dgates_above, size_t n) const {
    const Tensor dgx = dgates_above.flatten(0, -2).narrow(1, 0, w_ih[n].size(0));  // one direction
    at::DimVector shape(dgates_above.sizes().slice(0, dgates_above.dim() - 2));
    shape.push_back(w_ih[n].size(1));
    Tensor dy = fresh({dgx.size(0), shape.back()}, dgx.options());
    at::mm_out(dy, dgx, w_ih[n]);
    dy = dy.view(shape);
    if (!masks.empty()) dy.mul_(masks[n]);
    return outside ? dy.add_(*outside) : dy;
  }
};

// Runs layers from the first to the last. layer(ForwardArguments&) runs one of them; x is defined for the first alone.
template <class Layer>
std::vector<ForwardResults> run_in_turn(std::vector<ForwardArguments>& layers, const Links& links, Layer&& layer) {
  std::vector<ForwardResults> results;
  results.reserve(layers.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    if (l > 0) layers[l].x = links.above(std::get<0>(results.back()), l - 1);
    results.push_back(layer(layers[l]));
  }
  return results;
}

// Runs layers from the last to the first. layer(BackwardArguments&) runs one of them.
template <class Layer>
std::vector<BackwardResults> run_in_turn(std::vector<BackwardArguments>& layers, const Links& links, Layer&& layer) {
  std::vector<BackwardResults> results(layers.size());
  for (size_t l = layers.size(); l-- > 0;) {
    results[l] = layer(layers[l]);
    layers[l].dy.reset();  // its memory may serve the next
    if (l > 0) layers[l - 1].dy = links.below(layers[l - 1].dy, std::get<0>(results[l]), l - 1);
  }
  return results;
}

inline void check_masks(TensorList masks, size_t layers, at::IntArrayRef shape, const Tensor& like) {
  check_layers(masks, layers - 1, "masks", Empty::kMaybe, "between any two layers");
  for (const Tensor& mask : masks) {
    TORCH_CHECK(mask.sizes() == shape, "masks: expected shape ", shape, ", that of y, got ", mask.sizes());
    TORCH_CHECK_VALUE(mask.scalar_type() == like.scalar_type(), "masks: expected dtype ", like.scalar_type(),
                      " like the input, got ", mask.scalar_type());
    TORCH_CHECK(mask.device() == like.device(), "masks: expected device ", like.device(), " like the input, got ",
                mask.device());
  }
}

template <std::vector<ForwardResults> (*forward)(std::vector<ForwardArguments>&, const Links&)>
StackForwardResults run_stack_forward(c10::string_view cell, const Tensor& x, TensorList w_ih, TensorList w_hh,
                                      const OptionalList& biases_ih, const OptionalList& biases_hh, TensorList h0,
                                      const OptionalList& initial_c, const OptionalList& factors,
                                      const OptionalTensor& lengths, const OptionalTensor& starts,
                                      const OptionalTensor& reset, bool save, bool all_c, int64_t, c10::string_view,
                                      double) {
  const TensorList b_ih = list_of(biases_ih), b_hh = list_of(biases_hh), c0 = list_of(initial_c),
                   masks = list_of(factors);
  const at::AutoDispatchBelowADInplaceOrView below;  // what autograd is to know, the node of the stack has told it
  const CellInfo& info = find_cell(cell);
  TORCH_CHECK(!batch_invariant(),
              "rnnkernels.batch_invariant: the products of a stack depend on the size of the batch. Run its layers one "
              "by one, or switch it off.");
  const size_t L = count_layers(info, w_ih, w_hh, b_ih, b_hh, h0, c0);
  TORCH_CHECK(x.dim() == (starts ? 2 : 3), "input: expected ",
              starts ? "2 dimensions (packed steps, features)" : "3 dimensions (time, batch, features)", ", got shape ",
              x.sizes());
  TORCH_CHECK(h0[0].dim() == 3, "hx: expected 3 dimensions (1, batch, hidden), got shape ", h0[0].sizes());
  at::DimVector shape(x.sizes());
  shape.back() = h0[0].size(2);
  check_masks(masks, L, shape, x);
  std::vector<ForwardArguments> layers;
  layers.reserve(L);
  for (size_t l = 0; l < L; ++l) {
    check_alike(h0[l], h0[0], "hx", l);
    layers.push_back({info,
                      l == 0 ? x : Tensor(),
                      w_ih.slice(l, 1),
                      w_hh.slice(l, 1),
                      layer_of(b_ih, l),
                      layer_of(b_hh, l),
                      TensorList(),
                      h0[l],
                      optional_of(c0, l),
                      {lengths, starts, reset},
                      save,
                      all_c,
                      int64_t(l)});
  }
  StackForwardResults results;
  auto& [ys, h_ns, c_ns, cs, saveds] = results;
  for (auto& [y, h_n, c_n, c, h_raw, saved] : forward(layers, Links({}, masks))) {
    ys.push_back(std::move(y));
    h_ns.push_back(std::move(h_n));
    if (info.S > 1) c_ns.push_back(std::move(c_n));
    if (info.S > 1 && (save || all_c)) cs.push_back(std::move(c));
    if (info.K > 0 && save) saveds.push_back(std::move(saved));
  }
  return results;
}

template <class Results, class Saved,
          std::vector<BackwardResults> (*backward)(std::vector<BackwardArguments>&, const Links&)>
Results run_stack_backward(c10::string_view cell, const OptionalTensors& dy, const OptionalTensors& dh_n,
                           const OptionalTensors& dc_n, const OptionalTensors& dc, const OptionalList& weights_ih,
                           TensorList w_hh, TensorList h0, const OptionalList& initial_c, const OptionalList& factors,
                           TensorList y, const OptionalList& all_c, Saved kept, const OptionalTensor& lengths,
                           const OptionalTensor& starts, const OptionalTensor& reset, int64_t window,
                           c10::string_view clip, double bound, bool initial) {
  const TensorList w_ih = list_of(weights_ih), c0 = list_of(initial_c), masks = list_of(factors), c = list_of(all_c),
                   saved = list_of(kept);
  constexpr bool over_saved = std::is_same_v<Results, StackBackwardOverSavedResults>;
  const at::AutoDispatchBelowADInplaceOrView below;
  const CellInfo& info = find_cell(cell);
  const Empty no_c = info.S > 1 ? Empty::kNever : Empty::kAlways;
  const size_t L = w_hh.size();
  TORCH_CHECK_VALUE(L > 0, "w_hh: expected at least 1 tensor, one per layer, got none");
  check_layers(w_ih, L - 1, "w_ih", Empty::kNever, "per layer but the first");
  for (const auto& [list, name] : {std::pair(&dy, "dy"), {&dh_n, "dh_n"}, {&dc_n, "dc_n"}, {&dc, "dc"}})
    check_layers(*list, L, name, Empty::kMaybe);
  check_layers(h0, L, "h0");
  check_layers(c0, L, "c0", no_c);
  check_layers(y, L, "y");
  check_layers(c, L, "c", no_c);
  check_layers(saved, L, "saved", info.K > 0 ? Empty::kNever : Empty::kAlways);
  check_masks(masks, L, y[0].sizes(), y[0]);

  const Tensor nothing = at::empty({0}, y[0].options());
  std::vector<BackwardArguments> layers;
  layers.reserve(L);
  for (size_t l = 0; l < L; ++l) {
    check_alike(y[l], y[0], "y", l);
    if (l > 0) check_alike(w_ih[l - 1], w_hh[l], "w_ih", l);  // all layers have one H
    const OptionalTensor outside = optional_of(dy, l);
    if (outside) check_alike(*outside, y[l], "dy", l);
    layers.push_back({info,
                      outside,
                      optional_of(dh_n, l),
                      optional_of(dc_n, l),
                      optional_of(dc, l),
                      w_hh.slice(l, 1),
                      TensorList(),
                      h0[l],
                      optional_of(c0, l),
                      y[l],
                      c.empty() ? nothing : c[l],
                      saved.empty() ? nothing : saved[l],
                      {lengths, starts, reset},
                      window,
                      find_clip(clip, bound),
                      false,
                      initial,
                      false,
                      over_saved});
  }
  Tensors dgates, dh0, dc0;
  for (auto& [of_gates, of_h0, of_c0, dproj, flow] : backward(layers, Links(w_ih, masks))) {
    dgates.push_back(std::move(of_gates));
    if (initial) dh0.push_back(std::move(of_h0));
    if (initial && info.S > 1) dc0.push_back(std::move(of_c0));
  }
  if constexpr (over_saved) {
    return {std::move(dh0), std::move(dc0)};
  } else {
    return {std::move(dgates), std::move(dh0), std::move(dc0)};
  }
}

// Registers a backend's way to run a stack in its TORCH_LIBRARY_IMPL block. The arguments are those of each layer, from
// the first on, and nothing but the lists' lengths and what has to agree between layers is checked. forward sets the x
// of all layers but the first; backward adds what comes through the layer above to the dy of each.
template <std::vector<ForwardResults> (*forward)(std::vector<ForwardArguments>&, const Links&),
          std::vector<BackwardResults> (*backward)(std::vector<BackwardArguments>&, const Links&)>
void register_stack_ops(torch::Library& library) {
  library.impl("stack_forward", run_stack_forward<forward>);
  library.impl("stack_backward", run_stack_backward<StackBackwardResults, const OptionalList&, backward>);
  library.impl("stack_backward_", run_stack_backward<StackBackwardOverSavedResults, TensorList, backward>);
}

}  // namespace rnn
