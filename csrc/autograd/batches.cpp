// The ops under torch.vmap, which they have no rule for. (Batches of gradients that torch.autograd makes have another
// key, for which sequence_gradients in Python is its own rule.)
#include <c10/util/Exception.h>
#include <torch/library.h>

namespace {

void refuse(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(),
                              ": torch.vmap is not implemented by the kernels. Call the layer in a loop, or on one "
                              "batch of all, or inside rnnkernels.use_backend('reference').");
}

void refuse_all(torch::Library& library, std::initializer_list<const char*> ops) {
  for (const char* op : ops) library.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse>());
}

}  // namespace

TORCH_LIBRARY_IMPL(rnnkernels, FuncTorchBatched, library) {
  refuse_all(library,
             {"sequence_forward", "sequence_backward", "sequence_backward_", "input_gradient", "sequence_gradients"});
}
TORCH_LIBRARY_IMPL(rnnkernels_triton, FuncTorchBatched, library) {
  refuse_all(library, {"sequence_forward", "sequence_backward", "sequence_backward_"});
}
