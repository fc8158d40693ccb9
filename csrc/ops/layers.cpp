#include "ops/layers.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "ops/products.h"

namespace rnn {

Tensor fresh(at::IntArrayRef shape, const at::TensorOptions& options) {
  // torch's own function fills it where deterministic mode asks for that; without its dispatcher it takes half the
  // time.
  if (!options.device().is_cpu() || at::globalContext().deterministicAlgorithms()) return at::empty(shape, options);
  Tensor t = at::detail::empty_cpu(shape, options);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  if (t.nbytes() >= 2 * kHugePage) {
    const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = (address + t.nbytes()) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: nothing depends on its being heard
  }
#endif
  return t;
}

namespace {

// Rows [first, first + count) of a contiguous tensor [rows, ...], or one of them without that dimension. Below autograd
// nobody asks where a view comes from, so that torch's own, which takes several times as long, has nothing to add.
Tensor rows_of(const Tensor& all, int64_t first, int64_t count, bool keep_dimension) {
  TORCH_INTERNAL_ASSERT(all.is_contiguous() && first >= 0 && first + count <= all.size(0));
  c10::SmallVector<int64_t, 6> shape(all.sizes().begin() + !keep_dimension, all.sizes().end());
  if (keep_dimension) shape[0] = count;
  Tensor found = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(all.storage()), all.key_set(), all.dtype());
  found.unsafeGetTensorImpl()->set_sizes_and_strides(shape, all.strides().slice(!keep_dimension),
                                                     all.storage_offset() + first * all.stride(0));
  return found;
}

// The part of layer `index` of a tensor [L, ...], in its place; an empty one was not kept. That of an only layer keeps
// its dimension of size 1, which nobody minds, and which takes time to leave out.
Tensor part(const Tensor& all, const Sizes& n, int64_t index) {
  return n.L == 1 || all.dim() < 2 || !all.numel() ? all : rows_of(all, index, 1, false);
}
OptionalTensor part(const OptionalTensor& all, const Sizes& n, int64_t index) {
  return all ? OptionalTensor(part(*all, n, index)) : std::nullopt;
}
// The same of states [L*D, ...].
Tensor states_part(const Tensor& all, const Sizes& n, int64_t index) {
  return n.L == 1 || !all.numel() ? all : rows_of(all, index * n.D, n.D, true);
}
OptionalTensor states_part(const OptionalTensor& all, const Sizes& n, int64_t index) {
  return all ? OptionalTensor(states_part(*all, n, index)) : std::nullopt;
}

LayerWeights::List weights_of(const Weights& weights, Weight kind, int64_t layer, const Sizes& n) {
  LayerWeights::List list;
  for (int64_t d = 0; weights.has(kind) && d < n.D / n.heads; ++d)
    list.push_back(weights.get(kind, layer, d).contiguous());
  return list;
}
LayerWeights::List params_of(const Weights& weights, int64_t layer, const Sizes& n) {
  LayerWeights::List list;
  for (int64_t d = 0; weights.params() && d < n.D / n.heads; ++d) {
    std::vector<Tensor> rows;
    for (int64_t k = 0; k < weights.params(); ++k) rows.push_back(weights.param(k, layer, d).reshape({n.heads, n.H}));
    list.push_back(at::stack(rows, 1));
  }
  return list;
}

}  // namespace

Tensor merge(const Tensor& y, Merge mode) {
  if (mode == Merge::kConcat) return y;
  const auto parts = y.chunk(2, -1);
  if (mode == Merge::kMul) return parts[0] * parts[1];
  const Tensor total = parts[0] + parts[1];
  return mode == Merge::kMean ? total / 2 : total;
}

Tensor rows_of_steps(const Tensor& starts, const c10::SymInt& N) {
  const Tensor first = starts.narrow_symint(0, 0, starts.sym_size(0) - 1);
  return at::arange(N, starts.options()) - at::repeat_interleave_symint(first, starts.diff(), 0, N);
}

