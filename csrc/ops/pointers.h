// The pointers that kernels take, from the tensors of a layer.
#pragma once

#include "ops/layers.h"

namespace rnn {

// What a kernel reads is asked for as pointer<const IO>: memory that tensors share until one is written to (torch's
// copy-on-write) stays shared then.
template <class IO>
IO* pointer(const Tensor& t) {
  if (!t.defined() || !t.numel()) return nullptr;
  if constexpr (std::is_const_v<IO>) {
    return static_cast<IO*>(t.const_data_ptr());
  } else {
    return static_cast<IO*>(t.mutable_data_ptr());
  }
}
template <class IO>
IO* pointer(const OptionalTensor& t) {
  static_assert(std::is_const_v<IO>, "what is optional is read");
  return t ? pointer<IO>(*t) : nullptr;
}

inline Sequence sequence_of(const Steps& steps, const Sizes& n, int64_t window) {
  return {n.T,
          n.B,
          n.D,
          n.H,
          n.R,
          pointer<const int64_t>(steps.lengths),
          n.packed ? pointer<const int64_t>(steps.starts) : nullptr,
          pointer<const bool>(steps.reset),
          window,
          n.heads};
}
// `layer` counts from the first one of the call.
inline Noise noise_of(const Steps& steps, const Sizes& n, int64_t layer) {
  return {pointer<const double>(steps.noise), pointer<const int64_t>(steps.draws), layer * n.D};
}
inline Sequence sequence(const ForwardLayer& a) { return sequence_of(a.call, a.n, 0); }
inline Sequence sequence(const BackwardLayer& a) { return sequence_of(a.call, a.n, a.call.window); }

// gx: what project_input has returned, if the loop does not project the input.
template <class IO>
Forward<IO> parameters(const ForwardLayer& a, const Tensor& gx = {}) {
  Forward<IO> p{};
  p.seq = sequence(a);
  p.noise = noise_of(a.call, a.n, a.index);
  p.I = a.cell.normed ? 0 : a.n.I;
  p.x_time = a.n.packed ? 0 : a.x.stride(0);
  p.x_batch = a.x.stride(a.n.packed ? 0 : 1);
  p.x = pointer<const IO>(a.x);
  p.gx = pointer<const IO>(gx);
  for (size_t d = 0; d < a.w.w_ih.size(); ++d) {
    p.w_ih[d] = pointer<const IO>(a.w.w_ih[d]);
    if (!a.w.w_hh.empty()) p.w_hh[d] = pointer<const IO>(a.w.w_hh[d]);
    if (!a.w.b_ih.empty()) p.b_ih[d] = pointer<const IO>(a.w.b_ih[d]);
    if (!a.w.b_hh.empty()) p.b_hh[d] = pointer<const IO>(a.w.b_hh[d]);
    if (!a.w.w_hr.empty()) p.w_hr[d] = pointer<const IO>(a.w.w_hr[d]);
    if (!a.w.unit.empty()) p.unit[d] = pointer<const IO>(a.w.unit[d]);
  }
  p.h_mask = pointer<const IO>(a.h_mask);
  p.h0 = pointer<const IO>(a.h0);
  p.c0 = pointer<const IO>(a.c0);
  p.y = pointer<IO>(a.y);
  p.h_n = pointer<IO>(a.h_n);
  p.c_n = pointer<IO>(a.c_n);
  p.c = pointer<IO>(a.c);
  p.h_raw = pointer<IO>(a.h_raw);
  p.saved = pointer<IO>(a.saved);
  return p;
}

template <class IO>
Backward<IO> parameters(const BackwardLayer& a) {
  Backward<IO> p{};
  p.seq = sequence(a);
  p.clip = a.clip;
  p.noise = noise_of(a.call, a.n, a.index);
  p.dgates = pointer<IO>(a.dgates);  // first: where it is saved itself, writing may move it
  p.dy = pointer<const IO>(a.dy);
  p.dh_n = pointer<const IO>(a.dh_n);
  p.dc_n = pointer<const IO>(a.dc_n);
  p.dc = pointer<const IO>(a.dc);
  for (int64_t d = 0; d < a.n.D / a.n.heads; ++d) {
    if (!a.w.w_hh.empty()) p.w_hh[d] = pointer<const IO>(a.w.w_hh[d]);
    if (!a.w.w_hr.empty()) p.w_hr[d] = pointer<const IO>(a.w.w_hr[d]);
    if (!a.w.unit.empty()) p.unit[d] = pointer<const IO>(a.w.unit[d]);
  }
  p.h_mask = pointer<const IO>(a.h_mask);
  p.h0 = pointer<const IO>(a.h0);
  p.c0 = pointer<const IO>(a.c0);
  p.y = pointer<const IO>(a.y);
  p.c = pointer<const IO>(a.c);
  p.saved = pointer<const IO>(a.saved);
  p.dproj = pointer<IO>(a.dproj);
  p.dh0 = pointer<IO>(a.dh0);
  p.dc0 = pointer<IO>(a.dc0);
  p.flow = pointer<Arithmetic<IO>>(a.flow);
  p.dunit = pointer<Arithmetic<IO>>(a.dunit);
  return p;
}

}  // namespace rnn
