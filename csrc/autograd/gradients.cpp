#include "autograd/gradients.h"

#include <atomic>
#include <cmath>

namespace rnn {

using c10::SymInt;

Inputs::Inputs(const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
               const std::array<TensorList, kWeights>& weights) {
  size_t n = kFirst;
  for (const TensorList& list : weights) n += list.size();
  all.reserve(n);
  all = {x, h0, c0.value_or(Tensor())};
  for (size_t kind = 0; kind < kWeights; ++kind) {
    first[kind] = all.size();
    all.insert(all.end(), weights[kind].begin(), weights[kind].end());
  }
  first[kWeights] = all.size();
}

bool can_overwrite(const std::string& cell) {
  const CellInfo& info = find_cell(cell);
  return info.K > 0 && info.K == info.G + info.A;
}

namespace {

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// Columns of the gradients of the gates [N, width], with N = T*B where nothing is packed, and the rows of the weights
// that they belong to.
struct Part {
  SymInt column, row, width;
};

// The products and sums of one layer over the gradients of its gates.
class Products {
 public:
  Products(const Settings& settings, const Inputs& in, const Steps& steps, const Kept& kept, const Tensor& dgates,
           const Tensor& dproj, bool plain)
      : in_(in),
        steps_(steps),
        kept_(kept),
        dproj_(dproj),
        plain_(plain),
        invariant_(settings.invariant),
        D_(in.weights(kWHh).size()),
        apart_(find_cell(settings.cell).A > 0),
        T_(steps.starts ? steps.starts->sym_size(0) - 1 : in.x().sym_size(0)),
        B_(in.h0().sym_size(1)),
        N_(steps.starts ? in.x().sym_size(0) : T_ * B_),
        R_(in.h0().sym_size(2)),
        rows_(in.weights(kWHh)[0].sym_size(0)) {
    const CellInfo& cell = find_cell(settings.cell);
    const SymInt width = rows_ / cell.G * cell.A;  // of the gates whose hidden part is kept apart
    columns_ = rows_ + width;
    hidden_ = {{0, 0, rows_ - width}};
    if (apart_) hidden_.push_back({rows_, rows_ - width, width});
    dgates_ = dgates.view_symint({N_, D_ * columns_});
  }

  void add(int64_t d, const std::vector<bool>& wanted, std::vector<Tensor>& grads) {
    const auto want = [&](Weight kind) {
      return in_.weights(kind).size() > 0 && wanted[in_.index(kind, d)] ? &grads[in_.index(kind, d)] : nullptr;
    };
    const Tensor dgx = columns(d, {0, 0, rows_});
    if (Tensor* dw_ih = want(kWIh)) *dw_ih = at::mm(dgx.t(), in_.x().reshape_symint({N_, in_.x().sym_size(-1)}));
    if (Tensor* dw_hh = want(kWHh)) {
      // Memory of our own holds the values of plain tensors alone: whoever looks on is shown parts that are put
      // together.
      const bool in_place = apart_ && plain_;
      if (in_place) *dw_hh = at::empty_symint({rows_, R_}, dgates_.options());
      std::vector<Tensor> parts;
      for (const Part& part : hidden_) {
        parts.push_back(in_place ? dw_hh->narrow_symint(0, part.row, part.width) : Tensor());
        hidden_product(d, columns(d, part), parts.back());
      }
      if (!in_place) *dw_hh = parts.size() == 1 ? parts[0] : at::cat(parts);
    }
    if (Tensor* db_ih = want(kBIh)) *db_ih = bias(d, {{0, 0, rows_}});
    if (Tensor* db_hh = want(kBHh)) *db_hh = bias(d, hidden_);
    if (Tensor* dw_hr = want(kWHr)) {
      const auto flat = [&](const Tensor& t) { return t.select(-2, d).reshape_symint({N_, t.sym_size(-1)}); };
      *dw_hr = at::mm(flat(dproj_).t(), flat(kept_.h_raw));
    }
    // Last: what the others need for a while is gone before its memory is taken.
    if (!wanted[Inputs::kX] || invariant_) return;
    Tensor& dx = grads[Inputs::kX];
    const Tensor& w_ih = in_.weights(kWIh)[d];
    if (dx.defined()) {
      dx.addmm_(dgx, w_ih);
    } else if (plain_) {
      dx = fresh({dgx.size(0), w_ih.size(1)}, dgx.options());
      at::mm_out(dx, dgx, w_ih);
    } else {
      dx = at::mm(dgx, w_ih);
    }
  }

 private:
  // Columns of direction d [N, width].
  Tensor columns(int64_t d, const Part& part) const {
    const bool all = D_ == 1 && !apart_;
    return all ? dgates_ : dgates_.narrow_symint(1, d * columns_ + part.column, part.width);
  }

