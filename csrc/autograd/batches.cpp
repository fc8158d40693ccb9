// The ops that torch.vmap never meets: gradients of batches go by sequence_gradients, whose rule, and that of
// sequence_forward, is in Python (rnnkernels/_ops/lanes.py).
#include <c10/util/Exception.h>
#include <torch/library.h>

namespace {

void refuse(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(),
                              ": torch.vmap has no rule for this op. Call the layer, or sequence_gradients, which have "
                              "one.");
}

void refuse_all(torch::Library& library, std::initializer_list<const char*> ops) {
  for (const char* op : ops) library.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse>());
}

}  // namespace

TORCH_LIBRARY_IMPL(rnnkernels, FuncTorchBatched, library) {
  refuse_all(library, {"sequence_backward", "sequence_backward_", "input_gradient"});
}
TORCH_LIBRARY_IMPL(rnnkernels_triton, FuncTorchBatched, library) {
  refuse_all(library, {"sequence_backward", "sequence_backward_"});
}
