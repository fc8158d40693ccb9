#include "cpu/single.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/mm.h>

#include "ops/pointers.h"
#include "ops/products.h"

namespace rnn::cpu {
namespace {

constexpr int64_t kWorkOfThread = 1 << 17;  // multiplications that are worth waking another thread for
constexpr int64_t kWorkOfUnit = 64;         // those that a cell's arithmetic takes as long as
constexpr int64_t kFewRows = 16;            // that read the weights once each sooner than these are packed for all
constexpr int64_t kDotRows = 8;             // that are multiplied sooner than packed weights are read and compared

Tensor empty(at::IntArrayRef shape, const Tensor& like) { return at::detail::empty_cpu(shape, like.options()); }

// Calls f(first, last) for ranges that make up n units, at once if all of them are enough work.
template <class F>
void share_out(int64_t n, int64_t work_of_unit, F&& f) {
  const int64_t grain = kWorkOfThread / (kStepUnits * std::max<int64_t>(work_of_unit, 1)) + 1;
  at::parallel_for(0, (n + kStepUnits - 1) / kStepUnits, grain,
                   [&](int64_t first, int64_t last) { f(first * kStepUnits, std::min(last * kStepUnits, n)); });
}

// Torch's matrix product knows no storage of 16 bits with sums in float32.
bool has_product(at::ScalarType type) { return type == at::kFloat || type == at::kDouble; }

// One row is a matter of reading the weights once, and that is done together with the cell; where there is no product,
// a few of them one after the other.
bool row_by_row(const Sizes& n, at::ScalarType type) { return n.B == 1 || !has_product(type); }

// A few rows read the weights once for all of them.
bool dots(const Sizes& n, at::ScalarType type) { return !row_by_row(n, type) && n.B <= kDotRows; }

// More rows are torch's product where a change of the weights follows; else the loop packs them once for many calls.
bool keeps_packs(const ForwardLayer& a, at::ScalarType type) {
  return !a.call.save && !row_by_row(a.n, type) && !dots(a.n, type);
}

template <class Layer>
bool is_single(const Layer& a, at::ScalarType type) {
  const Sizes& n = a.n;
  const bool rows = n.B > 0 && (has_product(type) || n.B <= kFewRows);
  const bool plain = !a.call.lengths && !a.call.reset && !a.h_mask && a.w.w_hr.empty();
  return n.T == 1 && n.D == 1 && rows && a.cell.recurrent && !a.cell.normed && plain;
}

}  // namespace

bool is_single_step(const ForwardLayer& a) {
  const at::ScalarType type = a.x.scalar_type();
  return a.n.I > 0 && !batch_invariant() && !keeps_packs(a, type) && is_single(a, type);
}
bool is_single_step(const BackwardLayer& a) {
  return a.clip.kind == Clip::kNone && !a.call.record && !a.call.invariant && is_single(a, a.y.scalar_type());
}

template <class IO>
void run_single(const ForwardLayer& a, const Entry<IO>& entry) {
  const Sizes& n = a.n;
  const bool row = row_by_row(n, a.x.scalar_type()), few = dots(n, a.x.scalar_type());
  const int64_t gates = a.cell.G * n.H;
  const Tensor x = row || few ? a.x.contiguous() : a.x;
  Tensor gx, gh;
  if (!row) {
    gx = a.saved.numel() == n.B * gates ? a.saved.view({n.B, gates}) : empty({n.B, gates}, a.x);
    gh = empty({n.B, gates}, a.x);
  }
  if (!row && !few) {
    at::mm_out(gx, x.reshape({n.B, n.I}), a.w.w_ih[0].t());
    at::mm_out(gh, a.h0.view({n.B, n.H}), a.w.w_hh[0].t());
  }
  Forward<IO> p = parameters<IO>(a, gx);
  p.x = pointer<const IO>(x);
  const int64_t work = row || few ? n.B * a.cell.G * (n.I + n.H) : n.B * kWorkOfUnit;
  const CellKernels<IO>& cell = kernels_of(a.cell, entry);
  share_out(n.H, work, [&](int64_t first, int64_t last) {
    for (int64_t g = 0; few && g < a.cell.G; ++g) {
      const int64_t from = g * n.H + first, to = g * n.H + last;
      entry.dots(p.x, n.B, p.w_ih[0], gates, n.I, from, to, pointer<IO>(gx));
      entry.dots(p.h0, n.B, p.w_hh[0], gates, n.H, from, to, pointer<IO>(gh));
    }
    cell.forward_step(p, row ? nullptr : pointer<const IO>(gh), first, last);
  });
}

template <class IO>
void run_single(const BackwardLayer& a, const Entry<IO>& entry) {
  using T = Arithmetic<IO>;
  const Sizes& n = a.n;
  const int64_t gates = a.cell.G * n.H;
  const Tensor dgh = at::detail::empty_cpu({n.B, gates}, a.y.options().dtype(c10::CppTypeToScalarType<T>::value));
  const Backward<IO> p = parameters<IO>(a);
  const CellKernels<IO>& cell = kernels_of(a.cell, entry);
  share_out(n.H, n.B * kWorkOfUnit,
            [&](int64_t first, int64_t last) { cell.backward_step(p, pointer<T>(dgh), first, last); });
  if (!a.dh0.numel()) return;
  if (n.B == 1) {
    share_out(n.H, gates, [&](int64_t first, int64_t last) {
      entry.add_product(pointer<const T>(dgh), p.w_hh[0], gates, n.H, first, last, p.dh0);
    });
  } else {
    // Of 16 bits it takes rounded factors, as for the gradients of the weights.
    const Tensor rounded = dgh.to(a.y.scalar_type()), dh0 = a.dh0.view({n.B, n.H});
    if (const Products* own = products_for(rounded)) {
      own->rows(dh0, rounded, a.w.w_hh[0], true);
    } else {
      dh0.addmm_(rounded, a.w.w_hh[0]);
    }
  }
}

#define RNN_SINGLE(IO)                                                 \
  template void run_single<IO>(const ForwardLayer&, const Entry<IO>&); \
  template void run_single<IO>(const BackwardLayer&, const Entry<IO>&);
RNN_SINGLE(float)
RNN_SINGLE(double)
RNN_SINGLE(BFloat16)
RNN_SINGLE(Float16)
#undef RNN_SINGLE

}  // namespace rnn::cpu
