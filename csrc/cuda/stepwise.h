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

// What the loops launch behind a product, forward and backward; of cells whose products are normalised, other steps
// (normed_stepwise.h).
template <class IO>
struct CellForwardSteps {
  const Forward<IO>& call;  // and what ForwardCell has
  const IO* gh;
  IO *h, *of_product;
  Arithmetic<IO>* c;
  IO* raw;

  template <class Launcher>
  void launch(int64_t s, const Launcher& launcher) const {
    launcher(ForwardCell<IO>{call, s, gh, h, of_product, c, raw});
  }
};

template <class IO>
class CellBackwardSteps {
 public:
  // norms [D, rows] of the gradients of the gates, if they are bounded by it.
  CellBackwardSteps(const BackwardLayer& a, const Backward<IO>& call, const Carried<IO>& carried, Tensor norms)
      : call_(call), carried_(carried), norms_(std::move(norms)) {
    if (!bounds()) return;
    const int64_t H = a.n.H, rows = call.seq.rows();
    unbounded_ = at::empty({a.n.D, rows, (a.cell.G + a.cell.A) * H}, norms_.options());
    dgx_ = unbounded_.narrow(2, 0, a.cell.G * H);
    carried_.unbounded = pointer<double>(unbounded_);
  }

  template <class Launcher>
  void begin(int64_t, const Launcher&) const {}
  template <class Launcher>
  void launch(int64_t s, const Launcher& launcher) {
    launcher(BackwardCell<IO>{call_, s, carried_});
    if (!bounds()) return;
    at::linalg_vector_norm_out(norms_, dgx_, 2, {2});
    launcher(BackwardBound<IO>{call_, s, carried_});
  }

 private:
  bool bounds() const { return call_.clip.kind == Clip::kNorm; }

  const Backward<IO>& call_;
  Carried<IO> carried_;
  Tensor norms_, unbounded_, dgx_;
};

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
    const auto run = [&](const auto& steps_of_cell) {
      for (int64_t s = 0; s < steps; ++s) {
        if (recurrent) at::bmm_out(gh, masked.defined() ? masked : a.h_n, w_hh);
        steps_of_cell.launch(s, launch);
        if (!projected) continue;
        at::bmm_out(out, raw, w_hr);
        launch(ForwardProject<IO>{call, s, pointer<const IO>(out), h, of_product});
      }
    };
    const IO* const product = pointer<const IO>(gh);
    if (a.cell.normed) return run(NormedForwardSteps<IO>(a, call, product, h, of_product, c, pointer<IO>(raw)));
    run(CellForwardSteps<IO>{call, product, h, of_product, pointer<Arithmetic<IO>>(c), pointer<IO>(raw)});
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
  const auto in_double = a.y.options().dtype(at::kDouble);
  const Tensor norms = at::empty({n.D, norm ? rows : 0}, in_double);
  const Tensor all_dh = at::zeros(a.call.record ? n.shape({n.D, n.R}) : at::DimVector{0}, in_double);
  dispatch_dtype(io, [&]<class IO> {
    using Wide = Arithmetic<IO>;
    const Backward<IO> call = parameters<IO>(a);
    const Carried<IO> c{pointer<Wide>(dh),       pointer<Wide>(dc),   pointer<IO>(dgh), pointer<IO>(dh_through),
                        pointer<IO>(dprojected), pointer<IO>(dh_raw), nullptr,          pointer<double>(norms),
                        pointer<double>(all_dh)};
    launch(BackwardBegin<IO>{q, n.R, call.dh_n, c.dh});
    if (has_c) launch(BackwardBegin<IO>{q, beside_h, call.dc_n, c.dc});
    const auto run = [&](auto&& steps_of_cell) {
      if (steps > 0) steps_of_cell.begin(steps, launch);
      for (int64_t s = steps - 1; s >= 0; --s) {
        if (recurrent && s + 1 < steps) at::bmm_out(dh_through, dgh, w_hh);
        if (projected) {
          launch(BackwardProject<IO>{call, s, c});
          at::bmm_out(dh_raw, dprojected, w_hr);
        }
        steps_of_cell.launch(s, launch);
      }
    };
    if (a.cell.normed) {
      run(NormedBackwardSteps<IO>(a, call, c, norms));
    } else {
      run(CellBackwardSteps<IO>(a, call, c, norms));
    }
    if (!a.call.initial) return;
    if (recurrent && steps > 0) at::bmm_out(dh_through, dgh, w_hh);
    launch(BackwardFinish<IO>{q, n.R, c.dh_through, call.h_mask, c.dh, call.dh0});
    if (has_c) launch(BackwardFinish<IO>{q, beside_h, nullptr, nullptr, c.dc, call.dc0});
  });
  if (a.call.record) a.flow.copy_(at::linalg_vector_norm(all_dh, 2, {-1}));
}

}  // namespace rnn::cuda