Tensor of_steps(const Tensor& mask, const Steps& steps, const c10::SymInt& N) {
  const bool repeats = steps.starts && mask.dim() == 3;
  return repeats ? mask.select(0, 0).index_select(0, rows_of_steps(*steps.starts, N)) : mask;
}

Tensor project_input(const ForwardLayer& a) {
  TORCH_CHECK(!batch_invariant(), "rnnkernels.batch_invariant: expected a CPU tensor, got one on ", a.x.device(),
              ", where torch's products depend on the size of the batch. Move the layer to the CPU, or switch it off.");
  const Sizes& n = a.n;
  const int64_t width = n.heads * a.cell.G * n.H, all = n.D / n.heads * width;
  const bool shared = a.saved.numel() && a.cell.K == a.cell.G;
  const Tensor gx = shared ? a.saved : fresh(n.shape({n.D, a.cell.G * n.H}), a.x.options());
  const Tensor x = a.x.reshape({n.N, n.I});
  for (int64_t d = 0; d < n.D / n.heads && gx.numel(); ++d) {
    Tensor out = gx.view({n.N, all}).narrow(1, d * width, width);
    at::mm_out(out, x, a.w.w_ih[d].t());
  }
  return gx;
}

ForwardRun::ForwardRun(ForwardCall& call) : Run(call) {
  const auto options = call.x.options();
  const bool c = cell_.C() > 0, all = call.save || call.all_states;
  if (!n_.merged()) out_.y = fresh(n_.shape({n_.width()}), options);
  out_.h_n = states(true, n_.R, options);
  out_.c_n = states(c, cell_.C() * n_.H, options);
  out_.ys = steps(all && n_.inner(), n_.inner(), {n_.D * n_.R}, options);
  out_.c = steps(c && all, n_.L, {n_.D, cell_.C() * n_.H}, options);
  out_.h_raw = steps(call.save && projected(), n_.L, {n_.D, n_.H}, options);
  out_.saved = steps(call.save && cell_.K, n_.L, {n_.D, cell_.K * n_.H}, options);
}

ForwardLayer ForwardRun::layer(int64_t l, const Tensor& x) {
  Sizes n = n_;
  n.I = x.size(-1);
  Tensor y;
  if (l + 1 == n.L && !n.merged()) {
    y = out_.y;
  } else {
    y = out_.ys.numel() ? rows_of(out_.ys, l, 1, false) : fresh(n.shape({n.D * n.R}), x.options());
    if (l + 1 == n.L) last_ = y;
  }
  return {call_,
          cell_,
          n,
          l,
          x.numel() == 0 || x.stride(-1) == 1 ? x : x.contiguous(),
          {weights_of(weights_, kWIh, l, n), weights_of(weights_, kWHh, l, n), weights_of(weights_, kBIh, l, n),
           weights_of(weights_, kBHh, l, n), weights_of(weights_, kWHr, l, n), params_of(weights_, l, n)},
          states_part(call_.h_mask, n, l),
          states_part(call_.h0, n, l),
          states_part(call_.c0, n, l),
          std::move(y),
          states_part(out_.h_n, n, l),
          states_part(out_.c_n, n, l),
          part(out_.c, n, l),
          part(out_.h_raw, n, l),
          part(out_.saved, n, l)};
}

Tensor ForwardRun::above(const ForwardLayer& layer) const {
  const Tensor y = n_.merged() ? merge(layer.y, n_.merge) : layer.y;
  return call_.masks ? y * mask(layer.index) : y;
}

ForwardOutputs ForwardRun::outputs() && {
  if (n_.merged()) out_.y = merge(last_, n_.merge);
  return std::move(out_);
}

