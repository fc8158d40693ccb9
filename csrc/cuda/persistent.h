// A call on persistent kernels: whether they take it, and from its arguments and a plan to launches. The runner is a
// parameter, so that the same text runs on a GPU and, in tests, in an emulator:
//
//   runner(stages, plan, part)
//
// runs one launch, of ForwardStages or BackwardStages, after all that was asked for before; part.global is memory of
// the size that the plan asks for, with all bits set.
#pragma once

#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros.h>

#include "cuda/plan.h"
#include "cuda/stages.h"
#include "ops/pointers.h"

namespace rnn::cuda {

// tf32: whether products of float32 may run on tensor cores.
inline Precision precision_of(at::ScalarType type, bool tf32) {
  return type == at::kDouble     ? Precision::kFloat64
         : type == at::kBFloat16 ? Precision::kBFloat16
         : type == at::kHalf     ? Precision::kFloat16
         : tf32                  ? Precision::kTF32
                                 : Precision::kFloat32;
}
inline Precision precision_of(const ForwardRun& all, bool tf32) {
  return precision_of(all.call().x.scalar_type(), tf32);
}
inline Precision precision_of(const BackwardRun& all, bool tf32) {
  return precision_of(all.call().y.scalar_type(), tf32);
}
inline bool bounds_norm(const ForwardRun&) { return false; }
inline bool bounds_norm(const BackwardRun& all) { return all.call().clip == "norm"; }
constexpr bool goes_back(const ForwardRun&) { return false; }
constexpr bool goes_back(const BackwardRun&) { return true; }

inline bool records(const ForwardRun&) { return false; }
inline bool records(const BackwardRun& all) { return all.call().record; }

template <class Run>
Request request_of(const Run& all, bool tf32) {
  const CellInfo& cell = all.cell();
  const Sizes& n = all.sizes();
  return {cell.G,
          cell.A,
          cell.S,
          goes_back(all),
          precision_of(all, tf32),
          all.projected(),
          bounds_norm(all),
          records(all),
          n.H,
          n.T,
          n.B,
          all.call().window,
          int(n.D),
          int(n.L),
          !cell.built_in(),
          n.heads > 1,
          all.call().h_mask.has_value(),
          cell.normed};
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

// Runs stages by all launches of a plan.
template <class Stages, class Runner>
void run_launches(const Stages& stages, const Plan& plan, const at::TensorOptions& options, const Runner& runner) {
  const Layout& l = plan.layout;
  const int64_t groups = stages[0].seq.D * int64_t(stages.size()) * l.groups;
  for (int64_t i = 0; i < plan.launches; ++i) {
    const Tensor global = at::full({groups * l.global_bytes}, 0xff, options.dtype(at::kByte));
    runner(stages, plan, Part{pointer<char>(global), i * l.groups * l.tiles * l.rows});
  }
}

template <class Runner>
void run_persistent(const ForwardLayer& a, const Plan& plan, const Runner& runner) {
  const Tensor gx = project_input(a);
  dispatch_narrow(a.x.scalar_type(), [&]<class IO> {
    run_launches(ForwardStages<IO>{{parameters<IO>(a, gx), nullptr}}, plan, a.x.options(), runner);
  });
}

template <class Runner>
void run_persistent(const BackwardLayer& a, const Plan& plan, const Runner& runner) {
  const bool flow = a.call.record;
  const Tensor all_dh =
      at::zeros(flow ? a.n.shape({a.n.D, a.n.R}) : at::DimVector{0}, a.y.options().dtype(at::kDouble));
  dispatch_narrow(a.y.scalar_type(), [&]<class IO> {
    const BackwardStage<IO> stage{parameters<IO>(a), pointer<double>(all_dh), nullptr, nullptr, nullptr};
    run_launches(BackwardStages<IO>{stage}, plan, a.y.options(), runner);
  });
  if (flow) a.flow.copy_(at::linalg_vector_norm(all_dh, 2, {-1}));
}

// The mask behind a layer, a factor for every y.
template <class Run>
Tensor whole_mask(const Run& all, int64_t index) {
  const Sizes& n = all.sizes();
  return all.mask(index).expand(n.shape({n.width()})).contiguous();
}

// The layers of a call, as many at a time as the plan has stages: the layers have one direction and no projection.
template <class Runner>
void run_stack(ForwardRun& all, const Stack& stack, const Runner& runner) {
  const int64_t L = all.sizes().L;
  Tensor x = all.call().x;
  for (int64_t first = 0; first < L; first += stack.stages) {
    const int64_t last = std::min(first + stack.stages, L);
    std::vector<ForwardLayer> layers;  // which keep what the launch reads
    std::vector<Tensor> kept;          // too
    dispatch_narrow(x.scalar_type(), [&]<class IO> {
      ForwardStages<IO> stages;
      for (int64_t l = first; l < last; ++l) {
        const bool fed = l > first;
        layers.push_back(all.layer(l, fed ? layers.back().y : x));
        const Tensor gx = fed ? Tensor() : project_input(layers.back());
        const Tensor mask = fed && all.call().masks ? whole_mask(all, l - 1) : Tensor();
        kept.insert(kept.end(), {gx, mask});
        stages.push_back({parameters<IO>(layers.back(), gx), pointer<const IO>(mask)});
      }
      run_launches(stages, stack.plan, x.options(), runner);
    });
    if (last < L) x = all.above(layers.back());
  }
}

template <class Runner>
void run_stack(BackwardRun& all, const Stack& stack, const Runner& runner) {
  const int64_t L = all.sizes().L;
  OptionalTensor dy = all.from_outside(L - 1);
  for (int64_t last = L; last > 0;) {
    const int64_t first = std::max<int64_t>(last - stack.stages, 0);
    std::vector<BackwardLayer> layers;
    std::vector<Tensor> kept;
    dispatch_narrow(all.call().y.scalar_type(), [&]<class IO> {
      BackwardStages<IO> stages;
      for (int64_t l = last; l-- > first;) {
        const bool fed = l + 1 < last;
        layers.push_back(all.layer(l, fed ? all.from_outside(l) : std::move(dy)));
        BackwardStage<IO> stage{parameters<IO>(layers.back())};
        if (fed) {
          stage.dgates_above = stages.back().dgates;
          const Tensor w_ih = all.w_ih(l + 1).contiguous();
          const Tensor mask = all.call().masks ? whole_mask(all, l) : Tensor();
          kept.insert(kept.end(), {w_ih, mask});
          stage.w_ih_above = pointer<const IO>(w_ih);
          stage.mask_above = pointer<const IO>(mask);
        }
        stages.push_back(stage);
      }
      run_launches(stages, stack.plan, all.call().y.options(), runner);
    });
    if (first > 0) dy = all.whole(first - 1, layers.back().dgates);
    last = first;
  }
}

}  // namespace rnn::cuda
