// The CUDA backend's ops as they are, but for CPU tensors, and in a library of their own: launches go to the stand-in
// beside this file, and nothing computes. Tests see what comes back to Python where a launch fails.
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

// What the file below would register for CUDA is left out: the package may have done so.
#pragma push_macro("TORCH_LIBRARY_IMPL")
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(space, key, library) [[maybe_unused]] static void left_out(torch::Library& library)
#include "cuda/register.cpp"
#pragma pop_macro("TORCH_LIBRARY_IMPL")

namespace {

// The host has no streams, where the ops ask for the current one.
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CPU> {
  void* getStreamNativeHandle(const c10::Stream) const override { return nullptr; }
};
const c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CPU, new Guard);

}  // namespace

TORCH_LIBRARY(rnnkernels_stand_in, library) { rnn::define_sequence_ops(library); }

TORCH_LIBRARY_IMPL(rnnkernels_stand_in, CPU, library) {
  rnn::register_sequence_ops<rnn::cuda::forward, rnn::cuda::backward>(library);
}
