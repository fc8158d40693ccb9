// The torch side of every backend: checks of every tensor, the input projection, outputs, and the pointers that kernels
// take. Included only by the files that register ops.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "common/layout.h"

namespace rnn {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;

struct CellInfo {
  int number;  // in AllCells
  std::string_view name, gates;
  int G, S, K, A;
  bool reads_h;
};
const CellInfo& find_cell(std::string_view name);

// Which steps each row has, and where its state is reset: see Sequence in layout.h.
struct Steps {
  OptionalTensor lengths, starts, reset;
};

// Everything that sequence_forward and sequence_backward take; shapes as in layout.h, x [T, B, I], or packed [N, I].
struct ForwardArguments {
  CellInfo cell;
  Tensor x;
  TensorList w_ih, w_hh, b_ih, b_hh, w_hr;  // one per direction; biases and w_hr may be empty
  Tensor h0;
  OptionalTensor c0;
  Steps steps;
  bool save;      // keep what backward needs
  bool all_c;     // keep all c
  int64_t layer;  // for the names of parameters in errors; negative: a single cell
};

struct BackwardArguments {
  CellInfo cell;
  OptionalTensor dy, dh_n, dc_n, dc;
  TensorList w_hh, w_hr;
  Tensor h0;
  OptionalTensor c0;
  Tensor y, c, saved;
  Steps steps;
  int64_t window;  // 0: none
  Clip clip;
  bool flow;        // keep the norms of the gradients of all h
  bool initial;     // compute the gradients of h0 and c0
  bool invariant;   // of the batch
  bool over_saved;  // write dgates over saved
};
Clip find_clip(std::string_view kind, double bound);
const char* clip_name(Clip::Kind kind);

// New memory. Large blocks on the CPU come from the kernel page by page, which costs more than what is computed on some
// of them: huge pages are asked for.
Tensor fresh(at::IntArrayRef shape, const at::TensorOptions& options);

struct Sizes {
  int64_t T, B, I, D, H, R;
  int64_t N;    // of all steps that have a place in memory: T*B, or the sum of the lengths
  bool packed;  // [N] takes the place of [T, B]

  at::DimVector shape(std::initializer_list<int64_t> after) const {
    at::DimVector sizes = packed ? at::DimVector{N} : at::DimVector{T, B};
    sizes.append(after.begin(), after.end());
    return sizes;
  }
};

// Checks every tensor and makes all but the weights of the input contiguous; raises naming what is wrong.
Sizes check(ForwardArguments& a);
Sizes check(BackwardArguments& a);

struct ForwardTensors {
  Tensor gx;  // W_ih x of all steps, where the backend asks for it
  Tensor x;   // features next to each other
  std::vector<Tensor> w_ih, w_hh, b_ih, b_hh, w_hr;
  Tensor y, h_n, c_n, c, h_raw, saved;  // empty where not kept

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> results() const { return {y, h_n, c_n, c, h_raw, saved}; }
};
// Allocates the outputs. A backend whose loop does not project the input asks for gx; saved then takes its memory where
// their sizes agree.
enum class Input { kRaw, kProjected };
ForwardTensors prepare(const ForwardArguments& a, const Sizes& n, Input input);

// Whether results of a row may not depend on the batch that it is in: a setting of the process, like those of torch's
// global context.
bool batch_invariant();
void set_batch_invariant(bool on);

// Checks dgates [T, B, D, (G+A)*H], or [N, D, (G+A)*H], and w_ih [G*H, I] each.
void check_input_gradient(const Tensor& dgates, TensorList w_ih);

struct BackwardTensors {
  std::vector<Tensor> w_hh, w_hr;
  Tensor dgates, dh0, dc0, dproj, flow;  // empty where there is none

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> results() const { return {dgates, dh0, dc0, dproj, flow}; }
};
BackwardTensors prepare(const BackwardArguments& a, const Sizes& n);

// What a kernel reads is asked for as pointer<const IO>: memory that tensors share until one is written to (torch's
// copy-on-write) stays shared then.
template <class IO>
IO* pointer(const Tensor& t) {
  if (!t.numel()) return nullptr;
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

template <class Arguments>
Sequence sequence(const Arguments& a, const Sizes& n, int64_t window) {
  return {n.T,
          n.B,
          n.D,
          n.H,
          n.R,
          pointer<const int64_t>(a.steps.lengths),
          n.packed ? pointer<const int64_t>(a.steps.starts) : nullptr,
          pointer<const bool>(a.steps.reset),
          window};
}

template <class IO>
Forward<IO> parameters(const ForwardArguments& a, const Sizes& n, const ForwardTensors& t) {
  Forward<IO> p{};
  p.seq = sequence(a, n, 0);
  p.I = n.I;
  p.x_time = n.packed ? 0 : t.x.stride(0);
  p.x_batch = t.x.stride(n.packed ? 0 : 1);
  p.x = pointer<const IO>(t.x);
  p.gx = t.gx.defined() ? pointer<const IO>(t.gx) : nullptr;
  for (int64_t d = 0; d < n.D; ++d) {
    p.w_ih[d] = pointer<const IO>(t.w_ih[d]);
    p.w_hh[d] = pointer<const IO>(t.w_hh[d]);
    if (!t.b_ih.empty()) p.b_ih[d] = pointer<const IO>(t.b_ih[d]);
    if (!t.b_hh.empty()) p.b_hh[d] = pointer<const IO>(t.b_hh[d]);
    if (!t.w_hr.empty()) p.w_hr[d] = pointer<const IO>(t.w_hr[d]);
  }
  p.h0 = pointer<const IO>(a.h0);
  p.c0 = pointer<const IO>(a.c0);
  p.y = pointer<IO>(t.y);
  p.h_n = pointer<IO>(t.h_n);
  p.c_n = pointer<IO>(t.c_n);
  p.c = pointer<IO>(t.c);
  p.h_raw = pointer<IO>(t.h_raw);
  p.saved = pointer<IO>(t.saved);
  return p;
}

template <class IO>
Backward<IO> parameters(const BackwardArguments& a, const Sizes& n, const BackwardTensors& t) {
  Backward<IO> p{};
  p.seq = sequence(a, n, a.window);
  p.clip = a.clip;
  p.dgates = pointer<IO>(t.dgates);  // first: where it is saved itself, writing may move it
  p.dy = pointer<const IO>(a.dy);
  p.dh_n = pointer<const IO>(a.dh_n);
  p.dc_n = pointer<const IO>(a.dc_n);
  p.dc = pointer<const IO>(a.dc);
  for (int64_t d = 0; d < n.D; ++d) {
    p.w_hh[d] = pointer<const IO>(t.w_hh[d]);
    if (!t.w_hr.empty()) p.w_hr[d] = pointer<const IO>(t.w_hr[d]);
  }
  p.h0 = pointer<const IO>(a.h0);
  p.c0 = pointer<const IO>(a.c0);
  p.y = pointer<const IO>(a.y);
  p.c = pointer<const IO>(a.c);
  p.saved = pointer<const IO>(a.saved);
  p.dproj = pointer<IO>(t.dproj);
  p.dh0 = pointer<IO>(t.dh0);
  p.dc0 = pointer<IO>(t.dc0);
  p.flow = pointer<Arithmetic<IO>>(t.flow);
  return p;
}

}  // namespace rnn
