// The two ops: their schemas, and how a backend implements and registers them.
#pragma once

#include <torch/library.h>

#include "common/arguments.h"

namespace rnn {

using ForwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Shapes: layout.h. Lists hold one tensor per direction; biases and w_hr are empty lists where there are none.
// `save` keeps what backward needs, `all_c` keeps all c, `flow` the norm of the gradient of every h; an output that is
// not kept is an empty tensor. `window` (0: none), `clip` and `bound` (layout.h, clip.h) say how backward goes; forward
// takes them for its backward alone.
inline void define_sequence_ops(torch::Library& library) {
  library.def(
      "sequence_forward(str cell, Tensor x, Tensor[] w_ih, Tensor[] w_hh, Tensor[] b_ih, Tensor[] b_hh, "
      "Tensor[] w_hr, Tensor h0, Tensor? c0, Tensor? lengths, Tensor? reset, bool save, bool all_c, int layer, "
      "int window, str clip, float bound) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor c, Tensor h_raw, Tensor saved)");
  library.def(
      "sequence_backward(str cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor[] w_hh, Tensor[] w_hr, "
      "Tensor h0, Tensor? c0, Tensor y, Tensor c, Tensor saved, Tensor? lengths, Tensor? reset, int window, "
      "str clip, float bound, bool flow) -> (Tensor dgates, Tensor dh0, Tensor dc0, Tensor dproj, "
      "Tensor flow)");
}

// Registers a backend's forward(ForwardArguments&) and backward(BackwardArguments&) in its TORCH_LIBRARY_IMPL block.
template <ForwardResults (*forward)(ForwardArguments&), BackwardResults (*backward)(BackwardArguments&)>
void register_sequence_ops(torch::Library& library) {
  library.impl("sequence_forward", [](c10::string_view cell, const Tensor& x, TensorList w_ih, TensorList w_hh,
                                      TensorList b_ih, TensorList b_hh, TensorList w_hr, const Tensor& h0,
                                      const OptionalTensor& c0, const OptionalTensor& lengths,
                                      const OptionalTensor& reset, bool save, bool all_c, int64_t layer, int64_t,
                                      c10::string_view, double) {
    ForwardArguments a{find_cell(cell), x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths, reset, save, all_c, layer};
    return forward(a);
  });
  library.impl(
      "sequence_backward",
      [](c10::string_view cell, const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
         const OptionalTensor& dc, TensorList w_hh, TensorList w_hr, const Tensor& h0, const OptionalTensor& c0,
         const Tensor& y, const Tensor& c, const Tensor& saved, const OptionalTensor& lengths,
         const OptionalTensor& reset, int64_t window, c10::string_view clip, double bound, bool flow) {
        BackwardArguments a{
            find_cell(cell),        dy,  dh_n, dc_n, dc, w_hh, w_hr, h0, c0, y, c, saved, lengths, reset, window,
            find_clip(clip, bound), flow};
        return backward(a);
      });
}

}  // namespace rnn
