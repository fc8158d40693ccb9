// What the ops take and return. A new option is a member here and a line in the list beside it; schemas, registrations,
// calls, Python's fake kernels and the autograd node follow.
//
//   rnnkernels::sequence_forward     all layers and directions of a module over a sequence; projects the input itself
//   rnnkernels::sequence_backward    the loops over time backwards: the gradients of the gates' pre-activations
//   rnnkernels::sequence_backward_   the same, which writes them over what forward saved
//   rnnkernels::sequence_gradients   all gradients of a call: sequence_backward and the products behind it
//   rnnkernels::window_gradients     forward again and all gradients of that, those of weights added up: for recompute
//   rnnkernels::input_gradient       dx from the gradients of the gates, each row by itself
//   rnnkernels::rows_product, steps_product   the products of any matrices as those behind the loops are computed
//   rnnkernels::forward_tangents, backward_record, backward_tangents   of one layer: tangent_calls.h
//
// Shapes: common/layout.h, with the layers in front:
//
//   x [T, B, I]        y [T, B, D*R], or [T, B, R] where directions are merged otherwise than side by side
//   h0, h_n [L*D, B, R]                c0, c_n [L*D, B, C*H]
//   ys [L or L-1, T, B, D*R]: y of each layer before its directions are merged; of the last one only where that
//                             differs from y
//   c [L, T, B, D, C*H]                h_raw [L, T, B, D, H]
//   saved [L, T, B, D, K*H]            dgates [L, T, B, D, X*H]
//
// An output that is not kept or not asked for is an empty tensor.
#pragma once

#include <torch/library.h>

#include <array>

#include "ops/fields.h"

namespace rnn {

// What is neither a tensor nor of one pass alone. Names are those of static tables: a Settings may outlive its call.
struct Settings {
  c10::string_view cell;
  int64_t layers = 1, directions = 1;
  int64_t heads = 1;       // of each direction, with states and recurrent weights of their own: layout.h
  bool projected = false;  // each layer and direction has a w_hr
  c10::string_view merge_mode = "concat";  // how both directions become one output
  int64_t window = 0;                      // steps after which no gradient flows on (truncated BPTT); 0: none
  c10::string_view clip = "none";          // how backward bounds the gradients of the gates: clip.h
  double bound = 1;

  static constexpr auto fields() {
    return std::tuple(Field{"cell", &Settings::cell}, Field{"layers", &Settings::layers},
                      Field{"directions", &Settings::directions}, Field{"heads", &Settings::heads},
                      Field{"projected", &Settings::projected}, Field{"merge_mode", &Settings::merge_mode},
                      Field{"window", &Settings::window}, Field{"clip", &Settings::clip},
                      Field{"bound", &Settings::bound});
  }
};

struct Model {
  TensorList weights;  // as weights.h has them: torch's order, for each layer and direction
  Tensor h0;
  OptionalTensor c0;   // where the cell has states beside h
  OptionalList masks;  // factors of y on its way to the next layer (dropout), one between any two layers: of y's shape,
                       // or [1, B, ...] for all steps
  OptionalTensor h_mask;  // [L*D, B, R]: factors of the h that W_hh is multiplied by, and of nothing else, at all steps

  static constexpr auto fields() {
    return std::tuple(Field{"weights", &Model::weights}, Field{"h0", &Model::h0}, Field{"c0", &Model::c0},
                      Field{"masks", &Model::masks}, Field{"h_mask", &Model::h_mask});
  }
};

// Which steps each row has, and where its state is reset: see Sequence in layout.h. The noise of a cell that has any:
// probabilities [E] float64, and by what it is drawn, [B, 5] int64, where it is: noise.h.
struct Steps {
  OptionalTensor lengths, starts, reset, noise, draws;

  static constexpr auto fields() {
    return std::tuple(Field{"lengths", &Steps::lengths}, Field{"starts", &Steps::starts}, Field{"reset", &Steps::reset},
                      Field{"noise", &Steps::noise}, Field{"draws", &Steps::draws});
  }
};

inline constexpr std::array kOfSteps{&Steps::lengths, &Steps::starts, &Steps::reset, &Steps::noise, &Steps::draws};

// Missing where nothing depends on an output.
struct OutputGradients {
  OptionalTensor dy, dh_n, dc_n, dys, dc;

