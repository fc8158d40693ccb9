#include "autograd/gradients.h"

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

// Columns of the gradients of the gates [T*B, N], and the rows of the weights that they belong to.
struct Part {
  SymInt column, row, width;
};

// The products and sums of one layer over the gradients of its gates.
class Products {
 public:
  Products(const Settings& settings, const Inputs& in, const OptionalTensor& lengths, const OptionalTensor& reset,
           const Kept& kept, const Tensor& dgates, const Tensor& dproj, bool plain)
      : in_(in),
        lengths_(lengths),
        reset_(reset),
        kept_(kept),
        dproj_(dproj),
        plain_(plain),
        invariant_(settings.invariant),
        D_(in.weights(kWHh).size()),
        apart_(find_cell(settings.cell).A > 0),
        T_(in.x().sym_size(0)),
        B_(in.x().sym_size(1)),
        R_(in.h0().sym_size(2)),
        rows_(in.weights(kWHh)[0].sym_size(0)) {
    const CellInfo& cell = find_cell(settings.cell);
    const SymInt width = rows_ / cell.G * cell.A;  // of the gates whose hidden part is kept apart
    columns_ = rows_ + width;
    hidden_ = {{0, 0, rows_ - width}};
    if (apart_) hidden_.push_back({rows_, rows_ - width, width});
    dgates_ = dgates.view_symint({T_ * B_, D_ * columns_});
  }

