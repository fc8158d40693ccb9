// A call on persistent kernels: whether they take it, and from its arguments and a plan to launches. The runner is a
// parameter, so that the same text runs on a GPU and, in tests, in an emulator:
//
//   runner(stages, plan, part)
//
// runs one launch, of ForwardStages or BackwardStages, after all that was asked for before; part.global is zeroed
// memory of the size that the plan asks for.
#pragma once

#include "common/stack.h"
#include "cuda/plan.h"
#include "cuda/stages.h"

namespace rnn::cuda {

// tf32: whether products of float32 may run on tensor cores.
inline Precision precision_of(at::ScalarType type, bool tf32) {
  return type == at::kDouble     ? Precision::kFloat64
         : type == at::kBFloat16 ? Precision::kBFloat16
         : type == at::kHalf     ? Precision::kFloat16
         : tf32                  ? Precision::kTF32
                                 : Precision::kFloat32;
}
inline Precision precision_of(const ForwardArguments& a, bool tf32) { return precision_of(a.x.scalar_type(), tf32); }
inline Precision precision_of(const BackwardArguments& a, bool tf32) { return precision_of(a.y.scalar_type(), tf32); }
inline bool bounds_norm(const ForwardArguments&) { return false; }
inline bool bounds_norm(const BackwardArguments& a) { return a.clip.kind == Clip::kNorm; }
constexpr bool goes_back(const ForwardArguments&) { return false; }
constexpr bool goes_back(const BackwardArguments&) { return true; }

// What persistent kernels do not take of a call, or null.
template <class Arguments>
const char* refusal(const Arguments& a) {
  return refusal(precision_of(a, false), !a.w_hr.empty(), bounds_norm(a));
}
template <class Arguments>
Kernel kernel_of(const Arguments& a, bool tf32) {
  return kernel_of(a.cell.G, a.cell.A, a.cell.S, goes_back(a), precision_of(a, tf32), bounds_norm(a));
}
inline Problem problem_of(const ForwardArguments&, const Sizes& n) { return {n.H, n.B, int(n.D)}; }
inline Problem problem_of(const BackwardArguments& a, const Sizes& n) {
  return {n.H, sequence(a, n, a.window).rows(), int(n.D)};
}
inline int64_t steps_of(const ForwardArguments&, const Sizes& n) { return n.T; }
inline int64_t steps_of(const BackwardArguments& a, const Sizes& n) { return sequence(a, n, a.window).steps(); }

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

// Runs stages by all launches of a plan.
template <class Stages, class Runner>
void run_launches(const Stages& stages, const Plan& plan, const at::TensorOptions& options, const Runner& runner) {
  const Layout& l = plan.layout;
  const int64_t groups = stages[0].seq.D * int64_t(stages.size()) * l.groups;
  for (int64_t i = 0; i < plan.launches; ++i) {
    const Tensor global = at::zeros({groups * l.global_bytes}, options.dtype(at::kByte));
    runner(stages, plan, Part{pointer<char>(global), i * l.groups * l.tiles * l.message.rows});
  }
}

template <class Runner>
ForwardResults run_persistent(const ForwardArguments& a, const Sizes& n, const Plan& plan, const Runner& runner) {
  ForwardTensors t = prepare(a, n, Input::kProjected);
  dispatch_narrow(a.x.scalar_type(), [&]<class IO> {
    run_launches(ForwardStages<IO>{{parameters<IO>(a, n, t), nullptr}}, plan, a.x.options(), runner);
  });
  return t.results();
}

template <class Runner>
BackwardResults run_persistent(const BackwardArguments& a, const Sizes& n, const Plan& plan, const Runner& runner) {
  const BackwardTensors t = prepare(a, n);
  const Tensor all_dh = at::zeros(a.flow ? n.shape({n.D, n.R}) : at::DimVector{0}, a.y.options().dtype(at::kDouble));
  dispatch_narrow(a.y.scalar_type(), [&]<class IO> {
    const BackwardStage<IO> stage{parameters<IO>(a, n, t), pointer<double>(all_dh), nullptr, nullptr, nullptr};
    run_launches(BackwardStages<IO>{stage}, plan, a.y.options(), runner);
  });
  if (a.flow) t.flow.copy_(at::linalg_vector_norm(all_dh, 2, {-1}));
  return t.results();
}

template <class IO>
const IO* mask(const Links& links, size_t n) {
  return links.masks.empty() ? nullptr : pointer<const IO>(links.masks[n]);
}

// The layers of a stack, as many at a time as the plan has stages. The plan has been made for all of them: one
// direction, one hidden size.
template <class Runner>
std::vector<ForwardResults> run_stack(std::vector<ForwardArguments>& layers, const Links& links, const Stack& stack,
                                      const Runner& runner) {
  std::vector<ForwardResults> results;
  for (size_t first = 0; first < layers.size(); first += stack.stages) {
    const size_t last = std::min(first + stack.stages, layers.size());
    std::vector<ForwardTensors> tensors;
    dispatch_narrow(layers[0].x.scalar_type(), [&]<class IO> {
      ForwardStages<IO> stages;
      for (size_t l = first; l < last; ++l) {
        ForwardArguments& a = layers[l];
        const bool fed = l > first;
        if (fed) {
          a.x = std::get<0>(results.back());
        } else if (l > 0) {
          a.x = links.above(std::get<0>(results.back()), l - 1);
        }
        const Sizes n = check(a);
        tensors.push_back(prepare(a, n, fed ? Input::kRaw : Input::kProjected));
        stages.push_back({parameters<IO>(a, n, tensors.back()), fed ? mask<IO>(links, l - 1) : nullptr});
        results.push_back(tensors.back().results());
      }
      run_launches(stages, stack.plan, layers[0].x.options(), runner);
    });
  }
  return results;
}

template <class Runner>
std::vector<BackwardResults> run_stack(std::vector<BackwardArguments>& layers, const Links& links, const Stack& stack,
                                       const Runner& runner) {
  std::vector<BackwardResults> results(layers.size());
  for (size_t last = layers.size(); last > 0;) {
    const size_t first = last > size_t(stack.stages) ? last - stack.stages : 0;
    std::vector<BackwardTensors> tensors;
    dispatch_narrow(layers[0].y.scalar_type(), [&]<class IO> {
      BackwardStages<IO> stages;
      for (size_t l = last; l-- > first;) {
        BackwardArguments& a = layers[l];
        const bool fed = l + 1 < last;
        if (!fed && last < layers.size()) a.dy = links.below(a.dy, std::get<0>(results[last]), l);
        const Sizes n = check(a);
        tensors.push_back(prepare(a, n));
        BackwardStage<IO> stage{parameters<IO>(a, n, tensors.back())};
        if (fed) {
          stage.dgates_above = stages.back().dgates;
          stage.w_ih_above = pointer<const IO>(links.w_ih[l]);
          stage.mask_above = mask<IO>(links, l);
        }
        stages.push_back(stage);
        results[l] = tensors.back().results();
      }
      run_launches(stages, stack.plan, layers[0].y.options(), runner);
    });
    last = first;
  }
  return results;
}

}  // namespace rnn::cuda