  static constexpr auto fields() {
    return std::tuple(Field{"dy", &OutputGradients::dy}, Field{"dh_n", &OutputGradients::dh_n},
                      Field{"dc_n", &OutputGradients::dc_n}, Field{"dys", &OutputGradients::dys},
                      Field{"dc", &OutputGradients::dc});
  }
};

struct ForwardCall : Settings, Model, Steps {
  Tensor x;
  OptionalTensor flow;      // [L, T, B, D], which backward fills with the norms of the gradients of all h
  bool save = false;        // keep what backward needs, as is done without being asked for where a gradient is
  bool all_states = false;  // keep ys and c
  bool step = false;        // a cell's one step: parameters have its names in errors

  static constexpr auto fields() {
    return std::tuple_cat(Settings::fields(), std::tuple(Field{"x", &ForwardCall::x}), Model::fields(), Steps::fields(),
                          std::tuple(Field{"flow", &ForwardCall::flow}, Field{"save", &ForwardCall::save},
                                     Field{"all_states", &ForwardCall::all_states}, Field{"step", &ForwardCall::step}));
  }
};
struct ForwardOutputs {
  Tensor y, h_n, c_n, ys, c, h_raw, saved;

  static constexpr auto fields() {
    return std::tuple(Field{"y", &ForwardOutputs::y}, Field{"h_n", &ForwardOutputs::h_n},
                      Field{"c_n", &ForwardOutputs::c_n}, Field{"ys", &ForwardOutputs::ys},
                      Field{"c", &ForwardOutputs::c}, Field{"h_raw", &ForwardOutputs::h_raw},
                      Field{"saved", &ForwardOutputs::saved});
  }
};

struct BackwardCall : Settings, OutputGradients, Model, Steps {
  Tensor y, ys, c, saved;   // what forward returned
  bool record = false;      // the norms of the gradients of all h
  bool initial = true;      // compute the gradients of h0 and c0
  bool invariant = false;   // of the batch
  bool over_saved = false;  // no field of the op: which of the two it is

  static constexpr auto fields() {
    return std::tuple_cat(Settings::fields(), OutputGradients::fields(), Model::fields(),
                          std::tuple(Field{"y", &BackwardCall::y}, Field{"ys", &BackwardCall::ys},
                                     Field{"c", &BackwardCall::c}, Field{"saved", &BackwardCall::saved}),
                          Steps::fields(),
                          std::tuple(Field{"record", &BackwardCall::record}, Field{"initial", &BackwardCall::initial},
                                     Field{"invariant", &BackwardCall::invariant}));
  }
};
struct BackwardOutputs {
  Tensor dgates, dh0, dc0;
  Tensor dproj;  // [L, T, B, D, R]: the gradient of the projected h, for dW_hr
  Tensor flow;   // [L, T, B, D]
  Tensor
      dunit;  // [L, W*B, D, P*H]: what each row, or each of its windows, adds to the gradients of the cell's parameters

  static constexpr auto fields() {
    return std::tuple(Field{"dgates", &BackwardOutputs::dgates}, Field{"dh0", &BackwardOutputs::dh0},
                      Field{"dc0", &BackwardOutputs::dc0}, Field{"dproj", &BackwardOutputs::dproj},
                      Field{"flow", &BackwardOutputs::flow}, Field{"dunit", &BackwardOutputs::dunit});
  }
};

// The gradients at the positions `wanted` among x, h0, c0 and the weights. It takes the place of sequence_backward
// where transforms, graphs or a further derivative are to see one function.
struct GradientsCall : Settings, OutputGradients, Model, Steps {
  Tensor x;
  Tensor y, ys, c, h_raw, saved;  // what forward returned, or empty: constants to a further derivative
  at::IntArrayRef wanted;
  bool record = false;
  bool invariant = false;
  // n > 0: each row of the batch stands for n neighbours (torch.vmap), [B*n], and the gradient of a weight is one for
  // each of them, [n, ...].
  int64_t lanes = 0;