  // The sums over all columns are taken once, and copied: every bias has a gradient of its own, which callers may
  // change.
  Tensor bias(int64_t d, const std::vector<Part>& parts) {
    const bool one_row = N_.maybe_as_int() == 1;
    if (!sums_.defined()) sums_ = one_row ? dgates_.select(0, 0) : dgates_.sum(0);
    std::vector<Tensor> of;
    for (const Part& part : parts) of.push_back(sums_.narrow_symint(0, d * columns_ + part.column, part.width));
    return of.size() == 1 ? of[0].clone() : at::cat(of);
  }

  // out [width, R] = the sum over steps and rows of dgh^T h, with the h that entered each step; dgh [N, width]. An
  // undefined out is allocated.
  void hidden_product(int64_t d, const Tensor& dgh, Tensor& out) {
    if (steps_.starts) {
      const Tensor h = entering(d);
      out.defined() ? at::mm_out(out, dgh.t(), h) : out = at::mm(dgh.t(), h);
    } else {
      shifted_product(d, dgh, out);
    }
  }

  // Where nothing is packed, the h of all steps but a row's first stands in y, one step away, so nothing is copied
  // unless there are resets; the first step takes h0.
  void shifted_product(int64_t d, const Tensor& dgh, Tensor& out) const {
    const auto& [lengths, starts, reset] = steps_;
    const SymInt later = (T_ - 1) * B_, width = dgh.sym_size(1);
    const auto some = [](const Tensor& t, const SymInt& from, const SymInt& n) { return t.narrow_symint(0, from, n); };
    const std::optional<int64_t> known = T_.maybe_as_int();
    if (known == 0) {
      out = out.defined() ? out.zero_() : dgh.new_zeros_symint({width, R_});
      return;
    }
    Tensor first = known == 1 ? dgh : some(dgh, d == 0 ? 0 : later, B_), h0 = in_.h0().select(0, d);
    if (d == 0 && reset) h0 = h0.masked_fill(reset->select(0, 0).unsqueeze(1), 0);
    if (d == 1 && lengths) {
      const Tensor last = (*lengths - 1).clamp_min(0).view_symint({1, B_, 1});
      first = dgh.view_symint({T_, B_, width}).gather(0, last.expand_symint({1, B_, width})).squeeze(0);
    }
    if (lengths) h0 = h0.masked_fill((*lengths == 0).unsqueeze(1), 0);
    if (out.defined()) {
      at::mm_out(out, first.t(), h0);
    } else {
      out = at::mm(first.t(), h0);
    }
    if (known == 1) return;

    Tensor h = some(states(d), d == 0 ? SymInt(0) : B_, later);
    const Tensor dgh_later = some(dgh, d == 0 ? B_ : SymInt(0), later).t();
    // What a row leaves behind at a cut or at its end may be NaN or infinite: the zero gradient of the next step times
    // that would not be zero. Ends are rarely so, which shows in the sums and can be seen where the host need not wait.
    if (d == 0 && lengths && !reset && plain_ && out.is_cpu()) {
      out.addmm_(dgh_later, h);
      const at::ScalarType wide = out.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
      if (std::isfinite(out.sum(wide).item<double>())) return;
      at::mm_out(out, first.t(), h0);
    }
    OptionalTensor left = reset ? OptionalTensor(some(*reset, 1, T_ - 1)) : std::nullopt;
    if (d == 0 && lengths) {
      const Tensor past = lengths->new_ones_symint({T_ - 1, 1}).cumsum(0) >= *lengths;  // of steps 1 to T-1
      left = left ? left->logical_or(past) : past;
    }
    if (left) h = h.masked_fill(left->reshape_symint({later, 1}), 0);
    out.addmm_(dgh_later, h);
  }

  // h of each step of direction d [N, R].
  Tensor states(int64_t d) const {
    const Tensor h = kept_.y.view_symint({N_, D_ * R_});
    return D_ == 1 ? h : h.narrow_symint(1, d * R_, R_);
  }

