// The CUDA backend's loops and kernel bodies, run by a plain loop over all units on the CPU. They are registered for
// CPU tensors in a library of their own.
#include "cuda/stepwise.h"
#include "simt/storage.h"

namespace rnn::cuda {

namespace {

struct Launcher {
  int cell;

  template <class Step>
  void operator()(const Step& step) const {
    const Sequence& q = step.sequence();
    dispatch_step<Step>(cell, [&](auto of) {
      // Last unit first: no unit may count on another of its launch.
      for (int64_t n = q.D * q.rows() - 1; n >= 0; --n)
        for (int64_t i = step.width() - 1; i >= 0; --i) step.template unit<decltype(of)>(Slot(q, n), i);
    });
  }
};

template <class Run>
void run(Run& all) {
  all.each([&](auto& layer) { run_stepwise(layer, Launcher{all.cell().number}); });
}
void forward(ForwardRun& all) { run(all); }
void backward(BackwardRun& all) { run(all); }

}  // namespace
}  // namespace rnn::cuda

TORCH_LIBRARY(rnnkernels_cuda_on_host, library) { rnn::define_sequence_ops(library); }

TORCH_LIBRARY_IMPL(rnnkernels_cuda_on_host, CPU, library) {
  rnn::register_sequence_ops<rnn::cuda::forward, rnn::cuda::backward>(library);
}
