#include "autograd/gradients.h"

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

// Steps of a [T*B, N] matrix, or columns of one; the matrix itself where that is known to be all of it.
Tensor steps(const Tensor& t, const SymInt& first, const SymInt& rows) { return t.narrow_symint(0, first, rows); }
Tensor columns(const Tensor& t, const SymInt& first, const SymInt& width, bool whole) {
  return whole ? t : t.narrow_symint(1, first, width);
}

// Columns of the gradients of the gates [T*B, N], and the rows of the weights that they belong to.
struct Part {
  Tensor dgh;
  SymInt first, width;
};

// The products of one layer over the gradients of its gates.
class Products {
 public:
  Products(const Settings& settings, const Inputs& in, const OptionalTensor& lengths, const OptionalTensor& reset,
           const Kept& kept, const Tensor& dgates, const Tensor& dproj)
      : in_(in),
        lengths_(lengths),
        reset_(reset),
        kept_(kept),
        D_(in.weights(kWHh).size()),
        T_(in.x().sym_size(0)),
        B_(in.x().sym_size(1)),
        R_(in.h0().sym_size(2)),
        rows_(in.weights(kWHh)[0].sym_size(0)),
        dproj_(dproj) {
    const CellInfo& cell = find_cell(settings.cell);
    apart_ = cell.A ? rows_ / cell.G * cell.A : SymInt(0);
    has_apart_ = cell.A > 0;
    dgates_ = dgates.view_symint({T_ * B_, D_ * (rows_ + apart_)});
    x_ = in.x().reshape_symint({T_ * B_, in.x().sym_size(2)});
  }

  void add(int64_t d, const std::vector<bool>& wanted, std::vector<Tensor>& grads) const {
    const auto want = [&](Weight kind) {
      return in_.weights(kind).size() > 0 && wanted[in_.index(kind, d)] ? &grads[in_.index(kind, d)] : nullptr;
    };
    const SymInt start = d * (rows_ + apart_);
    const Tensor dgx = columns(dgates_, start, rows_, D_ == 1 && !has_apart_);  // [T*B, G*H]
    std::vector<Part> parts{{dgx, 0, rows_}};
    if (has_apart_) {
      const SymInt same = rows_ - apart_;
      parts = {{columns(dgates_, start, same, false), 0, same},
               {columns(dgates_, start + rows_, apart_, false), same, apart_}};
    }
    if (wanted[Inputs::kX]) {
      Tensor& dx = grads[Inputs::kX];
      const Tensor& w_ih = in_.weights(kWIh)[d];
      if (dx.defined()) {
        dx.addmm_(dgx, w_ih);
      } else {
        dx = at::mm(dgx, w_ih);
      }
    }
    if (Tensor* dw_ih = want(kWIh)) *dw_ih = at::mm(dgx.t(), x_);
    Tensor* const db_ih = want(kBIh);
    if (db_ih) *db_ih = dgx.sum(0);
    if (Tensor* db_hh = want(kBHh)) *db_hh = hidden_bias(parts, db_ih);
    if (Tensor* dw_hh = want(kWHh)) {
      *dw_hh = at::empty_symint({rows_, R_}, dgates_.options());
      for (const Part& part : parts) hidden_product(d, part.dgh, dw_hh->narrow_symint(0, part.first, part.width));
    }
    if (Tensor* dw_hr = want(kWHr)) {
      const auto flat = [&](const Tensor& t) { return t.select(2, d).reshape_symint({T_ * B_, t.sym_size(3)}); };
      *dw_hr = at::mm(flat(dproj_).t(), flat(kept_.h_raw));
    }
  }

 private:
  // Memory of its own even where db_ih holds the same numbers: callers may change gradients in place.
  Tensor hidden_bias(const std::vector<Part>& parts, const Tensor* db_ih) const {
    if (!has_apart_) return db_ih ? db_ih->clone() : parts[0].dgh.sum(0);
    const Tensor same = db_ih ? db_ih->narrow_symint(0, 0, parts[0].width) : parts[0].dgh.sum(0);
    return at::cat({same, parts[1].dgh.sum(0)});
  }

