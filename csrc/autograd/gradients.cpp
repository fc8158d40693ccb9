#include "autograd/gradients.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <atomic>

#include "autograd/gradient_sums.h"
#include "ops/products.h"
#include "ops/sizes.h"

namespace rnn {

// Callers free the gradients of a step's weights together, and the next step takes as much again. The C library of
// Linux hands what is free at the end of its memory back to the system where that is twice the largest block it has
// seen freed, and every page would be faulted in anew, step after step: so it is shown one block as large as all.
static void show_freed_together(const std::vector<Tensor>& gradients) {
  constexpr int64_t kLargest = 32 << 20;  // that it learns from
  static std::atomic<int64_t> shown = 0;
  int64_t bytes = 0;
  for (const Tensor& t : gradients)
    if (t.defined() && t.is_cpu()) bytes += int64_t(t.nbytes());
  if (bytes <= shown || bytes > kLargest) return;
  shown = bytes;
  at::empty({bytes}, at::kByte);
}

namespace {

// The gradients of the weights of a direction from those of its heads.
void add_heads(GradientSums& sums, const Weights& weights, int64_t layer, int64_t direction, int64_t heads,
               const std::vector<bool>& wanted, std::vector<Tensor>& grads) {
  std::vector<std::vector<Tensor>> each;
  for (int64_t k = 0; k < heads; ++k) {
    std::vector<Tensor> own(grads.size());
    own[kX] = std::move(grads[kX]);
    sums.add(direction * heads + k, wanted, own);
    grads[kX] = std::move(own[kX]);
    each.push_back(std::move(own));
  }
  const size_t first = kFirstWeight + size_t(weights.index(kWIh, layer, direction));
  for (size_t i = first; i < first + size_t(weights.each()); ++i) {
    if (!wanted[i]) continue;
    std::vector<Tensor> parts;
    for (const std::vector<Tensor>& own : each) parts.push_back(own[i]);
    add_to(grads[i], at::cat(parts, weights.dim(int64_t(i - kFirstWeight)) > 1 ? -2 : -1));  // lanes stand in front
  }
}

// The gradients of the weights of all layers, and of x, from those of the gates.
std::vector<Tensor> products(const Settings& settings, const Kept& kept, const BackwardOutputs& found, int64_t first,
                             const std::vector<bool>& wanted, const How& how, std::vector<Tensor> grads) {
  const CellInfo& cell = find_cell(settings.cell);
  const Weights weights(kept.weights(), settings);
  const Merge mode = find_merge(settings.merge_mode);
  const bool merges = settings.directions > 1 && mode != Merge::kConcat;
  const int64_t heads = settings.heads, D = all_directions(settings), L = settings.layers;
  // Each row of dx by itself: so that it does not depend on its batch, or since it is faster.
  const bool by_rows = !cell.normed && (how.invariant || (how.plain && products_for(found.dgates)));
  // That of an only layer keeps its dimension of size 1: whoever takes it looks at its last ones.
  const auto part = [](const Tensor& t, int64_t layers, int64_t l) {
    return layers > 1 && t.defined() && t.dim() > 1 ? t.select(0, l) : t;
  };
  const bool own = grads.empty();
  grads.resize(kept.inputs.size());
  for (int64_t l = first; l < L; ++l) {
    Tensor x = kept.inputs[kX];
    bool reads_x = false;
    for (int64_t d = 0; d < settings.directions; ++d)
      reads_x = reads_x || wanted[kFirstWeight + weights.index(kWIh, l, d)];
    if (l > 0) {
      x = kept.ys.select(0, l - 1);
      if (merges && reads_x) x = merge(x, mode);
      if (!kept.masks.empty() && reads_x) x = x * of_steps(kept.masks[l - 1], kept.steps, x.sym_size(0));
    }
    const GradientSums::Layer layer{l,
                                    x,
                                    L == 1 ? kept.inputs[kH0] : kept.inputs[kH0].narrow(0, l * D, D),
                                    l + 1 == L && !merges ? kept.y : kept.ys.select(0, l),
                                    settings.projected ? part(kept.h_raw, L, l) : Tensor(),
                                    part(found.dgates, L - first, l - first),
                                    part(found.dproj, L - first, l - first),
                                    found.dunit.dim() > 1 ? found.dunit.select(0, l - first) : found.dunit,
                                    kept.h_mask ? kept.h_mask->narrow(0, l * D, D) : Tensor(),
                                    l == 0 && wanted[kX] && !by_rows && !cell.normed};
    GradientSums sums(cell, weights, kept.steps, layer, settings, how);
    for (int64_t d = 0; d < settings.directions; ++d) {
      if (heads == 1) {
        sums.add(d, wanted, grads);
      } else {
        add_heads(sums, weights, l, d, heads, wanted, grads);
      }
    }
  }
  Tensor& dx = grads[kX];
  if (dx.defined()) dx = dx.view_symint(kept.inputs[kX].sym_sizes());
  if (cell.normed && wanted[kX]) {  // the input is that of the gates itself
    const c10::SymInt rows = weights.get(kWIh, 0, 0).sym_size(0);
    dx = found.dgates.select(0, 0).narrow_symint(-1, 0, rows).reshape_symint(kept.inputs[kX].sym_sizes());
  }
  if (by_rows && wanted[kX]) {
    std::vector<Tensor> w_ih;
    for (int64_t d = 0; d < D; ++d) w_ih.push_back(weights.of_head(kWIh, 0, d));
    dx = input_gradient_op().call(found.dgates.select(0, 0), w_ih);
  }
  if (how.plain && own) show_freed_together(grads);
  return grads;
}

// What the states of all layers have for those from `first` on; zeros for the others.
Tensor padded_below(const Tensor& t, int64_t rows) {
  if (rows == 0) return t;
  std::vector<c10::SymInt> shape = t.sym_sizes().vec();
  shape[0] = rows;
  return at::cat({t.new_zeros_symint(shape), t});
}

}  // namespace

Gradients gradients(const Settings& settings, const Kept& kept, const OutputGradients& out,
                    const std::vector<bool>& wanted, const How& how, std::vector<Tensor> sums) {
  const int64_t L = settings.layers, D = all_directions(settings);
  const Weights weights(kept.weights(), settings);
  const int64_t each = int64_t(kept.weights().size()) / L;
  // Nobody asks for what lies below the first layer that wants a gradient.
  const bool initial = wanted[kH0] || wanted[kC0];
  int64_t first = 0;
  if (!wanted[kX] && !initial) {
    const auto begin = wanted.begin() + kFirstWeight;
    first = std::min(L - 1, int64_t(std::find(begin, wanted.end(), true) - begin) / each);
  }
  const auto above = [&](const auto& t, int64_t rows) {  // the same of the layers from `first` on
    using T = std::decay_t<decltype(t)>;
    if constexpr (std::is_same_v<T, OptionalTensor>) {
      return t && rows ? T(t->narrow_symint(0, rows, t->sym_size(0) - rows)) : t;
    } else {
      return t.defined() && t.dim() > 1 && rows ? t.narrow_symint(0, rows, t.sym_size(0) - rows) : t;
    }
  };
  BackwardCall call;
  static_cast<Settings&>(call) = settings;
  call.layers = L - first;
  call.dy = out.dy;
  call.dh_n = above(out.dh_n, first * D);
  call.dc_n = above(out.dc_n, first * D);
  call.dys = above(out.dys, first);
  call.dc = above(out.dc, first);
  call.weights = weights.from(first);
  call.h0 = above(kept.inputs[kH0], first * D);
  call.c0 = above(kept.c0(), first * D);
  if (!kept.masks.empty() && first + 1 < L) call.masks = TensorList(kept.masks).slice(first);
  call.h_mask = above(kept.h_mask, first * D);
  static_cast<Steps&>(call) = kept.steps;
  call.y = kept.y;
  call.ys = above(kept.ys, first);
  call.c = above(kept.c, first);
  call.saved = above(kept.saved, first);
  call.record = how.record;
  call.initial = initial;
  call.invariant = how.invariant;

  BackwardOutputs found;
  if (how.overwrite) {
    found.dgates = call.saved;
    std::tie(found.dh0, found.dc0, found.dproj, found.flow, found.dunit) =
        with_ops(how.library, [&](auto ops) { return BackwardOverSavedOp::call(ops.backward_over_saved(), call); });
  } else {
    std::tie(found.dgates, found.dh0, found.dc0, found.dproj, found.flow, found.dunit) =
        with_ops(how.library, [&](auto ops) { return BackwardOp::call(ops.backward(), call); });
  }
  Gradients result;
  if (how.record) result.flow = padded_below(found.flow, first);
  result.inputs = products(settings, kept, found, first, wanted, how, std::move(sums));
  if (wanted[kH0]) result.inputs[kH0] = found.dh0;
  if (wanted[kC0]) result.inputs[kC0] = found.dc0;
  return result;
}

}  // namespace rnn