  void add(int64_t d, const std::vector<bool>& wanted, std::vector<Tensor>& grads) {
    const auto want = [&](Weight kind) {
      return in_.weights(kind).size() > 0 && wanted[in_.index(kind, d)] ? &grads[in_.index(kind, d)] : nullptr;
    };
    const Tensor dgx = columns(d, {0, 0, rows_});
    if (Tensor* dw_ih = want(kWIh)) *dw_ih = at::mm(dgx.t(), in_.x().reshape_symint({T_ * B_, in_.x().sym_size(2)}));
    if (Tensor* dw_hh = want(kWHh)) {
      if (apart_) *dw_hh = at::empty_symint({rows_, R_}, dgates_.options());
      for (const Part& part : hidden_) {
        Tensor rows = apart_ ? dw_hh->narrow_symint(0, part.row, part.width) : Tensor();
        hidden_product(d, columns(d, part), rows);
        if (!apart_) *dw_hh = rows;
      }
    }
    if (Tensor* db_ih = want(kBIh)) *db_ih = bias(d, {{0, 0, rows_}});
    if (Tensor* db_hh = want(kBHh)) *db_hh = bias(d, hidden_);
    if (Tensor* dw_hr = want(kWHr)) {
      const auto flat = [&](const Tensor& t) { return t.select(2, d).reshape_symint({T_ * B_, t.sym_size(3)}); };
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
  // Columns of direction d [T*B, N].
  Tensor columns(int64_t d, const Part& part) const {
    const bool all = D_ == 1 && !apart_;
    return all ? dgates_ : dgates_.narrow_symint(1, d * columns_ + part.column, part.width);
  }

  // The sums over all columns are taken once, and copied: every bias has a gradient of its own, which callers may
  // change.
  Tensor bias(int64_t d, const std::vector<Part>& parts) {
    const bool one_row = T_.maybe_as_int() == 1 && B_.maybe_as_int() == 1;
    if (!sums_.defined()) sums_ = one_row ? dgates_.select(0, 0) : dgates_.sum(0);
    std::vector<Tensor> of;
    for (const Part& part : parts) of.push_back(sums_.narrow_symint(0, d * columns_ + part.column, part.width));
    return of.size() == 1 ? of[0].clone() : at::cat(of);
  }

  // out [N, R] = the sum over steps and rows of dgh^T h, with the h that entered each step; dgh [T*B, N]. The h of all
  // steps but a row's first stands in y, so nothing is copied unless there are resets; the first step takes h0.
  // An undefined out is allocated.
  void hidden_product(int64_t d, const Tensor& dgh, Tensor& out) const {
    const SymInt later = (T_ - 1) * B_, N = dgh.sym_size(1);
    const auto steps = [](const Tensor& t, const SymInt& from, const SymInt& n) { return t.narrow_symint(0, from, n); };
    const std::optional<int64_t> known = T_.maybe_as_int();
    if (known == 0) {
      out = out.defined() ? out.zero_() : at::zeros_symint({N, R_}, dgh.options());
      return;
    }
    Tensor first = known == 1 ? dgh : steps(dgh, d == 0 ? 0 : later, B_), h0 = in_.h0().select(0, d);
    if (d == 0 && reset_) h0 = h0.masked_fill(reset_->select(0, 0).unsqueeze(1), 0);
    if (d == 1 && lengths_) {
      const Tensor last = (*lengths_ - 1).clamp_min(0).view_symint({1, B_, 1});
      first = dgh.view_symint({T_, B_, N}).gather(0, last.expand_symint({1, B_, N})).squeeze(0);
    }
    if (lengths_) h0 = h0.masked_fill((*lengths_ == 0).unsqueeze(1), 0);
    if (out.defined()) {
      at::mm_out(out, first.t(), h0);
    } else {
      out = at::mm(first.t(), h0);
    }
    if (known == 1) return;

    Tensor h = kept_.y.view_symint({T_ * B_, D_ * R_});
    if (D_ > 1) h = h.narrow_symint(1, d * R_, R_);
    h = steps(h, d == 0 ? SymInt(0) : B_, later);
    const Tensor dgh_later = steps(dgh, d == 0 ? B_ : SymInt(0), later).t();
    // What a row leaves behind at a cut or at its end may be NaN or infinite: the zero gradient of the next step times
    // that would not be zero. Ends are rarely so, which shows in the sums and can be seen where the host need not wait.
    if (d == 0 && lengths_ && !reset_ && plain_ && out.is_cpu()) {
      out.addmm_(dgh_later, h);
      const at::ScalarType wide = out.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
      if (std::isfinite(out.sum(wide).item<double>())) return;
      at::mm_out(out, first.t(), h0);
    }
    OptionalTensor left = reset_ ? OptionalTensor(steps(*reset_, 1, T_ - 1)) : std::nullopt;
    if (d == 0 && lengths_) {
      const Tensor past = lengths_->new_ones_symint({T_ - 1, 1}).cumsum(0) >= *lengths_;  // of steps 1 to T-1
      left = left ? left->logical_or(past) : past;
    }
    if (left) h = h.masked_fill(left->reshape_symint({later, 1}), 0);
    out.addmm_(dgh_later, h);
  }

  const Inputs& in_;
  const OptionalTensor &lengths_, &reset_;
  const Kept& kept_;
  const Tensor& dproj_;  // [T, B, D, R]
  const bool plain_, invariant_;
  const int64_t D_;
  const bool apart_;  // the cell keeps hidden gradients apart
  const SymInt T_, B_, R_;
  const SymInt rows_;         // of the weights: G*H
  SymInt columns_;            // of one direction: (G+A)*H
  std::vector<Part> hidden_;  // the gradient of gh
  Tensor dgates_;             // [T*B, D*(G+A)*H]
  Tensor sums_;               // [D*(G+A)*H] once a bias has asked for them
};

}  // namespace

std::vector<Tensor> products(const Settings& settings, const Inputs& in, const OptionalTensor& lengths,
                             const OptionalTensor& reset, const Kept& kept, const Tensor& dgates, const Tensor& dproj,
                             const std::vector<bool>& wanted, bool plain) {
  std::vector<Tensor> found(in.all.size());
  Products sums(settings, in, lengths, reset, kept, dgates, dproj, plain);
  for (size_t d = 0; d < in.weights(kWHh).size(); ++d) sums.add(int64_t(d), wanted, found);
  Tensor& dx = found[Inputs::kX];
  if (dx.defined()) dx = dx.view_symint(in.x().sym_sizes());
  if (settings.invariant && wanted[Inputs::kX]) dx = input_gradient_op().call(dgates, in.weights(kWIh));
  return found;
}

Gradients gradients(const Settings& settings, const Inputs& in, const OptionalTensor& lengths,
                    const OptionalTensor& reset, const OutputGradients& out, const Kept& kept,
                    const std::vector<bool>& wanted, bool flow, bool plain, bool overwrite) {
  Tensor dgates, dh0, dc0, dproj;
  Gradients result;
  const auto run = [&](const auto& op) {
    return op.call(settings.cell, optional(out[0]), optional(out[1]), optional(out[2]), optional(out[3]),
                   in.weights(kWHh), in.weights(kWHr), in.h0(), in.c0(), kept.y, kept.c, kept.saved, lengths, reset,
                   settings.window, settings.clip, settings.bound, flow, wanted[Inputs::kH0] || wanted[Inputs::kC0],
                   settings.invariant);
  };
  if (overwrite) {
    dgates = kept.saved;
    std::tie(dh0, dc0, dproj, result.flow) =
        with_ops(settings.library, [&](auto ops) { return run(ops.backward_over_saved()); });
  } else {
    std::tie(dgates, dh0, dc0, dproj, result.flow) =
        with_ops(settings.library, [&](auto ops) { return run(ops.backward()); });
  }
  result.all = products(settings, in, lengths, reset, kept, dgates, dproj, wanted, plain);
  if (wanted[Inputs::kH0]) result.all[Inputs::kH0] = dh0;
  if (wanted[Inputs::kC0]) result.all[Inputs::kC0] = dc0;
  return result;
}

Gradients differentiable_gradients(const Settings& settings, const Inputs& in, const OptionalTensor& lengths,
                                   const OptionalTensor& reset, const OutputGradients& out,
                                   const std::vector<bool>& wanted, bool flow) {
  std::vector<int64_t> positions;
  for (size_t i = 0; i < wanted.size(); ++i)
    if (wanted[i]) positions.push_back(int64_t(i));
  auto [found, norms] = gradients_op().call(
      settings.cell, optional(out[0]), optional(out[1]), optional(out[2]), optional(out[3]), in.x(), in.weights(kWIh),
      in.weights(kWHh), in.weights(kBIh), in.weights(kBHh), in.weights(kWHr), in.h0(), in.c0(), lengths, reset,
      settings.window, settings.clip, settings.bound, positions, flow);
  Gradients result{std::vector<Tensor>(in.all.size()), norms};
  for (size_t i = 0; i < positions.size(); ++i) result.all[positions[i]] = found[i];
  return result;
}

}  // namespace rnn
