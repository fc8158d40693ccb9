// The ops: their schemas, how a backend implements and registers them, and how C++ calls them.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "common/arguments.h"

namespace rnn {

using ForwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardOverSavedResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Shapes: layout.h. Lists hold one tensor per direction; where there are no biases or no w_hr there is no list:
// compilers ahead of time hand on an empty one as if it were missing. `save` keeps what backward needs, as is done
// without being asked for where a gradient is; `all_c` keeps all c, `flow` the norm of the gradient of every h,
// `initial` the gradients of h0 and c0; an output that is not kept is an empty tensor. `window` (0: none), `clip` and
// `bound` (layout.h, clip.h) say how backward goes; forward takes them for its backward alone. `sequence_backward_`
// writes dgates over `saved`, where a cell's K is G + A.
inline void define_sequence_ops(torch::Library& library) {
  library.def(
      "sequence_forward(str cell, Tensor x, Tensor[] w_ih, Tensor[] w_hh, Tensor[]? b_ih, Tensor[]? b_hh, "
      "Tensor[]? w_hr, Tensor h0, Tensor? c0, Tensor? lengths, Tensor? starts, Tensor? reset, bool save, bool all_c, "
      "int layer, int window, str clip, float bound) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor c, Tensor h_raw, Tensor saved)");
  library.def(
      "sequence_backward(str cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor[] w_hh, Tensor[]? w_hr, "
      "Tensor h0, Tensor? c0, Tensor y, Tensor c, Tensor saved, Tensor? lengths, Tensor? starts, Tensor? reset, "
      "int window, str clip, float bound, bool flow, bool initial, bool invariant) "
      "-> (Tensor dgates, Tensor dh0, Tensor dc0, Tensor dproj, Tensor flow)");
  library.def(
      "sequence_backward_(str cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor[] w_hh, "
      "Tensor[]? w_hr, Tensor h0, Tensor? c0, Tensor y, Tensor c, Tensor(a!) saved, Tensor? lengths, Tensor? starts, "
      "Tensor? reset, int window, str clip, float bound, bool flow, bool initial, bool invariant) "
      "-> (Tensor dh0, Tensor dc0, Tensor dproj, Tensor flow)");
}

// dx [T, B, I] of dgates [T, B, D, (G+A)*H], packed or not, each row by itself, whatever the batch.
inline void define_input_gradient_op(torch::Library& library) {
  library.def("input_gradient(Tensor dgates, Tensor[] w_ih) -> Tensor dx");
}

// The gradients of sequence_forward's inputs as differentiable functions of these and of the gradients of its results,
// written in Python: those at the positions `wanted` of x, h0, c0 and all weights; and, with `flow`, what
// sequence_backward calls so.
inline void define_differentiable_op(torch::Library& library) {
  library.def(
      "sequence_gradients(str cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor x, Tensor[] w_ih, "
      "Tensor[] w_hh, Tensor[]? b_ih, Tensor[]? b_hh, Tensor[]? w_hr, Tensor h0, Tensor? c0, Tensor? lengths, "
      "Tensor? starts, Tensor? reset, int window, str clip, float bound, int[] wanted, bool flow) "
      "-> (Tensor[] gradients, Tensor flow)");
}

// A list that may be missing; inside, a missing one is an empty one.
using OptionalList = std::optional<TensorList>;
inline OptionalList given(TensorList list) { return list.empty() ? std::nullopt : OptionalList(list); }
inline TensorList list_of(const OptionalList& list) { return list.value_or(TensorList()); }

using ForwardSchema = ForwardResults(c10::string_view, const Tensor&, TensorList, TensorList, const OptionalList&,
                                     const OptionalList&, const OptionalList&, const Tensor&, const OptionalTensor&,
                                     const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, bool, bool,
                                     int64_t, int64_t, c10::string_view, double);
template <class Results>
using BackwardSchema = Results(c10::string_view, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                               const OptionalTensor&, TensorList, const OptionalList&, const Tensor&,
                               const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                               const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, int64_t,
                               c10::string_view, double, bool, bool, bool);
using GradientsSchema = std::tuple<std::vector<Tensor>, Tensor>(
    c10::string_view, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const Tensor&, TensorList, TensorList, const OptionalList&, const OptionalList&, const OptionalList&, const Tensor&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, int64_t,
    c10::string_view, double, at::IntArrayRef, bool);

template <class Schema>
c10::TypedOperatorHandle<Schema> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}
// The ops that run a layer. There are two libraries of them: of kernels that this project compiles, and of those that
// Triton compiles on the user's machine.
enum class Library { kCompiled, kTriton };
template <Library library>
struct SequenceOps {
  static std::string name(const char* op) {
    return std::string(library == Library::kTriton ? "rnnkernels_triton::" : "rnnkernels::") + op;
  }
  static const auto& forward() {
    static const auto op = find_op<ForwardSchema>(name("sequence_forward").c_str());
    return op;
  }
  static const auto& backward() {
    static const auto op = find_op<BackwardSchema<BackwardResults>>(name("sequence_backward").c_str());
    return op;
  }
  static const auto& backward_over_saved() {
    static const auto op = find_op<BackwardSchema<BackwardOverSavedResults>>(name("sequence_backward_").c_str());
    return op;
  }
};
// f(ops) for the library that is known at run time.
template <class F>
auto with_ops(Library library, F&& f) {
  return library == Library::kTriton ? f(SequenceOps<Library::kTriton>()) : f(SequenceOps<Library::kCompiled>());
}
inline const auto& input_gradient_op() {
  static const auto op = find_op<Tensor(const Tensor&, TensorList)>("rnnkernels::input_gradient");
  return op;
}
inline const auto& gradients_op() {
  static const auto op = find_op<GradientsSchema>("rnnkernels::sequence_gradients");
  return op;
}

