// The sequence ops on CUDA. Only what torch offers for devices of any kind is used, so that this builds beside a torch
// without CUDA, whose headers for it are missing or of no use.
#if defined(RNNKERNELS_CUDA)

#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "cuda/launch.h"
#include "cuda/persistent.h"
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

  void check(const char* error) const {
    TORCH_CHECK(!error, "rnnkernels::", op, ": a CUDA kernel could not be launched: ", error);
  }

  template <class Step>
  void operator()(const Step& step) const {
    check(cuda::launch(cell, step, stream));
  }
  template <class IO>
  void forward(const Forward<IO>& call, const Plan& plan, char* global, int64_t first_row) const {
    check(launch_forward(cell, call, plan, {global, first_row}, stream));
  }
  template <class IO>
  void backward(const Backward<IO>& call, double* all_dh, const Plan& plan, char* global, int64_t first_row) const {
    check(launch_backward(cell, call, all_dh, plan, {global, first_row}, stream));
  }
};

// Torch's switch for recurrent layers: torch.backends.cudnn.allow_tf32.
bool tf32_allowed() { return at::globalContext().allowTF32CuDNN(); }

template <class Arguments>
Plan choose(const Arguments& a, const Sizes& n, const Launcher& launcher) {
  Plan plan{};
  if (n.T == 0 || n.B == 0) {
    plan.reason = "there is nothing to run";
  } else if (const char* reason = refusal(a)) {
    plan.reason = reason;
  } else {
    Device device{};
    launcher.check(query(device));
    plan = make_plan(family(), kernel_of(a, tf32_allowed()), problem_of(a, n), device);
  }
  return plan;
}

template <class Arguments>
auto run(const char* op, Arguments& a, c10::Device device) {
  const c10::DeviceGuard guard(device);
  const Launcher launcher(op, a.cell.number, device);
  const Sizes n = check(a);
  const Plan plan = choose(a, n, launcher);
  return plan.found ? run_persistent(a, n, plan, launcher) : run_stepwise(a, n, launcher);
}

ForwardResults forward(ForwardArguments& a) { return run("sequence_forward", a, a.x.device()); }
BackwardResults backward(BackwardArguments& a) { return run("sequence_backward", a, a.y.device()); }

}  // namespace
}  // namespace rnn::cuda

TORCH_LIBRARY_IMPL(rnnkernels, CUDA, library) {
  rnn::register_sequence_ops<rnn::cuda::forward, rnn::cuda::backward>(library);
}

#endif