BackwardRun::BackwardRun(BackwardCall& call) : Run(call), clip_(find_clip(call.clip, call.bound)) {
  const auto options = call.y.options();
  const auto wide = options.dtype(call.y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  out_.dgates = call.over_saved ? call.saved : steps(true, n_.L, {n_.D, cell_.columns() * n_.H}, options);
  out_.dh0 = states(call.initial, n_.R, options);
  out_.dc0 = states(call.initial && cell_.C() > 0, cell_.C() * n_.H, options);
  out_.dproj = steps(projected(), n_.L, {n_.D, n_.R}, options);
  out_.flow = steps(call.record, n_.L, {n_.D}, wide);
  const int64_t rows = n_.windows(call.window) * n_.B;
  out_.dunit = cell_.P ? at::zeros({n_.L, rows, n_.D, cell_.P * n_.H}, wide) : fresh({0}, wide);
}

BackwardLayer BackwardRun::layer(int64_t l, OptionalTensor dy) {
  LayerWeights w;
  w.w_hh = weights_of(weights_, kWHh, l, n_);
  w.w_hr = weights_of(weights_, kWHr, l, n_);
  w.unit = params_of(weights_, l, n_);
  return {call_,
          cell_,
          n_,
          l,
          clip_,
          std::move(dy),
          states_part(call_.dh_n, n_, l),
          states_part(call_.dc_n, n_, l),
          part(call_.dc, n_, l),
          std::move(w),
          states_part(call_.h_mask, n_, l),
          states_part(call_.h0, n_, l),
          states_part(call_.c0, n_, l),
          y_of(l),
          part(call_.c, n_, l),
          part(call_.saved, n_, l),
          part(out_.dgates, n_, l),
          states_part(out_.dh0, n_, l),
          states_part(out_.dc0, n_, l),
          part(out_.dproj, n_, l),
          part(out_.flow, n_, l),
          part(out_.dunit, n_, l)};
}

Tensor BackwardRun::y_of(int64_t l) const {
  return l + 1 == n_.L && !n_.merged() ? call_.y : rows_of(call_.ys, l, 1, false);
}

Tensor BackwardRun::unmerged(const Tensor& gradient, int64_t l) const {
  Tensor dy = fresh(n_.shape({n_.D * n_.R}), gradient.options());
  const int64_t width = n_.width();
  const Tensor forward = dy.narrow(-1, 0, width), reverse = dy.narrow(-1, width, width);
  if (n_.merge == Merge::kMul) {
    const Tensor y = y_of(l);
    forward.copy_(gradient * y.narrow(-1, width, width));
    reverse.copy_(gradient * y.narrow(-1, 0, width));
  } else {
    forward.copy_(gradient);
    reverse.copy_(gradient);
    if (n_.merge == Merge::kMean) dy.div_(2);
  }
  return dy;
}

OptionalTensor BackwardRun::from_outside(int64_t l) const {
  OptionalTensor dy;
  if (l + 1 == n_.L && call_.dy) dy = n_.merged() ? unmerged(*call_.dy, l) : *call_.dy;
  if (l >= n_.inner() || !call_.dys) return dy;
  const Tensor of_states = rows_of(*call_.dys, l, 1, false);
  return dy ? dy->add(of_states) : of_states;
}

OptionalTensor BackwardRun::whole(int64_t l, const Tensor& dgates_above) const {
  const int64_t rows = cell_.G * n_.H;
  Tensor dx;
  if (call_.invariant || products_for(dgates_above)) {
    std::vector<Tensor> w_ih;
    for (int64_t d = 0; d < n_.D; ++d) w_ih.push_back(weights_.of_head(kWIh, l + 1, d));
    dx = input_gradient_op().call(dgates_above.view(n_.shape({n_.D, cell_.columns() * n_.H})), w_ih);
  } else {
    const Tensor columns = dgates_above.view({n_.N, n_.D, cell_.columns() * n_.H});
    dx = fresh({n_.N, n_.width()}, columns.options());
    for (int64_t d = 0; d < n_.D; ++d) {
      const Tensor dgx = columns.select(1, d).narrow(1, 0, rows);
      const Tensor w_ih = weights_.of_head(kWIh, l + 1, d);
      d == 0 ? at::mm_out(dx, dgx, w_ih) : dx.addmm_(dgx, w_ih);
    }
    dx = dx.view(n_.shape({n_.width()}));
  }
  if (call_.masks) dx.mul_(mask(l));
  if (n_.merged()) dx = unmerged(dx, l);
  const OptionalTensor outside = from_outside(l);
  return outside ? dx.add_(*outside) : dx;
}

}  // namespace rnn
