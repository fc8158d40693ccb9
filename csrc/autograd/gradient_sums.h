// The gradients of the weights of a layer, as products and sums over those of its gates.
#pragma once

#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

#include "autograd/gradients.h"
#include "ops/layers.h"
#include "ops/products.h"
#include "ops/sizes.h"

namespace rnn {

// A gradient in its place, or added to what is there.
inline void add_to(Tensor& place, Tensor gradient) {
  if (place.defined()) {
    place.add_(gradient);
  } else {
    place = std::move(gradient);
  }
}

// The products and sums of one layer over the gradients of its gates.
class GradientSums {
 public:
  // What the products of one layer take.
  struct Layer {
    int64_t index;
    Tensor x, h0, y, h_raw, dgates, dproj, dunit;
    Tensor h_mask;  // undefined where there is none
    bool wants_dx;
  };

  GradientSums(const CellInfo& cell, const Weights& weights, const Steps& steps, const Layer& layer,
               const Settings& settings, const How& how)
      : weights_(weights),
        steps_(steps),
        layer_(layer),
        plain_(how.plain),
        lanes_(how.lanes),
        heads_(settings.heads),
        D_(all_directions(settings)),
        split_(cell.A > 0),
        gates_alone_(cell.columns() == cell.G),
        T_(steps.starts ? steps.starts->sym_size(0) - 1 : layer.x.sym_size(0)),
        B_(layer.h0.sym_size(1)),
        N_(steps.starts ? layer.x.sym_size(0) : T_ * B_),
        R_(layer.h0.sym_size(2)),
        rows_(weights.get(kWIh, layer.index, 0).sym_size(0) / settings.heads) {
    const c10::SymInt width = rows_ / cell.G * cell.A;  // of the gates that are split
    columns_ = rows_ + width;
    if (cell.A < cell.G) hidden_ = {{0, 0, rows_ - width}};
    if (split_) hidden_.push_back({rows_, rows_ - width, width});
    dgates_ = layer.dgates.view_symint({N_, D_ * columns_});
  }