  static constexpr auto fields() {
    return std::tuple_cat(
        Settings::fields(), OutputGradients::fields(), std::tuple(Field{"x", &GradientsCall::x}), Model::fields(),
        std::tuple(Field{"y", &GradientsCall::y}, Field{"ys", &GradientsCall::ys}, Field{"c", &GradientsCall::c},
                   Field{"h_raw", &GradientsCall::h_raw}, Field{"saved", &GradientsCall::saved}),
        Steps::fields(),
        std::tuple(Field{"wanted", &GradientsCall::wanted}, Field{"record", &GradientsCall::record},
                   Field{"invariant", &GradientsCall::invariant}, Field{"lanes", &GradientsCall::lanes}));
  }
};
struct GradientsOutputs {
  std::vector<Tensor> gradients;
  Tensor flow;

  static constexpr auto fields() {
    return std::tuple(Field{"gradients", &GradientsOutputs::gradients}, Field{"flow", &GradientsOutputs::flow});
  }
};

// A window that has been run before, from the states that enter it: the gradients at the positions `wanted` among x, h0
// and c0, and what is added to `sums`, which stand for all that follow there, weights. The norms are a result; `flow`
// only asks for them.
struct WindowCall : ForwardCall, OutputGradients {
  at::IntArrayRef wanted;
  TensorList sums;  // of the weights' type, or of a wider one
  bool invariant = false;

  static constexpr auto fields() {
    return std::tuple_cat(ForwardCall::fields(), OutputGradients::fields(),
                          std::tuple(Field{"wanted", &WindowCall::wanted}, Field{"sums", &WindowCall::sums},
                                     Field{"invariant", &WindowCall::invariant}));
  }
};

using ForwardOp = Op<ForwardCall, ForwardOutputs>;
using BackwardOp = Op<BackwardCall, BackwardOutputs>;
using BackwardOverSavedOp = Op<BackwardCall, BackwardOutputs, true>;
using GradientsOp = Op<GradientsCall, GradientsOutputs>;
using WindowOp = Op<WindowCall, GradientsOutputs>;

// What each library of kernels has. There are two: of kernels that this project compiles, and of those that Triton
// compiles on the user's machine.
inline void define_sequence_ops(torch::Library& library) {
  library.def(ForwardOp::schema("sequence_forward").c_str());
  library.def(BackwardOp::schema("sequence_backward").c_str());
  library.def(BackwardOverSavedOp::schema("sequence_backward_", "saved").c_str());
  library.def(GradientsOp::schema("sequence_gradients").c_str());
}

enum class Library { kCompiled, kTriton };
template <Library library>
struct SequenceOps {
  static std::string name(const char* op) {
    return std::string(library == Library::kTriton ? "rnnkernels_triton::" : "rnnkernels::") + op;
  }
  static const ForwardOp::Handle& forward() {
    static const auto op = ForwardOp::find(name("sequence_forward"));
    return op;
  }
  static const BackwardOp::Handle& backward() {
    static const auto op = BackwardOp::find(name("sequence_backward"));
    return op;
  }
  static const BackwardOverSavedOp::Handle& backward_over_saved() {
    static const auto op = BackwardOverSavedOp::find(name("sequence_backward_"));
    return op;
  }
  static const GradientsOp::Handle& gradients() {
    static const auto op = GradientsOp::find(name("sequence_gradients"));
    return op;
  }
};
// f(ops) for the library that is known at run time.
template <class F>
auto with_ops(Library library, F&& f) {
  return library == Library::kTriton ? f(SequenceOps<Library::kTriton>()) : f(SequenceOps<Library::kCompiled>());
}

// dx [T, B, I] of dgates [T, B, D, X*H], packed or not, and w_ih [G*H, I] of each direction.
inline constexpr const char* kInputGradientSchema = "input_gradient(Tensor dgates, Tensor[] w_ih) -> Tensor dx";
// a w [M, N] of a [M, K] and w [K, N]; and the sum of a^T b [M, N] over pairs of a [K, M] and b [K, N], each with a K
// of its own. On a CPU.
inline constexpr const char* kRowsProductSchema = "rows_product(Tensor a, Tensor w) -> Tensor";
inline constexpr const char* kStepsProductSchema = "steps_product(Tensor[] a, Tensor[] b) -> Tensor";
inline const auto& input_gradient_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rnnkernels::input_gradient", "")
                             .typed<Tensor(const Tensor&, TensorList)>();
  return op;
}

}  // namespace rnn
