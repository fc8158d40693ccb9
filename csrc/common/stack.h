// A stack of layers of one direction as one op: the schemas, how a backend implements and registers it, and the layers
// one after the other, for whatever cannot run them at once.
#pragma once

#include "common/ops.h"

namespace rnn {

// Lists hold one tensor per layer; shapes: layout.h with D = 1, every layer of the same H. Options: as of the sequence
// ops. A list is empty where there is no bias or no c, and where its tensors are not kept or not asked for.
// In backward, dy are the gradients that reach the y of each layer from outside of the stack: what reaches them through
// the layer above, the op adds itself. An empty list is one of None. w_ih are those of all layers but the first.
// `stack_backward_` writes dgates over `saved`, where a cell's K is G + A.
inline void define_stack_ops(torch::Library& library) {
  library.def(
      "stack_forward(str cell, Tensor x, Tensor[] w_ih, Tensor[] w_hh, Tensor[] b_ih, Tensor[] b_hh, Tensor[] h0, "
      "Tensor[] c0, Tensor? lengths, Tensor? reset, bool save, bool all_c, int window, str clip, float bound) "
      "-> (Tensor[] y, Tensor[] h_n, Tensor[] c_n, Tensor[] c, Tensor[] saved)");
  library.def(
      "stack_backward(str cell, Tensor?[] dy, Tensor?[] dh_n, Tensor?[] dc_n, Tensor?[] dc, Tensor[] w_ih, "
      "Tensor[] w_hh, Tensor[] h0, Tensor[] c0, Tensor[] y, Tensor[] c, Tensor[] saved, Tensor? lengths, "
      "Tensor? reset, int window, str clip, float bound, bool initial) "
      "-> (Tensor[] dgates, Tensor[] dh0, Tensor[] dc0)");
  library.def(
      "stack_backward_(str cell, Tensor?[] dy, Tensor?[] dh_n, Tensor?[] dc_n, Tensor?[] dc, Tensor[] w_ih, "
      "Tensor[] w_hh, Tensor[] h0, Tensor[] c0, Tensor[] y, Tensor[] c, Tensor(a!)[] saved, Tensor? lengths, "
      "Tensor? reset, int window, str clip, float bound, bool initial) -> (Tensor[] dh0, Tensor[] dc0)");
}

using Tensors = std::vector<Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;
using StackForwardResults = std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors>;
using StackBackwardResults = std::tuple<Tensors, Tensors, Tensors>;
using StackBackwardOverSavedResults = std::tuple<Tensors, Tensors>;

using StackForwardSchema = StackForwardResults(c10::string_view, const Tensor&, TensorList, TensorList, TensorList,
                                               TensorList, TensorList, TensorList, const OptionalTensor&,
                                               const OptionalTensor&, bool, bool, int64_t, c10::string_view, double);
template <class Results>
using StackBackwardSchema = Results(c10::string_view, const OptionalTensors&, const OptionalTensors&,
                                    const OptionalTensors&, const OptionalTensors&, TensorList, TensorList, TensorList,
                                    TensorList, TensorList, TensorList, TensorList, const OptionalTensor&,
                                    const OptionalTensor&, int64_t, c10::string_view, double, bool);

struct StackOps {
  static const auto& forward() {
    static const auto op = find_op<StackForwardSchema>("rnnkernels::stack_forward");
    return op;
  }
  static const auto& backward() {
    static const auto op = find_op<StackBackwardSchema<StackBackwardResults>>("rnnkernels::stack_backward");
    return op;
  }
  static const auto& backward_over_saved() {
    static const auto op = find_op<StackBackwardSchema<StackBackwardOverSavedResults>>("rnnkernels::stack_backward_");
    return op;
  }
};

// Raises where a list has not one tensor per layer; `empty`: it may have none, or has to.
enum class Empty { kNever, kMaybe, kAlways };
template <class List>
void check_layers(const List& list, size_t layers, const char* name, Empty empty = Empty::kNever) {
  const size_t expected = empty == Empty::kAlways ? 0 : layers;
  TORCH_CHECK_VALUE(list.size() == expected || (empty == Empty::kMaybe && list.empty()), name, ": expected ", expected,
                    " tensors, one per layer", empty == Empty::kMaybe ? " or none" : "", ", got ", list.size());
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

// Runs layers from the first to the last. layer(ForwardArguments&) runs one of them; x is defined for the first alone.
template <class Layer>
std::vector<ForwardResults> run_in_turn(std::vector<ForwardArguments>& layers, Layer&& layer) {
  std::vector<ForwardResults> results;
  results.reserve(layers.size());
  for (ForwardArguments& a : layers) {
    if (!results.empty()) a.x = std::get<0>(results.back());
    results.push_back(layer(a));
  }
  return results;
}

// The whole gradient of a layer's y: what reaches it from outside, if anything, and through the layer above.
inline Tensor add_from_above(const OptionalTensor& outside, const Tensor& dgates_above, const Tensor& w_ih_above) {
  const int64_t T = dgates_above.size(0), B = dgates_above.size(1);
  const Tensor dgx = dgates_above.view({T * B, dgates_above.size(3)}).narrow(1, 0, w_ih_above.size(0));
  Tensor dy = fresh({T * B, w_ih_above.size(1)}, dgx.options());
  at::mm_out(dy, dgx, w_ih_above);
  dy = dy.view({T, B, w_ih_above.size(1)});
  return outside ? dy.add_(*outside) : dy;
}

// Runs layers from the last to the first. layer(BackwardArguments&) runs one of them; w_ih: of all but the first.
template <class Layer>
std::vector<BackwardResults> run_in_turn(std::vector<BackwardArguments>& layers, TensorList w_ih, Layer&& layer) {
  std::vector<BackwardResults> results(layers.size());
  for (size_t l = layers.size(); l-- > 0;) {
    results[l] = layer(layers[l]);
    layers[l].dy.reset();  // its memory may serve the next
    if (l == 0) break;
    OptionalTensor& dy = layers[l - 1].dy;
    dy = add_from_above(dy, std::get<0>(results[l]), w_ih[l - 1]);
  }
  return results;
}

template <std::vector<ForwardResults> (*forward)(std::vector<ForwardArguments>&)>
StackForwardResults run_stack_forward(c10::string_view cell, const Tensor& x, TensorList w_ih, TensorList w_hh,
                                      TensorList b_ih, TensorList b_hh, TensorList h0, TensorList c0,
                                      const OptionalTensor& lengths, const OptionalTensor& reset, bool save, bool all_c,
                                      int64_t, c10::string_view, double) {
  const at::AutoDispatchBelowADInplaceOrView below;  // what autograd is to know, the node of the stack has told it
  const CellInfo& info = find_cell(cell);
  TORCH_CHECK(!batch_invariant(),
              "rnnkernels.batch_invariant: the products of a stack depend on the size of the batch. Run its layers one "
              "by one, or switch it off.");
  const size_t L = count_layers(info, w_ih, w_hh, b_ih, b_hh, h0, c0);
  std::vector<ForwardArguments> layers;
  layers.reserve(L);
  for (size_t l = 0; l < L; ++l) {
    check_alike(h0[l], h0[0], "hx", l);
    layers.push_back({info, l == 0 ? x : Tensor(), w_ih.slice(l, 1), w_hh.slice(l, 1), layer_of(b_ih, l),
                      layer_of(b_hh, l), TensorList(), h0[l], optional_of(c0, l), lengths, reset, save, all_c,
                      int64_t(l)});
  }
  StackForwardResults results;
  auto& [ys, h_ns, c_ns, cs, saveds] = results;
  for (auto& [y, h_n, c_n, c, h_raw, saved] : forward(layers)) {
    ys.push_back(std::move(y));
    h_ns.push_back(std::move(h_n));
    if (info.S > 1) c_ns.push_back(std::move(c_n));
    if (info.S > 1 && (save || all_c)) cs.push_back(std::move(c));
    if (info.K > 0 && save) saveds.push_back(std::move(saved));
  }
  return results;
}

template <class Results, std::vector<BackwardResults> (*backward)(std::vector<BackwardArguments>&, TensorList)>
Results run_stack_backward(c10::string_view cell, const OptionalTensors& dy, const OptionalTensors& dh_n,
                           const OptionalTensors& dc_n, const OptionalTensors& dc, TensorList w_ih, TensorList w_hh,
                           TensorList h0, TensorList c0, TensorList y, TensorList c, TensorList saved,
                           const OptionalTensor& lengths, const OptionalTensor& reset, int64_t window,
                           c10::string_view clip, double bound, bool initial) {
  constexpr bool over_saved = std::is_same_v<Results, StackBackwardOverSavedResults>;
  const at::AutoDispatchBelowADInplaceOrView below;
  const CellInfo& info = find_cell(cell);
  const Empty no_c = info.S > 1 ? Empty::kNever : Empty::kAlways;
  const size_t L = w_hh.size();
  TORCH_CHECK_VALUE(L > 0, "w_hh: expected at least 1 tensor, one per layer, got none");
  check_layers(w_ih, L - 1, "w_ih");
  for (const auto& [list, name] : {std::pair(&dy, "dy"), {&dh_n, "dh_n"}, {&dc_n, "dc_n"}, {&dc, "dc"}})
    check_layers(*list, L, name, Empty::kMaybe);
  check_layers(h0, L, "h0");
  check_layers(c0, L, "c0", no_c);
  check_layers(y, L, "y");
  check_layers(c, L, "c", no_c);
  check_layers(saved, L, "saved", info.K > 0 ? Empty::kNever : Empty::kAlways);

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
                      lengths,
                      reset,
                      window,
                      find_clip(clip, bound),
                      false,
                      initial,
                      false,
                      over_saved});
  }
  Tensors dgates, dh0, dc0;
  for (auto& [of_gates, of_h0, of_c0, dproj, flow] : backward(layers, w_ih)) {
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
// the first on, and nothing but the lists' lengths and what has to agree between layers is checked. forward sets x of
// all layers but the first to the y below it; backward takes the W_ih of all layers but the first, and adds what goes
// through them to dy.
template <std::vector<ForwardResults> (*forward)(std::vector<ForwardArguments>&),
          std::vector<BackwardResults> (*backward)(std::vector<BackwardArguments>&, TensorList)>
void register_stack_ops(torch::Library& library) {
  library.impl("stack_forward", run_stack_forward<forward>);
  library.impl("stack_backward", run_stack_backward<StackBackwardResults, backward>);
  library.impl("stack_backward_", run_stack_backward<StackBackwardOverSavedResults, backward>);
}

}  // namespace rnn