  // The gradients of the weights of direction d, or of a head's rows, added to those that are there; and what it adds
  // to that of x.
  void add(int64_t d, const std::vector<bool>& wanted, std::vector<Tensor>& grads) {
    const auto want = [&](Weight kind) -> Tensor* {
      if (!weights_.has(kind)) return nullptr;
      const size_t i = kFirstWeight + weights_.index(kind, layer_.index, d / heads_);
      return wanted[i] ? &grads[i] : nullptr;
    };
    const Tensor dgx = columns(d, {0, 0, rows_});
    if (Tensor* dw_ih = want(kWIh))
      product(dgx, layer_.x.reshape_symint({N_, layer_.x.sym_size(-1)}), *dw_ih, dw_ih->defined());
    if (Tensor* dw_hh = want(kWHh)) {
      // Memory of our own holds the values of plain tensors alone: whoever looks on is shown parts that are put
      // together.
      const bool adds = dw_hh->defined(), in_place = plain_ && (split_ || adds);
      if (in_place && !adds) *dw_hh = at::empty_symint(of_each({rows_, R_}), dgates_.options());
      std::vector<Tensor> parts;
      for (const Part& part : hidden_) {
        parts.push_back(in_place ? dw_hh->narrow_symint(-2, part.row, part.width) : Tensor());
        hidden_product(d, columns(d, part), parts.back(), adds);
      }
      if (!in_place) *dw_hh = parts.size() == 1 ? parts[0] : at::cat(parts, -2);
      masked_ = Tensor();
    }
    if (Tensor* db_ih = want(kBIh)) add_to(*db_ih, bias(d, {{0, 0, rows_}}));
    if (Tensor* db_hh = want(kBHh)) add_to(*db_hh, bias(d, hidden_));
    if (Tensor* dw_hr = want(kWHr)) {
      const auto flat = [&](const Tensor& t) { return t.select(-2, d).reshape_symint({N_, t.sym_size(-1)}); };
      product(flat(layer_.dproj), flat(layer_.h_raw), *dw_hr, dw_hr->defined());
    }
    for (int64_t k = 0; k < weights_.params(); ++k) {
      const size_t i = kFirstWeight + weights_.param_index(k, layer_.index, d / heads_);
      if (wanted[i]) add_to(grads[i], parameter(d, k));
    }
    // Last: what the others need for a while is gone before its memory is taken.
    if (!layer_.wants_dx) return;
    Tensor& dx = grads[kX];
    const Tensor w_ih = weights_.of_head(kWIh, layer_.index, d);
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
  // Columns of the gradients of the gates [N, width], with N = T*B where nothing is packed, and the rows of the weights
  // that they belong to.
  struct Part {
    c10::SymInt column, row, width;
  };

  // out [M, N] = a^T b of a [K, M] and b [K, N], or out += where it adds; with lanes one of each, [lanes, M, N]. An
  // undefined out is allocated.
  void product(const Tensor& a, const Tensor& b, Tensor& out, bool adds = false) const {
    if (const Products* own = plain_ ? products_for(a) : nullptr) {
      if (!out.defined()) out = at::empty_symint(of_each({a.size(1), b.size(1)}), a.options());
      own->outer(out, lanes_ ? apart(a) : a, lanes_ ? apart(b) : b, adds);
    } else if (lanes_) {
      product_of_each(apart(a), apart(b), out, adds);
    } else if (adds) {
      out.addmm_(a.t(), b);
    } else if (out.defined()) {
      at::mm_out(out, a.t(), b);
    } else {
      out = at::mm(a.t(), b);
    }
  }

  // By torch: out [lanes, M, N] of a [lanes, K, M] and b [lanes, K, N].
  void product_of_each(const Tensor& a, const Tensor& b, Tensor& out, bool adds) const {
    if (adds) {
      out.baddbmm_(a.transpose(1, 2), b);
    } else if (out.defined()) {
      at::bmm_out(out, a.transpose(1, 2), b);
    } else {
      out = at::bmm(a.transpose(1, 2), b);
    }
  }

  // Rows [K*lanes, width] as [lanes, K, width].
  Tensor apart(const Tensor& rows) const {
    return rows.unflatten_symint(0, {rows.sym_size(0) / lanes_, lanes_}).transpose(0, 1);
  }
  // The shape of something that every lane has.
  std::vector<c10::SymInt> of_each(std::vector<c10::SymInt> shape) const {
    if (lanes_) shape.insert(shape.begin(), lanes_);
    return shape;
  }

  // Columns of direction d [N, width].
  Tensor columns(int64_t d, const Part& part) const {
    return D_ == 1 && gates_alone_ ? dgates_ : dgates_.narrow_symint(1, d * columns_ + part.column, part.width);
  }

  // The sums over all columns are taken once, and copied: every bias has a gradient of its own, which callers may
  // change.
  Tensor bias(int64_t d, const std::vector<Part>& parts) {
    const bool one_row = N_.maybe_as_int() == 1;
    if (!sums_.defined()) sums_ = lanes_ ? apart(dgates_).sum(1) : one_row ? dgates_.select(0, 0) : dgates_.sum(0);
    std::vector<Tensor> of;
    for (const Part& part : parts) of.push_back(sums_.narrow_symint(-1, d * columns_ + part.column, part.width));
    return of.size() == 1 ? of[0].clone() : at::cat(of, -1);
  }

  // The gradient of parameter k of the cell [H], from what each row adds to it.
  Tensor parameter(int64_t d, int64_t k) {
    if (!unit_sums_.defined()) {
      const Tensor& rows = layer_.dunit;  // [W*B, D, P*H]
      unit_sums_ = (lanes_ ? apart(rows).sum(1) : rows.sum(0)).to(dgates_.scalar_type());
    }
    const c10::SymInt H = unit_sums_.sym_size(-1) / weights_.params();
    return unit_sums_.select(-2, d).narrow_symint(-1, H * k, H).clone();
  }

  // out [width, R] = the sum over steps and rows of dgh^T h, with the h that entered each step, or out += where it
  // adds; dgh [N, width]. An undefined out is allocated.
  void hidden_product(int64_t d, const Tensor& dgh, Tensor& out, bool adds) {
    if (steps_.starts) {
      product(dgh, entering(d), out, adds);
    } else if (lanes_ && !steps_.lengths && T_.maybe_as_int().value_or(0) > 1) {
      product(dgh, all_entering(d), out, adds);
    } else {
      shifted_product(d, dgh, out, adds);
    }
  }

  // Where nothing is packed, the h of all steps but a row's first stands in y, one step away, so nothing is copied
  // unless there are resets; the first step takes h0.
  void shifted_product(int64_t d, const Tensor& dgh, Tensor& out, bool adds) {
    const OptionalTensor &lengths = steps_.lengths, &reset = steps_.reset;
    const c10::SymInt later = (T_ - 1) * B_, width = dgh.sym_size(1);
    const auto some = [](const Tensor& t, const c10::SymInt& from, const c10::SymInt& n) {
      return t.narrow_symint(0, from, n);
    };
    const std::optional<int64_t> known = T_.maybe_as_int();
    if (known == 0) {
      if (adds) return;
      out = out.defined() ? out.zero_() : dgh.new_zeros_symint(of_each({width, R_}));
      return;
    }
    const bool turned = d >= heads_;
    Tensor first = known == 1 ? dgh : some(dgh, turned ? later : 0, B_), h0 = initial(d);
    if (!turned && reset) h0 = h0.masked_fill(reset->select(0, 0).unsqueeze(1), 0);
    if (turned && lengths) {
      const Tensor last = (*lengths - 1).clamp_min(0).view_symint({1, B_, 1});
      first = dgh.view_symint({T_, B_, width}).gather(0, last.expand_symint({1, B_, width})).squeeze(0);
    }
    if (lengths) h0 = h0.masked_fill((*lengths == 0).unsqueeze(1), 0);
    product(first, h0, out, adds);
    if (known == 1) return;

    Tensor h = some(states(d), turned ? B_ : c10::SymInt(0), later);
    const Tensor dgh_later = some(dgh, turned ? c10::SymInt(0) : B_, later);
    // What a row leaves behind at a cut or at its end may be NaN or infinite: the zero gradient of the next step times
    // that would not be zero. Ends are rarely so, which shows in the sums and can be seen where the host need not wait,
    // unless sums are of more than this.
    if (!turned && lengths && !reset && plain_ && !adds && out.is_cpu()) {
      product(dgh_later, h, out, true);
      const at::ScalarType wide = out.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
      if (std::isfinite(out.sum(wide).item<double>())) return;
      product(first, h0, out);
    }
    OptionalTensor left = reset ? OptionalTensor(some(*reset, 1, T_ - 1)) : std::nullopt;
    if (!turned && lengths) {
      const Tensor past = lengths->new_ones_symint({T_ - 1, 1}).cumsum(0) >= *lengths;  // of steps 1 to T-1
      left = left ? left->logical_or(past) : past;
    }
    if (left) h = h.masked_fill(left->reshape_symint({later, 1}), 0);
    product(dgh_later, h, out, true);
  }

  // The h that entered each step [N, R], of rows without lengths. A copy; but lanes have weights' gradients of their
  // own, which are larger, and would be read and written once more for the first step.
  Tensor all_entering(int64_t d) {
    if (of_direction_ != d) {
      const c10::SymInt later = (T_ - 1) * B_;
      const bool turned = d >= heads_;
      const Tensor h0 = initial(d), h = states(d).narrow_symint(0, turned ? B_ : c10::SymInt(0), later);
      entered_ = turned ? at::cat({h, h0}) : at::cat({h0, h});
      of_direction_ = d;
      if (const OptionalTensor& reset = steps_.reset) {  // which a row's last step has none behind, going backwards
        const Tensor cut =
            turned ? at::cat({reset->narrow_symint(0, 1, T_ - 1), at::zeros_like(reset->narrow_symint(0, 0, 1))})
                   : *reset;
        entered_ = entered_.masked_fill(cut.reshape_symint({N_, 1}), 0);
      }
    }
    return entered_;
  }

  // The first h of direction d [B, R], as W_hh was multiplied by it.
  Tensor initial(int64_t d) const {
    const Tensor h0 = layer_.h0.select(0, d);
    return layer_.h_mask.defined() ? h0 * layer_.h_mask.select(0, d) : h0;
  }

  // h of each step of direction d [N, R], likewise. Masked it is a copy, which lives as long as its products.
  Tensor states(int64_t d) {
    if (masked_.defined()) return masked_;
    Tensor h = layer_.y.reshape_symint({N_, D_ * R_});  // a copy of what lanes share
    if (D_ > 1) h = h.narrow_symint(1, d * R_, R_);
    if (!layer_.h_mask.defined()) return h;
    const Tensor mask = of_steps(layer_.h_mask.narrow(0, d, 1), steps_, N_);
    masked_ = steps_.starts ? h * mask : (h.unflatten_symint(0, {T_, B_}) * mask).flatten(0, 1);
    return masked_;
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
    const Tensor h0 = initial(d), h = states(d);
    if (d < heads_) {
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

  const Weights& weights_;
  const Steps& steps_;
  const Layer& layer_;
  const bool plain_;
  const int64_t lanes_, heads_, D_;  // D_ counts each head
  const bool split_;                 // some gates of the cell are split: gx and gh have gradients of their own
  const bool gates_alone_;           // there are no columns but the gradients of gx
  const c10::SymInt T_, B_, N_, R_;
  const c10::SymInt rows_;    // of the weights: G*H
  c10::SymInt columns_;       // of one direction: X*H
  std::vector<Part> hidden_;  // the gradient of gh
  Tensor dgates_;             // [N, D*X*H]
  Tensor sums_;               // [D*X*H], of each lane, once a bias has asked for them
  Tensor unit_sums_;          // [D, P*H], likewise
  Tensor masked_;             // [N, R]: h of the direction at hand, where there is a mask
  int64_t of_direction_ = -1;
  Tensor entered_;  // [N, R], of that direction
  Tensor before_;   // [N - B]: the place of the step before, of all packed steps but the rows' first
};

}  // namespace rnn
