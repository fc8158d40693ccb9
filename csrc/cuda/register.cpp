// The sequence ops on CUDA. Only what torch offers for devices of any kind is used, so that this builds beside a torch
// without CUDA, whose headers for it are missing or of no use.
#if defined(RNNKERNELS_CUDA)

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "cuda/pointwise.h"
#include "cuda/stepwise.h"

namespace rnn::cuda {
namespace {

// Launches on the current stream of a device, which has to be the current device.
struct Launcher {
  const char* op;
  int cell;
  Stream stream;

  Launcher(const char* op, int cell, c10::Device device)
      : op(op), cell(cell), stream(c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle()) {}

  template <class Step>
  void operator()(const Step& step) const {
    const char* error = cuda::launch(cell, step, stream);
    TORCH_CHECK(!error, "rnnkernels::", op, ": a CUDA kernel could not be launched: ", error);
  }
};

ForwardResults forward(ForwardArguments& a) {
  const c10::DeviceGuard guard(a.x.device());
  return run_forward(a, Launcher("sequence_forward", a.cell.number, a.x.device()));
}

BackwardResults backward(BackwardArguments& a) {
  const c10::DeviceGuard guard(a.y.device());
  return run_backward(a, Launcher("sequence_backward", a.cell.number, a.y.device()));
}

}  // namespace
}  // namespace rnn::cuda

TORCH_LIBRARY_IMPL(rnnkernels, CUDA, library) {
  rnn::register_sequence_ops<rnn::cuda::forward, rnn::cuda::backward>(library);
}

#endif