  // out [N, R] = the sum over steps and rows of dgh^T h, with the h that entered each step; dgh [T*B, N]. The h of all
  // steps but a row's first stands in y, so nothing is copied unless there are resets; the first step takes h0.
  void hidden_product(int64_t d, const Tensor& dgh, Tensor out) const {
    if (T_.maybe_as_int() == 0) {
      out.zero_();
      return;
    }
    const SymInt later = (T_ - 1) * B_;
    Tensor first = steps(dgh, d == 0 ? 0 : later, B_), h0 = in_.h0().select(0, d);
    if (d == 0 && reset_) h0 = h0.masked_fill(reset_->select(0, 0).unsqueeze(1), 0);
    if (d == 1 && lengths_) {
      const Tensor last = (*lengths_ - 1).clamp_min(0).view_symint({1, B_, 1});
      first =
          dgh.view_symint({T_, B_, dgh.sym_size(1)}).gather(0, last.expand_symint({1, B_, dgh.sym_size(1)})).squeeze(0);
    }
    if (lengths_) h0 = h0.masked_fill((*lengths_ == 0).unsqueeze(1), 0);
    at::mm_out(out, first.t(), h0);
    if (T_.maybe_as_int() == 1) return;

    Tensor h = columns(kept_.y.view_symint({T_ * B_, D_ * R_}), d * R_, R_, D_ == 1);
    h = steps(h, d == 0 ? SymInt(0) : B_, later);
    if (reset_) h = h.masked_fill(reset_->narrow_symint(0, 1, T_ - 1).reshape_symint({later, 1}), 0);
    out.addmm_(steps(dgh, d == 0 ? B_ : SymInt(0), later).t(), h);
  }

  const Inputs& in_;
  const OptionalTensor &lengths_, &reset_;
  const Kept& kept_;
  const int64_t D_;
  const SymInt T_, B_, R_;
  const SymInt rows_;  // of the weights: G*H
  SymInt apart_;       // of them, in the last A gates
  bool has_apart_;
  Tensor dgates_;        // [T*B, D*(G+A)*H]
  const Tensor& dproj_;  // [T, B, D, R]
  Tensor x_;             // [T*B, I]
};

}  // namespace

Gradients gradients(const Settings& settings, const Inputs& in, const OptionalTensor& lengths,
                    const OptionalTensor& reset, const OutputGradients& out, const Kept& kept,
                    const std::vector<bool>& wanted, bool flow, bool overwrite) {
  Tensor dgates, dh0, dc0, dproj;
  Gradients result{std::vector<Tensor>(in.all.size()), Tensor()};
  const auto run = [&](const auto& op) {
    return op.call(settings.cell, optional(out[0]), optional(out[1]), optional(out[2]), optional(out[3]),
                   in.weights(kWHh), in.weights(kWHr), in.h0(), in.c0(), kept.y, kept.c, kept.saved, lengths, reset,
                   settings.window, settings.clip, settings.bound, flow);
  };
  if (overwrite) {
    dgates = kept.saved;
    std::tie(dh0, dc0, dproj, result.flow) = run(backward_over_saved_op());
  } else {
    std::tie(dgates, dh0, dc0, dproj, result.flow) = run(backward_op());
  }
  const Products products(settings, in, lengths, reset, kept, dgates, dproj);
  for (size_t d = 0; d < in.weights(kWHh).size(); ++d) products.add(int64_t(d), wanted, result.all);
  Tensor& dx = result.all[Inputs::kX];
  if (dx.defined()) dx = dx.view_symint(in.x().sym_sizes());
  result.all[Inputs::kH0] = dh0;
  if (in.c0()) result.all[Inputs::kC0] = dc0;
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
