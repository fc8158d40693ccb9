// The sequence ops on CUDA. Only what torch offers for devices of any kind is used, so that this builds beside a torch
// without CUDA, whose headers for it are missing or of no use.
#if defined(RNNKERNELS_CUDA)

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "cuda/cell_libraries.h"
#include "cuda/fault.h"
#include "cuda/here.h"
#include "cuda/persistent.h"
#include "cuda/stepwise.h"
#include "cuda/vetting.h"
#include "ops/float32.h"

namespace rnn::cuda {
namespace {

// The device refused the first launch of a plan: nothing has run, and another plan may.
struct Refused {};

// Launches on the current stream of a device, which has to be the current device.
struct Launcher {
  const char* op;
  const CellInfo& cell;
  Stream stream;
  FaultRecord record{};
  mutable bool launched = false;  // a kernel of the plan at hand

  Launcher(const char* op, const CellInfo& cell, c10::Device device)
      : op(op), cell(cell), stream(c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle()) {
    check(fault_record(record));
    if (!*record.on_host) return;
    const std::string fault = take_fault(device.index());
    TORCH_CHECK(fault.empty(), "An earlier call on ", device, " failed. ", fault);
  }

  void check(const char* error) const {
    TORCH_CHECK(
        !error, "rnnkernels::", op, ": a CUDA kernel could not be launched: ", error,
        ". It may be the error of an earlier kernel, which CUDA_LAUNCH_BLOCKING=1 names; if it is this one's, ask "
        "for another backend (backend='triton' or 'torch').");
  }

  template <class Step>
  void operator()(const Step& step) const {
    if constexpr (requires { Step::kOfCell; }) {
      if (!cell.built_in()) return check(steps_of(step).launch(step, stream));
    }
    check(cuda::launch(cell.number, step, stream));
  }
  template <class Stages>
  void operator()(const Stages& stages, const Plan& plan, Part part) const {
    part.fault = record.on_device;
    const Outcome outcome = cuda::launch(cell.number, stages, plan, part, stream);
    if (outcome.refused && !launched) throw Refused();
    check(outcome.error);
    launched = true;
  }

  // Calls f, which runs a plan; false where that was refused.
  template <class F>
  bool accepted(F&& f) const {
    launched = false;
    try {
      f();
    } catch (const Refused&) {
      return false;
    }
    return true;
  }

 private:
  // Of a cell that is not built in, in the storage type of a step.
  template <template <class> class Step, class IO>
  const CellSteps<IO>& steps_of(const Step<IO>&) const {
    const CellSteps<IO>* found = loaded_cells().find<IO>(cell.number);
    if (!found) {
      const std::string reason = loaded_cells().compile(std::string(cell.name), kTypeName<IO>);
      found = loaded_cells().find<IO>(cell.number);
      TORCH_CHECK_NOT_IMPLEMENTED(found, "rnnkernels::", op, ": there are no CUDA kernels of the cell '", cell.name,
                                  "' for ", kTypeName<IO>, ": ", reason,
                                  ". Ask for another backend (backend='triton').");
    }
    return *found;
  }
};

// like: a tensor of the call's device and type.
template <class Run>
void run(const char* op, Run& all, const Tensor& like) {
  const c10::DeviceGuard guard(like.device());
  const Launcher launcher(op, all.cell(), like.device());
  Device limits{};
  launcher.check(query(limits));
  const int index = like.device().index();
  const Request request = request_of(all, tf32_allowed(like.scalar_type()));
  const Check check = check_here(all.cell().number, request);
  // Of what is vetted and the device has not refused; after a refusal it is another one.
  const auto plan = [&](const Request& asked) {
    const Stack found = vetted.plan(asked.precision, limits, index,
                                    [&](const Device& allowed) { return plan_call(asked, allowed, check); });
    TORCH_CHECK(vetted.allows(index, kernels_of(found)) || !choice().free(), "rnnkernels::", op,
                ": the CUDA kernels were found wrong on this device. Another backend runs the next call; "
                "rnnkernels.explain(module, input) tells more.");
    return found;
  };
  Stack stack = plan(request);
  while (stack.stages > 1) {
    if (launcher.accepted([&] { run_stack(all, stack, launcher); })) return;
    stack = plan(request);
  }
  all.each([&](auto& layer) {
    while (stack.plan.found) {
      if (launcher.accepted([&] { run_persistent(layer, stack.plan, launcher); })) return;
      Request one = request;
      one.layers = 1;
      stack = plan(one);
    }
    run_stepwise(layer, launcher);
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
