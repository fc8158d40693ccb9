// The stepwise loops over time: per step one product through torch for all directions and rows, then one launch of what
// follows it. The launcher is a parameter, so that the same loops run on a CPU, where they are tested.
//
// A launcher is called with a step of step.h and runs it for every unit, after all that was asked for before.
#pragma once

#include "common/ops.h"
#include "common/storage.h"
#include "cuda/step.h"

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

// The weights of all directions as one operand [D, rows, columns].
inline Tensor stacked(const std::vector<Tensor>& weights) {
  return weights.size() == 1 ? weights[0].unsqueeze(0) : at::stack(weights);
}

// A state or gradient that the loop carries in the arithmetic type, for the whole sequence: `value` is the result
// itself where that has this type, else memory of its own.
template <class IO>
struct Carried {
  Tensor value;

  Carried(const Tensor& result, const OptionalTensor& first)
      : value(result.scalar_type() == kType ? result : at::empty_like(result, result.options().dtype(kType))) {
    if (first) {
      value.copy_(*first);
    } else {
      value.zero_();
    }
  }

  Arithmetic<IO>* data() const { return pointer<Arithmetic<IO>>(value); }

  void write(Tensor result) const {
    if (!result.is_same(value)) result.copy_(value);
  }

 private:
  static constexpr at::ScalarType kType = c10::CppTypeToScalarType<Arithmetic<IO>>::value;
};

template <class Launcher>
ForwardResults run_forward(ForwardArguments& a, const Launcher& launch) {
  const Sizes n = check(a);
  ForwardTensors t = prepare(a, n);
  const int64_t steps = n.B ? n.T : 0;
  const bool projected = !t.w_hr.empty();
  const Tensor w_hh = stacked(t.w_hh).transpose(1, 2);  // [D, R, G*H]
  Tensor gh = at::empty({n.D, n.B, a.cell.G * n.H}, a.x.options());
  Tensor w_hr, raw, out;
  if (projected) {
    w_hr = stacked(t.w_hr).transpose(1, 2);  // [D, H, R]
    raw = at::empty({n.D, n.B, n.H}, a.x.options());
    out = at::empty_like(a.h0);  // [D, B, R]
  }
  t.h_n.copy_(a.h0);  // carries h
  dispatch_dtype(a.x.scalar_type(), [&]<class IO> {
    const Forward<IO> call = parameters<IO>(a, n, t);
    const Carried<IO> c(t.c_n, a.c0);
    IO* h = pointer<IO>(t.h_n);
    for (int64_t s = 0; s < steps; ++s) {
      at::bmm_out(gh, t.h_n, w_hh);
      launch(ForwardCell<IO>{call, s, pointer<IO>(gh), h, c.data(), projected ? pointer<IO>(raw) : nullptr});
      if (!projected) continue;
      at::bmm_out(out, raw, w_hr);
      launch(ForwardProject<IO>{call, s, pointer<IO>(out), h});
    }
    c.write(t.c_n);
  });
  return t.results();
}

template <class Launcher>
BackwardResults run_backward(BackwardArguments& a, const Launcher& launch) {
  const Sizes n = check(a);
  const BackwardTensors t = prepare(a, n);
  const int64_t steps = n.B ? n.T : 0;
  const bool projected = !t.w_hr.empty();
  const Tensor w_hh = stacked(t.w_hh);  // [D, G*H, R]
  const Tensor dgh = at::empty({n.D, n.B, a.cell.G * n.H}, a.y.options());
  Tensor dh_through = at::empty_like(a.h0);  // [D, B, R]
  Tensor w_hr, draw, dprojected;
  if (projected) {
    w_hr = stacked(t.w_hr);  // [D, R, H]
    draw = at::empty({n.D, n.B, n.H}, a.y.options());
    dprojected = at::empty_like(a.h0);  // [D, B, R]
  }
  dispatch_dtype(a.y.scalar_type(), [&]<class IO> {
    const Backward<IO> call = parameters<IO>(a, n, t);
    const Carried<IO> dh(t.dh0, a.dh_n), dc(t.dc0, a.dc_n);
    const IO* through = pointer<IO>(dh_through);
    for (int64_t s = steps - 1; s >= 0; --s) {
      if (s + 1 < steps) at::bmm_out(dh_through, dgh, w_hh);
      if (projected) {
        launch(BackwardProject<IO>{call, s, through, dh.data(), pointer<IO>(dprojected)});
        at::bmm_out(draw, dprojected, w_hr);
      }
      launch(BackwardCell<IO>{call, s, through, projected ? pointer<IO>(draw) : nullptr, dh.data(), dc.data(),
                              pointer<IO>(dgh)});
    }
    if (steps > 0) {
      at::bmm_out(dh_through, dgh, w_hh);
      launch(BackwardFinish<IO>{call.seq, through, dh.data()});
    }
    dh.write(t.dh0);
    dc.write(t.dc0);
  });
  return t.results();
}

}  // namespace rnn::cuda
