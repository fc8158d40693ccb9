// A call on persistent kernels: whether they take it, and from its arguments and a plan to launches. The runner is a
// parameter, so that the same text runs on a GPU and, in tests, in an emulator:
//
//   runner.forward(call, plan, global, first_row), runner.backward(call, all_dh, plan, global, first_row)
//
// run one launch, after all that was asked for before; global is zeroed memory of the size that the plan asks for.
#pragma once

#include "common/ops.h"
#include "cuda/plan.h"

namespace rnn::cuda {

// tf32: whether products of float32 may run on tensor cores.
inline Numbers numbers_of(at::ScalarType type, bool tf32) {
  return type == at::kDouble     ? Numbers::kFloat64
         : type == at::kBFloat16 ? Numbers::kBFloat16
         : type == at::kHalf     ? Numbers::kFloat16
         : tf32                  ? Numbers::kTF32
                                 : Numbers::kFloat32;
}
inline Numbers numbers_of(const ForwardArguments& a, bool tf32) { return numbers_of(a.x.scalar_type(), tf32); }
inline Numbers numbers_of(const BackwardArguments& a, bool tf32) { return numbers_of(a.y.scalar_type(), tf32); }
inline bool bounds_norm(const ForwardArguments&) { return false; }
inline bool bounds_norm(const BackwardArguments& a) { return a.clip.kind == Clip::kNorm; }
constexpr bool goes_back(const ForwardArguments&) { return false; }
constexpr bool goes_back(const BackwardArguments&) { return true; }

// What persistent kernels do not take of a call, or null.
template <class Arguments>
const char* refusal(const Arguments& a) {
  return refusal(numbers_of(a, false), !a.w_hr.empty(), bounds_norm(a));
}
template <class Arguments>
Kernel kernel_of(const Arguments& a, bool tf32) {
  return kernel_of(a.cell.G, a.cell.A, a.cell.S, goes_back(a), numbers_of(a, tf32), bounds_norm(a));
}
inline Problem problem_of(const ForwardArguments&, const Sizes& n) { return {n.H, n.B, int(n.D)}; }
inline Problem problem_of(const BackwardArguments& a, const Sizes& n) {
  return {n.H, sequence(a, n, a.window).rows(), int(n.D)};
}

// Calls f.operator()<IO>() with the storage type of a dtype that persistent kernels take.
template <class F>
void dispatch_narrow(at::ScalarType type, F&& f) {
  switch (type) {
    case at::kFloat:
      return f.template operator()<float>();
    case at::kBFloat16:
      return f.template operator()<BFloat16>();
    case at::kHalf:
      return f.template operator()<Float16>();
    default:
      TORCH_INTERNAL_ASSERT(false, "refused before");
  }
}

// Calls launch(global, first_row) for every launch of a plan.
template <class F>
void for_launches(const Plan& plan, int64_t D, const at::TensorOptions& options, F&& launch) {
  const Layout& l = plan.layout;
  for (int64_t i = 0; i < plan.launches; ++i) {
    const Tensor global = at::zeros({D * l.groups * l.global_bytes}, options.dtype(at::kByte));
    launch(pointer<char>(global), i * l.groups * l.tiles * l.slices.rows);
  }
}

template <class Runner>
ForwardResults run_persistent(const ForwardArguments& a, const Sizes& n, const Plan& plan, const Runner& runner) {
  ForwardTensors t = prepare(a, n, Input::kProjected);
  dispatch_narrow(a.x.scalar_type(), [&]<class IO> {
    const Forward<IO> call = parameters<IO>(a, n, t);
    for_launches(plan, n.D, a.x.options(),
                 [&](char* global, int64_t first_row) { runner.forward(call, plan, global, first_row); });
  });
  return t.results();
}

template <class Runner>
BackwardResults run_persistent(const BackwardArguments& a, const Sizes& n, const Plan& plan, const Runner& runner) {
  const BackwardTensors t = prepare(a, n);
  const Tensor all_dh = at::zeros({a.flow ? n.T : 0, n.B, n.D, n.R}, a.y.options().dtype(at::kDouble));
  dispatch_narrow(a.y.scalar_type(), [&]<class IO> {
    const Backward<IO> call = parameters<IO>(a, n, t);
    for_launches(plan, n.D, a.y.options(), [&](char* global, int64_t first_row) {
      runner.backward(call, pointer<double>(all_dh), plan, global, first_row);
    });
  });
  if (a.flow) t.flow.copy_(at::linalg_vector_norm(all_dh, 2, {3}));
  return t.results();
}

}  // namespace rnn::cuda
