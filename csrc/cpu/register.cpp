// The sequence ops on the CPU.
#include <ATen/Parallel.h>

#include "common/ops.h"
#include "cpu/kernels.h"
#include "cpu/single.h"

namespace rnn::cpu {
namespace {

struct Workspace {
  at::Tensor memory;
  static void* allocate(int64_t bytes, void* context) {
    auto* self = static_cast<Workspace*>(context);
    self->memory = at::empty({bytes}, at::kByte);
    return self->memory.mutable_data_ptr();
  }
};

const Kernels& available() {
  const Kernels* k = kernels();
  TORCH_CHECK(k,
              "RNNKERNELS_CPU_CAPABILITY: expected default, avx2, avx512 or amx as far as this processor has it, got '",
              std::getenv("RNNKERNELS_CPU_CAPABILITY"), "'");
  return *k;
}

// Calls f(entry) with the kernels of this storage type.
template <class F>
void dispatch_dtype(at::ScalarType type, F&& f) {
  const Kernels& k = available();
  switch (type) {
    case at::kFloat:
      return f(k.float32);
    case at::kDouble:
      return f(k.float64);
    case at::kBFloat16:
      return f(k.bfloat16);
    case at::kHalf:
      return f(k.float16);
    default:
      TORCH_INTERNAL_ASSERT(false, "checked before");
  }
}

// What only a look into the tensor can tell; a compiled graph reaches no check but this one.
void check_values(const OptionalTensor& lengths, int64_t T) {
  if (!lengths) return;
  const auto* n = pointer<const int64_t>(lengths);
  for (int64_t b = 0; b < lengths->numel(); ++b) {
    TORCH_CHECK_VALUE(n[b] >= 0 && n[b] <= T, "lengths: expected values from 0 to ", T,
                      ", the length of the input, got ", n[b]);
  }
}

template <class Run>
void with_launch(int cell, Run&& run) {
  Workspace workspace;
  Crew crew(at::in_parallel_region() ? 1 : at::get_num_threads());
  run(Launch{cell, crew, Workspace::allocate, &workspace});
}

ForwardResults forward(ForwardArguments& a) {
  const Sizes n = check(a);
  if (is_single_step(a, n)) {
    ForwardResults results;
    dispatch_dtype(a.x.scalar_type(), [&](const auto& entry) { results = forward_single(a, n, entry); });
    return results;
  }
  check_values(a.lengths, n.T);
  const ForwardTensors t = prepare(a, n, Input::kRaw);
  with_launch(a.cell.number, [&](const Launch& launch) {
    dispatch_dtype(a.x.scalar_type(),
                   [&]<class IO>(const Entry<IO>& entry) { entry.forward(launch, parameters<IO>(a, n, t)); });
  });
  return t.results();
}

BackwardResults backward(BackwardArguments& a) {
  const Sizes n = check(a);
  if (is_single_step(a, n)) {
    BackwardResults results;
    dispatch_dtype(a.y.scalar_type(), [&](const auto& entry) { results = backward_single(a, n, entry); });
    return results;
  }
  check_values(a.lengths, n.T);
  const BackwardTensors t = prepare(a, n);
  with_launch(a.cell.number, [&](const Launch& launch) {
    dispatch_dtype(a.y.scalar_type(),
                   [&]<class IO>(const Entry<IO>& entry) { entry.backward(launch, parameters<IO>(a, n, t)); });
  });
  return t.results();
}

Tensor input_gradient(const Tensor& dgates, TensorList w_ih) {
  check_input_gradient(dgates, w_ih);
  const int64_t T = dgates.size(0), B = dgates.size(1), D = dgates.size(2), G_H = w_ih[0].size(0), I = w_ih[0].size(1);
  const Tensor a = dgates.contiguous(), dx = fresh({T, B, I}, dgates.options());
  if (dx.numel() == 0) return dx;
  for (int64_t d = 0; d < D; ++d) {
    const Tensor columns = a.select(2, d), w = w_ih[d].contiguous();
    with_launch(0, [&](const Launch& launch) {
      dispatch_dtype(a.scalar_type(), [&]<class IO>(const Entry<IO>& entry) {
        entry.rows(launch, {T * B, G_H, I, pointer<const IO>(columns), columns.stride(1), pointer<const IO>(w),
                            pointer<IO>(dx), d > 0});
      });
    });
  }
  return dx;
}

}  // namespace
}  // namespace rnn::cpu

TORCH_LIBRARY_IMPL(rnnkernels, CPU, library) {
  rnn::register_sequence_ops<rnn::cpu::forward, rnn::cpu::backward>(library);
  library.impl("input_gradient", rnn::cpu::input_gradient);
}
