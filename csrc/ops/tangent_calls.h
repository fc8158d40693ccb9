// Ops for tangents of one layer, on a CPU, of float32 and float64 (cpu/tangents.cpp). Python calls them
// (rnnkernels/_ops/tangent_kernels.py), with values and tangents that it has taken apart: autograd does not see them.
//
//   rnnkernels::forward_tangents    those of what sequence_forward returns
//   rnnkernels::backward_record     sequence_backward, with the gradients of all states behind each step
//   rnnkernels::backward_tangents   those of what sequence_backward returns
//
// Shapes are those of calls.h, with L == 1.
#pragma once

#include "ops/calls.h"

namespace rnn {

// Of the call's own members x, h0, c0 and the biases are tangents; W_ih, W_hh and W_hr are values.
struct ForwardTangentsCall : ForwardCall {
  Tensor h0_at;  // values, as all that follow
  OptionalTensor c0_at;
  Tensor y_at, c_at, saved_at;        // which forward returned
  OptionalTensor of_gx, of_gh, of_h;  // what tangents of weights add: ForwardTangents in cpu/kernels.h

  static constexpr auto fields() {
    using Self = ForwardTangentsCall;
    return std::tuple_cat(
        ForwardCall::fields(),
        std::tuple(Field{"h0_at", &Self::h0_at}, Field{"c0_at", &Self::c0_at}, Field{"y_at", &Self::y_at},
                   Field{"c_at", &Self::c_at}, Field{"saved_at", &Self::saved_at}, Field{"of_gx", &Self::of_gx},
                   Field{"of_gh", &Self::of_gh}, Field{"of_h", &Self::of_h}));
  }
};

struct BackwardRecordOutputs : BackwardOutputs {
  Tensor dnext;  // [1, T, B, D, S*H]; of h before its projection

  static constexpr auto fields() {
    return std::tuple_cat(BackwardOutputs::fields(), std::tuple(Field{"dnext", &BackwardRecordOutputs::dnext}));
  }
};

// Of the call's own members dy, dh_n, dc_n and dc are tangents; the others are values.
struct BackwardTangentsCall : BackwardCall {
  Tensor dnext;  // a value: of backward_record
  Tensor h0_t;   // tangents, as all that follow
  OptionalTensor c0_t;
  Tensor y_t, c_t, saved_t;  // of forward_tangents
  OptionalTensor of_raw;     // what the tangent of W_hr adds: BackwardTangents in cpu/kernels.h

  static constexpr auto fields() {
    using Self = BackwardTangentsCall;
    return std::tuple_cat(BackwardCall::fields(),
                          std::tuple(Field{"dnext", &Self::dnext}, Field{"h0_t", &Self::h0_t},
                                     Field{"c0_t", &Self::c0_t}, Field{"y_t", &Self::y_t}, Field{"c_t", &Self::c_t},
                                     Field{"saved_t", &Self::saved_t}, Field{"of_raw", &Self::of_raw}));
  }
};

using ForwardTangentsOp = Op<ForwardTangentsCall, ForwardOutputs>;
using BackwardRecordOp = Op<BackwardCall, BackwardRecordOutputs>;
using BackwardTangentsOp = Op<BackwardTangentsCall, BackwardOutputs>;

}  // namespace rnn
