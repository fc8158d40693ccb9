// The libraries of ops: their schemas.
#include "ops/tangent_calls.h"

TORCH_LIBRARY(rnnkernels, library) {
  rnn::define_sequence_ops(library);
  library.def(rnn::WindowOp::schema("window_gradients", "sums").c_str());
  library.def(rnn::ForwardTangentsOp::schema("forward_tangents").c_str());
  library.def(rnn::BackwardRecordOp::schema("backward_record").c_str());
  library.def(rnn::BackwardTangentsOp::schema("backward_tangents").c_str());
  library.def(rnn::kInputGradientSchema);
  library.def(rnn::kRowsProductSchema);
  library.def(rnn::kStepsProductSchema);
}
TORCH_LIBRARY(rnnkernels_triton, library) { rnn::define_sequence_ops(library); }
