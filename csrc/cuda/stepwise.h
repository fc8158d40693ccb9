// The stepwise loops over time: per step one product through torch for all directions and rows, then one launch of what
// follows it. The launcher is a parameter, so that the same loops run on a CPU, where they are tested.
//
// A launcher is called with a step of step.h and runs it for every unit, after all that was asked for before. What a
// product takes starts as zeros: libraries multiply what lies behind a row by zero, and it must be no NaN.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros.h>

#include <optional>

#include "cuda/normed_stepwise.h"
#include "cuda/step.h"
#include "ops/pointers.h"

namespace rnn::cuda {

// Calls f.operator()<IO>() with the storage type of a dtype.
template <class F>
void dispatch_dtype(at::ScalarType type, F&& f) {
  switch (type) {
    case at::kFloat:
      return f.template operator()<float>();
    case at::kDouble:
      return f.template operator()<double>();
    case at::kBFloat16:
      return f.template operator()<BFloat16>();
    case at::kHalf:
      return f.template operator()<Float16>();
    default:
      TORCH_INTERNAL_ASSERT(false, "checked before");
  }
}

// The weights of all directions, each with the rows of its heads, as one operand [D, rows, columns].
inline Tensor stacked(const LayerWeights::List& weights, int64_t heads) {
  LayerWeights::List apart;
  for (const Tensor& w : weights) apart.push_back(w.view({heads, w.size(0) / heads, w.size(1)}));
  return apart.size() == 1 ? apart[0] : at::cat(apart);
}

template <class Launcher>
void run_stepwise(const ForwardLayer& a, const Launcher& launch) {
  const Sizes& n = a.n;
  const Tensor gx = a.cell.normed ? a.x.contiguous() : project_input(a);
  const int64_t steps = n.B ? n.T : 0;
  const bool projected = !a.w.w_hr.empty(), recurrent = a.cell.recurrent;
  Tensor w_hh, gh, masked, w_hr, raw, out;
  if (recurrent) {
    w_hh = stacked(a.w.w_hh, n.heads).transpose(1, 2);  // [D, R, G*H]
    gh = at::empty({n.D, n.B, a.cell.G * n.H}, a.x.options());
    if (a.h_mask) masked = a.h0 * *a.h_mask;  // carries the h of the product
  }
  if (projected) {
    w_hr = stacked(a.w.w_hr, n.heads).transpose(1, 2);  // [D, H, R]
    raw = at::zeros({n.D, n.B, n.H}, a.x.options());
    out = at::empty_like(a.h0);  // [D, B, R]
  }
  a.h_n.copy_(a.h0);  // carries h
  if (a.c0) a.c_n.copy_(*a.c0);
  const Tensor c = a.c_n.to(at::toOpMathType(a.c_n.scalar_type()));  // carries c; c_n itself where that has this type
  dispatch_dtype(a.x.scalar_type(), [&]<class IO> {
    const Forward<IO> call = parameters<IO>(a, gx);
    IO *h = pointer<IO>(a.h_n), *of_product = pointer<IO>(masked);
    std::optional<NormedForwardSteps<IO>> normed;
    if (a.cell.normed) normed.emplace(a, call, pointer<const IO>(gh), h, of_product, c, pointer<IO>(raw));
    for (int64_t s = 0; s < steps; ++s) {
      if (recurrent) at::bmm_out(gh, masked.defined() ? masked : a.h_n, w_hh);
      if (normed) {
        normed->launch(s, launch);
      } else {
        launch(ForwardCell<IO>{call, s, pointer<const IO>(gh), h, of_product, pointer<Arithmetic<IO>>(c),
                               pointer<IO>(raw)});
      }
      if (!projected) continue;
      at::bmm_out(out, raw, w_hr);
      launch(ForwardProject<IO>{call, s, pointer<const IO>(out), h, of_product});
    }
  });
  a.c_n.copy_(c);
}

template <class Launcher>
void run_stepwise(const BackwardLayer& a, const Launcher& launch) {
  const Sizes& n = a.n;
  const Sequence q = sequence(a);
  const int64_t rows = q.rows(), steps = n.B ? q.steps() : 0;
  const bool has_c = a.cell.S > 1, projected = !a.w.w_hr.empty(), norm = a.clip.kind == Clip::kNorm;
  const bool recurrent = a.cell.recurrent;
  const int64_t beside_h = a.cell.C() * n.H;
  const auto carried = [&](int64_t width, at::ScalarType type) {
    return at::empty({n.D, rows, width}, a.y.options().dtype(type));
  };
  const at::ScalarType io = a.y.scalar_type(), arithmetic = a.flow.scalar_type();
  const Tensor w_hh = recurrent ? stacked(a.w.w_hh, n.heads) : Tensor();  // [D, G*H, R]
  const Tensor dh = carried(n.R, arithmetic), dc = carried(beside_h, arithmetic);
  const Tensor dgh = carried(recurrent ? a.cell.G * n.H : 0, io).zero_();
  const Tensor dprojected = carried(projected ? n.R : 0, io).zero_();
  Tensor dh_through = carried(recurrent ? n.R : 0, io), dh_raw = carried(projected ? n.H : 0, io);
  const Tensor w_hr = projected ? stacked(a.w.w_hr, n.heads) : Tensor();  // [D, R, H]
  const bool bounded = norm && !a.cell.normed;                            // by a step of its own
  const Tensor unbounded = carried(bounded ? (a.cell.G + a.cell.A) * n.H : 0, at::kDouble);
  const Tensor dgx = unbounded.narrow(2, 0, bounded ? a.cell.G * n.H : 0);
  Tensor norms = at::empty({n.D, norm ? rows : 0}, unbounded.options());
  const Tensor all_dh = at::zeros(a.call.record ? n.shape({n.D, n.R}) : at::DimVector{0}, unbounded.options());
  dispatch_dtype(io, [&]<class IO> {
    using Wide = Arithmetic<IO>;
    const Backward<IO> call = parameters<IO>(a);
    const Carried<IO> c{pointer<Wide>(dh),          pointer<Wide>(dc),       pointer<IO>(dgh),
                        pointer<IO>(dh_through),    pointer<IO>(dprojected), pointer<IO>(dh_raw),
                        pointer<double>(unbounded), pointer<double>(norms),  pointer<double>(all_dh)};
    launch(BackwardBegin<IO>{q, n.R, call.dh_n, c.dh});
    if (has_c) launch(BackwardBegin<IO>{q, beside_h, call.dc_n, c.dc});
    std::optional<NormedBackwardSteps<IO>> normed;
    if (a.cell.normed) {
      normed.emplace(a, call, c, norms);
      if (steps > 0) normed->begin(steps, launch);
    }
    for (int64_t s = steps - 1; s >= 0; --s) {
      if (recurrent && s + 1 < steps) at::bmm_out(dh_through, dgh, w_hh);
      if (projected) {
        launch(BackwardProject<IO>{call, s, c});
        at::bmm_out(dh_raw, dprojected, w_hr);
      }
      if (normed) {
        normed->launch(s, launch);
        continue;
      }
      launch(BackwardCell<IO>{call, s, c});
      if (!norm) continue;
      at::linalg_vector_norm_out(norms, dgx, 2, {2});
      launch(BackwardBound<IO>{call, s, c});
    }
    if (!a.call.initial) return;
    if (recurrent && steps > 0) at::bmm_out(dh_through, dgh, w_hh);
    launch(BackwardFinish<IO>{q, n.R, c.dh_through, call.h_mask, c.dh, call.dh0});
    if (has_c) launch(BackwardFinish<IO>{q, beside_h, nullptr, nullptr, c.dc, call.dc0});
  });
  if (a.call.record) a.flow.copy_(at::linalg_vector_norm(all_dh, 2, {-1}));
}

}  // namespace rnn::cuda
