// The libraries of ops: their schemas.
#include "ops/calls.h"

TORCH_LIBRARY(rnnkernels, library) {
  rnn::define_sequence_ops(library);
  library.def(rnn::WindowOp::schema("window_gradients", "sums").c_str());
  library.def(rnn::kInputGradientSchema);
  library.def(rnn::kRowsProductSchema);
  library.def(rnn::kStepsProductSchema);
}
TORCH_LIBRARY(rnnkernels_triton, library) { rnn::define_sequence_ops(library); }
