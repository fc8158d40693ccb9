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
  template <class Stages>
  void operator()(const Stages& stages, const Plan& plan, const Part& part) const {
    check(cuda::launch(cell, stages, plan, part, stream));
  }
};

// Torch's switch for recurrent layers: torch.backends.cudnn.allow_tf32.
bool tf32_allowed() { return at::globalContext().allowTF32CuDNN(); }

// How layers like this one run, with so many of them in a stack.
template <class Arguments>
Stack choose(const Arguments& a, const Sizes& n, const Launcher& launcher, size_t layers = 1) {
  Stack stack{1, {}, 0};
  if (n.T == 0 || n.B == 0) {
    stack.plan.reason = "there is nothing to run";
  } else if (const char* reason = refusal(a)) {
    stack.plan.reason = reason;
  } else {
    Device device{};
    launcher.check(query(device));
    stack = plan_stack(choice(), kernel_of(a, tf32_allowed()), problem_of(a, n), int(layers), steps_of(a, n), device);
  }
  return stack;
}

template <class Arguments>
auto run(const char* op, Arguments& a, c10::Device device) {
  const c10::DeviceGuard guard(device);
  const Sizes n = check(a);  // first: the device may be none of ours
  const Launcher launcher(op, a.cell.number, device);
  const Plan plan = choose(a, n, launcher).plan;
  return plan.found ? run_persistent(a, n, plan, launcher) : run_stepwise(a, n, launcher);
}

ForwardResults forward(ForwardArguments& a) { return run("sequence_forward", a, a.x.device()); }
BackwardResults backward(BackwardArguments& a) { return run("sequence_backward", a, a.y.device()); }

template <class Arguments, class Layer>
auto run_layers(const char* op, std::vector<Arguments>& layers, const Links& links, c10::Device device, Layer layer) {
  const c10::DeviceGuard guard(device);
  const Sizes n = check(layers[0]);
  const Launcher launcher(op, layers[0].cell.number, device);
  const Stack stack = choose(layers[0], n, launcher, layers.size());
  return stack.stages > 1 ? run_stack(layers, links, stack, launcher) : run_in_turn(layers, links, layer);
}

std::vector<ForwardResults> stack_forward(std::vector<ForwardArguments>& layers, const Links& links) {
  return run_layers("stack_forward", layers, links, layers[0].x.device(), forward);
}
std::vector<BackwardResults> stack_backward(std::vector<BackwardArguments>& layers, const Links& links) {
  return run_layers("stack_backward", layers, links, layers[0].y.device(), backward);
}

}  // namespace
}  // namespace rnn::cuda

TORCH_LIBRARY_IMPL(rnnkernels, CUDA, library) {
  rnn::register_sequence_ops<rnn::cuda::forward, rnn::cuda::backward>(library);
  rnn::register_stack_ops<rnn::cuda::stack_forward, rnn::cuda::stack_backward>(library);
}

#endif
