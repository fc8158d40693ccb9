// The CUDA backend's loops and kernel bodies, run by a plain loop over all units on the CPU. They are registered for
// CPU tensors in a library of their own.
#include "cuda/stepwise.h"
#include "cuda_host/in_turn.h"
#include "cuda_host/written.h"

namespace rnn::cuda {

namespace {

template <class>
constexpr bool kStored = false;
template <template <class> class Step, class IO>
constexpr bool kStored<Step<IO>> = std::is_same_v<IO, double> || std::is_same_v<IO, BFloat16>;

struct Launcher {
  const CellInfo& cell;

  template <class Step>
  void operator()(const Step& step) const {
    constexpr bool kOfCell = requires { Step::kOfCell; };
    if constexpr (kOfCell && kStored<Step>) {
      if (run_written(cell.name, step)) return;
    }
    bool found = !kOfCell;
    dispatch_step<Step>(cell.number, [&](auto of) {
      found = true;
      in_turn<decltype(of)>(step);
    });
    TORCH_CHECK(found, "these tests have no kernels of ", cell.name, " in this dtype");
  }
};

template <class Run>
void run(Run& all) {
  all.each([&](auto& layer) { run_stepwise(layer, Launcher{all.cell()}); });
}
void forward(ForwardRun& all) { run(all); }
void backward(BackwardRun& all) { run(all); }

}  // namespace
}  // namespace rnn::cuda

TORCH_LIBRARY(rnnkernels_cuda_on_host, library) { rnn::define_sequence_ops(library); }

TORCH_LIBRARY_IMPL(rnnkernels_cuda_on_host, CPU, library) {
  rnn::register_sequence_ops<rnn::cuda::forward, rnn::cuda::backward>(library);
}
