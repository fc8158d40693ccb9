#include "cpu/single.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

namespace rnn::cpu {
namespace {

constexpr int64_t kWorkOfThread = 1 << 17;  // multiplications that are worth waking another thread for
constexpr int64_t kWorkOfUnit = 64;         // those that a cell's arithmetic takes as long as
constexpr int64_t kFewRows = 16;            // that read the weights once each sooner than these are packed for all

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

// One row is a matter of reading the weights once, and that is done here; more rows are torch's matrix product, or,
// where there is none, a few of them one after the other.
bool row_by_row(const Sizes& n, at::ScalarType type) { return n.B == 1 || !has_product(type); }

template <class Arguments>
bool is_single(const Arguments& a, const Sizes& n, at::ScalarType type) {
  const bool rows = n.B > 0 && (has_product(type) || n.B <= kFewRows);
  return n.T == 1 && n.D == 1 && rows && !a.steps.lengths && !a.steps.reset && a.w_hr.empty();
}

}  // namespace

bool is_single_step(const ForwardArguments& a, const Sizes& n) {
  return n.I > 0 && !batch_invariant() && is_single(a, n, a.x.scalar_type());
}
bool is_single_step(const BackwardArguments& a, const Sizes& n) {
  return a.clip.kind == Clip::kNone && !a.flow && !a.invariant && is_single(a, n, a.y.scalar_type());
}

template <class IO>
ForwardResults forward_single(const ForwardArguments& a, const Sizes& n, const Entry<IO>& entry) {
  const Tensor& like = a.x;
  const bool c = a.cell.S > 1, row = row_by_row(n, a.x.scalar_type());
  const int64_t gates = a.cell.G * n.H, saved = a.save ? a.cell.K * n.H : 0;
  ForwardTensors t;
  t.y = empty({1, n.B, n.H}, like);
  t.h_n = empty({1, n.B, n.H}, like);
  t.c_n = c ? empty({1, n.B, n.H}, like) : empty({0}, like);
  t.c = c && (a.save || a.all_c) ? empty({1, n.B, 1, n.H}, like) : empty({0}, like);
  t.h_raw = empty({0}, like);
  t.saved = saved ? empty({1, n.B, 1, saved}, like) : empty({0}, like);
  for (TensorList list : {a.w_hh, a.b_ih, a.b_hh}) TORCH_INTERNAL_ASSERT(list.size() <= 1);
  t.w_hh = {a.w_hh[0].contiguous()};
  if (!a.b_ih.empty()) t.b_ih = {a.b_ih[0].contiguous()};
  if (!a.b_hh.empty()) t.b_hh = {a.b_hh[0].contiguous()};
  Tensor gh;
  t.x = a.x.contiguous();
  t.w_ih = {row ? a.w_ih[0].contiguous() : a.w_ih[0]};
  if (!row) {
    t.gx = saved == gates ? t.saved.view({n.B, gates}) : empty({n.B, gates}, like);
    gh = empty({n.B, gates}, like);
    at::mm_out(t.gx, t.x.view({n.B, n.I}), t.w_ih[0].t());
    at::mm_out(gh, a.h0.view({n.B, n.H}), t.w_hh[0].t());
  }
  const Forward<IO> p = parameters<IO>(a, n, t);
  const int64_t work = row ? n.B * a.cell.G * (n.I + n.H) : n.B * kWorkOfUnit;
  share_out(n.H, work, [&](int64_t first, int64_t last) {
    entry.forward_step(a.cell.number, p, row ? nullptr : pointer<const IO>(gh), first, last);
  });
  return t.results();
}

template <class IO>
BackwardResults backward_single(const BackwardArguments& a, const Sizes& n, const Entry<IO>& entry) {
  const Tensor& like = a.y;
  const bool c = a.cell.S > 1, row = n.B == 1;
  const int64_t gates = a.cell.G * n.H;
  BackwardTensors t;
  t.w_hh = {row ? a.w_hh[0].contiguous() : a.w_hh[0]};
  t.dgates = a.over_saved ? a.saved : empty({1, n.B, 1, gates + a.cell.A * n.H}, like);
  t.dh0 = a.initial ? empty({1, n.B, n.H}, like) : empty({0}, like);
  t.dc0 = a.initial && c ? empty({1, n.B, n.H}, like) : empty({0}, like);
  t.dproj = empty({0}, like);
  using T = Arithmetic<IO>;
  t.flow = at::detail::empty_cpu({0}, like.options().dtype(c10::CppTypeToScalarType<T>::value));
  const Tensor dgh = at::detail::empty_cpu({n.B, gates}, t.flow.options());
  const Backward<IO> p = parameters<IO>(a, n, t);
  share_out(n.H, n.B * kWorkOfUnit,
            [&](int64_t first, int64_t last) { entry.backward_step(a.cell.number, p, pointer<T>(dgh), first, last); });
  if (!a.initial) return t.results();
  if (row) {
    share_out(n.H, gates, [&](int64_t first, int64_t last) {
      entry.add_product(pointer<const T>(dgh), p.w_hh[0], gates, n.H, first, last, p.dh0);
    });
  } else {
    // Of 16 bits torch takes rounded factors, as for the gradients of the weights.
    t.dh0.view({n.B, n.H}).addmm_(dgh.to(like.scalar_type()), t.w_hh[0]);
  }
  return t.results();
}

#define RNN_SINGLE(IO)                                                                                 \
  template ForwardResults forward_single<IO>(const ForwardArguments&, const Sizes&, const Entry<IO>&); \
  template BackwardResults backward_single<IO>(const BackwardArguments&, const Sizes&, const Entry<IO>&);
RNN_SINGLE(float)
RNN_SINGLE(double)
RNN_SINGLE(BFloat16)
RNN_SINGLE(Float16)
#undef RNN_SINGLE

}  // namespace rnn::cpu