  // The h that entered each packed step [N, R].
  Tensor entering(int64_t d) {
    const auto later = [&](const Tensor& t) { return t.narrow_symint(0, B_, N_ - B_); };  // all but the rows' first
    if (!before_.defined()) {
      const Tensor sizes = steps_.starts->diff();  // of the batch at each step
      const Tensor shift = at::repeat_interleave_symint(sizes.narrow_symint(0, 0, T_ - 1),
                                                        sizes.narrow_symint(0, 1, T_ - 1), 0, N_ - B_);
      before_ = at::arange(B_, N_, sizes.options()) - shift;
    }
    const Tensor h0 = in_.h0().select(0, d), h = states(d);
    if (d == 0) {
      const Tensor all = at::cat({h0, h.index_select(0, before_)});
      return steps_.reset ? all.masked_fill(steps_.reset->unsqueeze(1), 0) : all;
    }
    Tensor from = later(h);
    if (steps_.reset) from = from.masked_fill(later(*steps_.reset).unsqueeze(1), 0);
    const Tensor last =
        steps_.starts->index_select(0, *steps_.lengths - 1) + at::arange(B_, steps_.starts->options());  // of each row
    Tensor all = h.new_empty_symint({N_, R_});
    all.index_copy_(0, last, h0).index_copy_(0, before_, from);
    return all;
  }

  const Inputs& in_;
  const Steps& steps_;
  const Kept& kept_;
  const Tensor& dproj_;  // [N, D, R]
  const bool plain_, invariant_;
  const int64_t D_;
  const bool apart_;  // the cell keeps hidden gradients apart
  const SymInt T_, B_, N_, R_;
  const SymInt rows_;         // of the weights: G*H
  SymInt columns_;            // of one direction: (G+A)*H
  std::vector<Part> hidden_;  // the gradient of gh
  Tensor dgates_;             // [N, D*(G+A)*H]
  Tensor sums_;               // [D*(G+A)*H] once a bias has asked for them
  Tensor before_;             // [N - B]: the place of the step before, of all packed steps but the rows' first
};

}  // namespace

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

std::vector<Tensor> products(const Settings& settings, const Inputs& in, const Steps& steps, const Kept& kept,
                             const Tensor& dgates, const Tensor& dproj, const std::vector<bool>& wanted, bool plain) {
  std::vector<Tensor> found(in.all.size());
  Products sums(settings, in, steps, kept, dgates, dproj, plain);
  for (size_t d = 0; d < in.weights(kWHh).size(); ++d) sums.add(int64_t(d), wanted, found);
  Tensor& dx = found[Inputs::kX];
  if (dx.defined()) dx = dx.view_symint(in.x().sym_sizes());
  if (settings.invariant && wanted[Inputs::kX]) dx = input_gradient_op().call(dgates, in.weights(kWIh));
  if (plain) show_freed_together(found);
  return found;
}

Gradients gradients(const Settings& settings, const Inputs& in, const Steps& steps, const OutputGradients& out,
                    const Kept& kept, const std::vector<bool>& wanted, bool flow, bool plain, bool overwrite) {
  Tensor dgates, dh0, dc0, dproj;
  Gradients result;
  const auto run = [&](const auto& op) {
    return op.call(settings.cell, optional(out[0]), optional(out[1]), optional(out[2]), optional(out[3]),
                   in.weights(kWHh), given(in.weights(kWHr)), in.h0(), in.c0(), kept.y, kept.c, kept.saved,
                   steps.lengths, steps.starts, steps.reset, settings.window, settings.clip, settings.bound, flow,
                   wanted[Inputs::kH0] || wanted[Inputs::kC0], settings.invariant);
  };
  if (overwrite) {
    dgates = kept.saved;
    std::tie(dh0, dc0, dproj, result.flow) =
        with_ops(settings.library, [&](auto ops) { return run(ops.backward_over_saved()); });
  } else {
    std::tie(dgates, dh0, dc0, dproj, result.flow) =
        with_ops(settings.library, [&](auto ops) { return run(ops.backward()); });
  }
  result.all = products(settings, in, steps, kept, dgates, dproj, wanted, plain);
  if (wanted[Inputs::kH0]) result.all[Inputs::kH0] = dh0;
  if (wanted[Inputs::kC0]) result.all[Inputs::kC0] = dc0;
  return result;
}

Gradients differentiable_gradients(const Settings& settings, const Inputs& in, const Steps& steps,
                                   const OutputGradients& out, const std::vector<bool>& wanted, bool flow) {
  std::vector<int64_t> positions;
  for (size_t i = 0; i < wanted.size(); ++i)
    if (wanted[i]) positions.push_back(int64_t(i));
  auto [found, norms] = gradients_op().call(
      settings.cell, optional(out[0]), optional(out[1]), optional(out[2]), optional(out[3]), in.x(), in.weights(kWIh),
      in.weights(kWHh), given(in.weights(kBIh)), given(in.weights(kBHh)), given(in.weights(kWHr)), in.h0(), in.c0(),
      steps.lengths, steps.starts, steps.reset, settings.window, settings.clip, settings.bound, positions, flow);
  Gradients result{std::vector<Tensor>(in.all.size()), norms};
  for (size_t i = 0; i < positions.size(); ++i) result.all[positions[i]] = found[i];
  return result;
}

}  // namespace rnn