template <class Results, BackwardResults (*backward)(BackwardArguments&)>
Results run_backward(c10::string_view cell, const OptionalTensor& dy, const OptionalTensor& dh_n,
                     const OptionalTensor& dc_n, const OptionalTensor& dc, TensorList w_hh, const OptionalList& w_hr,
                     const Tensor& h0, const OptionalTensor& c0, const Tensor& y, const Tensor& c, const Tensor& saved,
                     const OptionalTensor& lengths, const OptionalTensor& starts, const OptionalTensor& reset,
                     int64_t window, c10::string_view clip, double bound, bool flow, bool initial, bool invariant) {
  constexpr bool over_saved = std::is_same_v<Results, BackwardOverSavedResults>;
  BackwardArguments a{find_cell(cell),
                      dy,
                      dh_n,
                      dc_n,
                      dc,
                      w_hh,
                      list_of(w_hr),
                      h0,
                      c0,
                      y,
                      c,
                      saved,
                      {lengths, starts, reset},
                      window,
                      find_clip(clip, bound),
                      flow,
                      initial,
                      invariant,
                      over_saved};
  BackwardResults results = backward(a);
  if constexpr (over_saved) {
    auto [dgates, dh0, dc0, dproj, norms] = std::move(results);
    return {dh0, dc0, dproj, norms};
  } else {
    return results;
  }
}

// Registers a backend's forward(ForwardArguments&) and backward(BackwardArguments&) in its TORCH_LIBRARY_IMPL block.
template <ForwardResults (*forward)(ForwardArguments&), BackwardResults (*backward)(BackwardArguments&)>
void register_sequence_ops(torch::Library& library) {
  library.impl("sequence_forward", [](c10::string_view cell, const Tensor& x, TensorList w_ih, TensorList w_hh,
                                      const OptionalList& b_ih, const OptionalList& b_hh, const OptionalList& w_hr,
                                      const Tensor& h0, const OptionalTensor& c0, const OptionalTensor& lengths,
                                      const OptionalTensor& starts, const OptionalTensor& reset, bool save, bool all_c,
                                      int64_t layer, int64_t, c10::string_view, double) {
    ForwardArguments a{find_cell(cell),          x,    w_ih,  w_hh, list_of(b_ih), list_of(b_hh), list_of(w_hr), h0, c0,
                       {lengths, starts, reset}, save, all_c, layer};
    return forward(a);
  });
  library.impl("sequence_backward", run_backward<BackwardResults, backward>);
  library.impl("sequence_backward_", run_backward<BackwardOverSavedResults, backward>);
}

}  // namespace rnn
