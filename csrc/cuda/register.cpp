// The sequence ops on CUDA. Only what torch offers for devices of any kind is used, so that this builds beside a torch
// without CUDA, whose headers for it are missing or of no use.
#if defined(RNNKERNELS_CUDA)

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "cuda/launch.h"
#include "cuda/persistent.h"
#include "cuda/stepwise.h"
#include "cuda/vetting.h"
#include "ops/float32.h"

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
  template <class Stages>
  void operator()(const Stages& stages, const Plan& plan, const Part& part) const {
    check(cuda::launch(cell, stages, plan, part, stream));
  }
};

// like: a tensor of the call's device and type.
template <class Run>
void run(const char* op, Run& all, const Tensor& like) {
  const c10::DeviceGuard guard(like.device());
  const Launcher launcher(op, all.cell().number, like.device());
  Device limits{};
  launcher.check(query(limits));
  const int index = like.device().index();
  const Request request = request_of(all, tf32_allowed(like.scalar_type()));
  const Stack stack =
      vetted.plan(request.precision, limits, index, [&](const Device& allowed) { return plan_call(request, allowed); });
  TORCH_CHECK(vetted.allows(index, kernels_of(stack)) || !choice().free(), "rnnkernels::", op,
              ": the CUDA kernels were found wrong on this device. Another backend runs the next call; "
              "rnnkernels.explain(module, input) tells more.");
  if (stack.stages > 1) return run_stack(all, stack, launcher);
  all.each([&](auto& layer) {
    stack.plan.found ? run_persistent(layer, stack.plan, launcher) : run_stepwise(layer, launcher);
  });
}

void forward(ForwardRun& all) { run("sequence_forward", all, all.call().x); }
void backward(BackwardRun& all) { run("sequence_backward", all, all.call().y); }

}  // namespace
}  // namespace rnn::cuda

TORCH_LIBRARY_IMPL(rnnkernels, CUDA, library) {
  rnn::register_sequence_ops<rnn::cuda::forward, rnn::cuda::backward>(library);
}

#endif
