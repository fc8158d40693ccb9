#include "ops/check.h"

#include <atomic>

#include "ops/sizes.h"

namespace rnn {
namespace {

// Everything is held against one tensor: its device and dtype are those of the call.
struct Checker {
  const Tensor& like;

  void tensor(const Tensor& t, const std::string& name, at::IntArrayRef shape, const char* meaning) const {
    TORCH_CHECK(t.sizes() == shape, name, ": expected shape ", shape, " (", meaning, "), got ", t.sizes(),
                ". Give it the sizes that the layer, its input and its states have.");
    TORCH_CHECK_VALUE(t.scalar_type() == like.scalar_type(), name, ": expected dtype ", like.scalar_type(),
                      " like the input, got ", t.scalar_type(), ". Convert one of them with .to(dtype).");
    on_device(t, name);
  }

  void on_device(const Tensor& t, const std::string& name) const {
    TORCH_CHECK(t.device() == like.device(), name, ": expected device ", like.device(), " like the input, got ",
                t.device(), ". Move one of them with .to(device).");
  }

  void optional(const OptionalTensor& t, const char* name, at::IntArrayRef shape, const char* meaning) const {
    if (t) tensor(*t, name, shape, meaning);
  }

  // In backward the weights of the input of the first layer have no say.
  void weights(const Weights& weights, const Sizes& n, const CellInfo& cell, bool forward, bool step) const {
    const int64_t rows = n.heads * cell.G * n.H;
    for (int64_t l = 0; l < n.L; ++l) {
      const auto each = [&](Weight kind, at::IntArrayRef shape, const char* meaning) {
        if (!weights.has(kind)) return;
        for (int64_t d = 0; d < n.D / n.heads; ++d) {
          const Tensor& t = weights.get(kind, l, d);
          if (t.sizes() == shape && t.scalar_type() == like.scalar_type() && t.device() == like.device()) continue;
          tensor(t, parameter_name(kind, l, d, step), shape, meaning);
        }
      };
      if (forward || l > 0) each(kWIh, {rows, cell.normed ? 0 : l > 0 ? n.width() : n.I}, "gates * hidden_size, input");
      each(kWHh, {rows, n.R}, "gates * hidden_size, state");
      each(kWHr, {n.R, n.H}, "proj_size, hidden_size");
      for (int64_t d = 0; d < n.D / n.heads; ++d)
        for (int64_t k = 0; k < weights.params(); ++k)
          tensor(weights.param(k, l, d), parameter_name(cell, k, l, d, step), {n.heads * n.H}, "hidden_size");
      if (!forward) continue;
      each(kBIh, {rows}, "gates * hidden_size");
      each(kBHh, {rows}, "gates * hidden_size");
    }
  }

  void masks(const OptionalList& masks, const Sizes& n) const {
    if (!masks) return;
    TORCH_CHECK_VALUE(int64_t(masks->size()) == n.L - 1, "masks: expected ", n.L - 1,
                      " tensors, one between any two layers, or None, got ", masks->size());
    for (const Tensor& mask : *masks) {
      if (mask.dim() == 3 && mask.size(0) == 1) {
        tensor(mask, "masks", {1, n.B, n.width()}, "for all steps: 1, batch, features of y");
      } else {
        tensor(mask, "masks", n.shape({n.width()}), "that of y");
      }
    }
  }

  void noise(const Steps& steps, const Sizes& n, const CellInfo& cell) const {
    TORCH_CHECK_VALUE(steps.noise.has_value() == (cell.E > 0), "noise: a cell '", cell.name, "' takes ",
                      cell.E ? std::to_string(cell.E) + " probabilities" : "none", ", got ",
                      steps.noise ? "some" : "none");
    if (!cell.E) return;
    TORCH_CHECK_VALUE(steps.noise->sizes() == at::IntArrayRef({cell.E}), "noise: expected shape [", cell.E,
                      "] (probabilities), got ", steps.noise->sizes());
    TORCH_CHECK_TYPE(steps.noise->scalar_type() == at::kDouble, "noise: expected dtype float64, got ",
                     steps.noise->scalar_type());
    on_device(*steps.noise, "noise");
    if (!steps.draws) return;
    TORCH_CHECK_VALUE(steps.draws->sizes() == at::IntArrayRef({n.B, kDraws}), "draws: expected shape [", n.B, ", ",
                      int(kDraws), "] (batch; seed, row, first, step, stream), got ", steps.draws->sizes());
    TORCH_CHECK_TYPE(steps.draws->scalar_type() == at::kLong, "draws: expected dtype int64, got ",
                     steps.draws->scalar_type());
    on_device(*steps.draws, "draws");
  }

  void steps(const Steps& steps, const Sizes& n) const {
    if (steps.lengths) numbers(*steps.lengths, "lengths", n.B, "batch");
    if (steps.starts) {
      TORCH_CHECK_VALUE(steps.lengths, "starts: packed sequences need lengths beside their starts, got none");
      numbers(*steps.starts, "starts", n.T + 1, "time, and one more");
    }
    if (steps.reset) {
      TORCH_CHECK_VALUE(steps.reset->sizes() == n.shape({}), "reset: expected shape ", at::IntArrayRef(n.shape({})),
                        n.packed ? " (packed steps)" : " (time, batch)", ", got ", steps.reset->sizes());
      TORCH_CHECK_TYPE(steps.reset->scalar_type() == at::kBool, "reset: expected dtype bool, got ",
                       steps.reset->scalar_type());
      on_device(*steps.reset, "reset");
    }
  }

 private:
  void numbers(const Tensor& t, const char* name, int64_t count, const char* meaning) const {
    TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef({count}), name, ": expected shape [", count, "] (", meaning,
                      "), got ", t.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == at::kLong, name, ": expected dtype int64, got ", t.scalar_type());
    on_device(t, name);
  }
};

void floating(const Tensor& t, const char* name) {
  const auto type = t.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, name,
                   ": expected float32, float64, bfloat16 or float16, got ", type);
}

void make_contiguous(Tensor& t) { t = t.contiguous(); }
void make_contiguous(OptionalTensor& t) {
  if (t) t = t->contiguous();
}
void make_contiguous(Steps& steps) {
  for (OptionalTensor* t : {&steps.lengths, &steps.starts, &steps.reset, &steps.noise, &steps.draws})
    make_contiguous(*t);
}

// L, D, H and R, and the B of the states.
template <class Call>
Sizes sizes_of_states(const Call& call, const CellInfo& cell, const Weights& weights) {
  const Tensor& h0 = call.h0;
  const OptionalTensor& c0 = call.c0;
  Sizes n{};
  n.L = call.layers;
  n.heads = call.heads;
  n.D = all_directions(call);
  n.merge = find_merge(call.merge_mode);
  TORCH_CHECK(h0.dim() == 3, "h0: expected 3 dimensions (layers * directions, batch, state), got shape ", h0.sizes());
  n.B = h0.size(1);
  n.R = h0.size(2);
  const int64_t C = cell.C();
  TORCH_CHECK_VALUE(c0.has_value() == (C > 0), "c0: a cell '", cell.name, "' takes ", C ? "an initial c" : "no c",
                    ", got ", c0 ? "one" : "none");
  TORCH_CHECK(!c0 || c0->dim() == 3, "c0: expected 3 dimensions (layers * directions, batch, hidden), got shape ",
              c0->sizes());
  TORCH_CHECK(!c0 || c0->size(2) % C == 0, "c0: expected the ", C, " states beside h of a cell '", cell.name,
              "' one behind the other, ", C, " * hidden, got shape ", c0->sizes());
  n.H = c0 ? c0->size(2) / C : n.R;
  TORCH_CHECK(n.H > 0 && n.R > 0, "h0: expected a hidden size above zero, got shape ", h0.sizes());
  TORCH_CHECK_VALUE(!cell.normed || (n.L == 1 && n.heads == 1), "layers, heads: a cell '", cell.name,
                    "' takes one layer at a time, without heads, got ", n.L, " and ", n.heads);
  const bool projected = weights.has(kWHr);
  TORCH_CHECK(n.H == n.R || projected, "h0: expected the hidden size of c0, ", n.H,
              ", where there is no projection, got ", n.R);
  TORCH_CHECK_VALUE(n.heads == 1 || !projected, "w_hr: expected no projection beside ", n.heads, " heads");
  // Only a cell that never asks for its own h can be projected.
  TORCH_CHECK_VALUE(!projected || cell.S > 1, "w_hr: a projection needs a cell with a state beside h, got '", cell.name,
                    "'");
  return n;
}

// Every size that follows from a call's, of memory in bytes or of a loop, is one of these products, or less. `name` and
// `states` are those of the tensor that has all steps and of the first states.
void check_fit(const Sizes& n, const CellInfo& cell, int64_t window, const char* name, const char* states) {
  constexpr int64_t kRoom = 256;  // for two sizes that kernels round up to vectors or tiles
  const int64_t numbers = std::max({cell.columns(), cell.K, cell.C(), cell.P, 2 * cell.G});
  const Size bytes{kRoom * int64_t(sizeof(double)) * numbers, nullptr, nullptr}, layers{n.L, "layers", "layers"},
      heads{n.D, "heads", "directions of all heads"}, units{std::max(n.H, n.R), states, "hidden units"},
      rows{n.B, states, "rows"}, none{1, nullptr, nullptr};
  product_of({bytes, layers, heads, units, rows, {n.windows(window), name, "windows of steps"}});
  product_of({bytes, layers, heads, units, n.packed ? none : rows, {n.packed ? n.N : n.T, name, "steps"}});
  product_of({bytes, layers, heads, units, {n.L > 1 ? n.D * n.R : n.R, states, "units of a layer"}});
  product_of({bytes, layers, heads, units, {n.I, name, "features"}});
  product_of({bytes, {n.N, name, "steps of all rows"}, {n.I, name, "features"}});
}

// Of a tensor that has every step, `last` its last dimension: T, N and whether it is packed; returns the B that it has.
int64_t sizes_of_steps(Sizes& n, const Steps& steps, const Tensor& t, const char* name, const char* last) {
  n.packed = steps.starts.has_value();
  if (n.packed) {
    TORCH_CHECK(t.dim() == 2, name, ": expected 2 dimensions (packed steps, ", last, "), got shape ", t.sizes());
    n.T = steps.starts->numel() - 1;
    n.N = t.size(0);
    TORCH_CHECK_VALUE(n.T > 0, "starts: expected the places of 1 step or more, and their end, got shape ",
                      steps.starts->sizes());
    return n.B;
  }
  TORCH_CHECK(t.dim() == 3, name, ": expected 3 dimensions (time, batch, ", last, "), got shape ", t.sizes());
  n.T = t.size(0);
  n.N = product_of({{n.T, name, "steps"}, {t.size(1), name, "rows"}});
  return t.size(1);
}

}  // namespace

Sizes check(ForwardCall& call) {
  floating(call.x, "input");
  const CellInfo& cell = find_cell(call.cell);
  const Weights weights(call.weights, call);
  Sizes n = sizes_of_states(call, cell, weights);
  const int64_t B = sizes_of_steps(n, call, call.x, "input", "features");
  n.I = call.x.size(-1);
  check_fit(n, cell, 0, "input", "hx");
  TORCH_CHECK(!cell.normed || n.I == n.D * cell.G * n.H, "input: a cell '", cell.name,
              "' takes the input part of its gates, ", n.D * cell.G * n.H, " numbers, got shape ", call.x.sizes());
  const Checker like{call.x};
  like.tensor(call.h0, "hx", {n.L * n.D, B, n.R}, "layers * directions, batch, state");
  like.optional(call.c0, "cx", {n.L * n.D, B, cell.C() * n.H}, "layers * directions, batch, hidden");
  like.weights(weights, n, cell, true, call.step);
  like.masks(call.masks, n);
  like.optional(call.h_mask, "h_mask", {n.L * n.D, n.B, n.R}, "layers * directions, batch, state");
  like.steps(call, n);
  like.noise(call, n, cell);
  make_contiguous(call.h0);
  make_contiguous(call.c0);
  make_contiguous(call.h_mask);
  make_contiguous(static_cast<Steps&>(call));
  return n;
}

Sizes check(BackwardCall& call) {
  floating(call.y, "y");
  const CellInfo& cell = find_cell(call.cell);
  const Weights weights(call.weights, call);
  Sizes n = sizes_of_states(call, cell, weights);
  sizes_of_steps(n, call, call.y, "y", "directions * state");
  TORCH_CHECK_VALUE(call.window >= 0, "window: expected a number of steps, or 0 for none, got ", call.window);
  check_fit(n, cell, call.window, "y", "h0");
  const Checker like{call.y};
  const auto inner = [&] { return n.shape_of(n.inner(), {n.D * n.R}); };
  const auto every = [&](int64_t width) { return n.shape_of(n.L, {n.D, width}); };
  like.tensor(call.y, "y", n.shape({n.width()}), "time, batch, directions * state");
  if (n.inner()) like.tensor(call.ys, "ys", inner(), "layers, time, batch, directions * state");
  like.tensor(call.h0, "h0", {n.L * n.D, n.B, n.R}, "layers * directions, batch, state");
  like.optional(call.c0, "c0", {n.L * n.D, n.B, cell.C() * n.H}, "layers * directions, batch, hidden");
  like.weights(weights, n, cell, false, call.layers == 0);
  like.masks(call.masks, n);
  like.optional(call.h_mask, "h_mask", {n.L * n.D, n.B, n.R}, "layers * directions, batch, state");
  like.optional(call.dy, "dy", call.y.sizes(), "the shape of y");
  like.optional(call.dh_n, "dh_n", call.h0.sizes(), "the shape of h0");
  if (n.inner()) like.optional(call.dys, "dys", inner(), "the shape of ys");
  const bool c = cell.C() > 0;
  TORCH_CHECK_VALUE(c || (!call.dc_n && !call.dc), "dc: a cell '", cell.name, "' has no c");
  if (c) {
    like.optional(call.dc_n, "dc_n", call.c0->sizes(), "the shape of c0");
    like.optional(call.dc, "dc", every(cell.C() * n.H), "layers, time, batch, directions, hidden");
    like.tensor(call.c, "c", every(cell.C() * n.H), "layers, time, batch, directions, hidden");
  }
  if (cell.K) like.tensor(call.saved, "saved", every(cell.K * n.H), "layers, time, batch, directions, saved * hidden");
  if (call.over_saved) {
    TORCH_CHECK_VALUE(cell.fits_over_saved(), "saved: a cell '", cell.name,
                      "' saves values of another size than the gradients of its gates. Call sequence_backward.");
    TORCH_CHECK(call.saved.is_contiguous(), "saved: expected contiguous memory to write over. Call sequence_backward.");
  }
  like.steps(call, n);
  like.noise(call, n, cell);
  find_clip(call.clip, call.bound);
  for (Tensor* t : {&call.h0, &call.y, &call.ys, &call.c, &call.saved}) make_contiguous(*t);
  for (OptionalTensor* t : {&call.dy, &call.dh_n, &call.dc_n, &call.dys, &call.dc, &call.c0, &call.h_mask})
    make_contiguous(*t);
  make_contiguous(static_cast<Steps&>(call));
  return n;
}

void check_input_gradient(const Tensor& dgates, TensorList w_ih) {
  floating(dgates, "dgates");
  TORCH_CHECK(
      dgates.dim() == 4 || dgates.dim() == 3,
      "dgates: expected 4 dimensions (time, batch, directions, gates * hidden), or 3 where steps are packed, got "
      "shape ",
      dgates.sizes());
  const int64_t D = dgates.size(-2);
  TORCH_CHECK_VALUE(int64_t(w_ih.size()) == D, "w_ih: expected ", D, " tensors, one per direction, got ", w_ih.size());
  TORCH_CHECK(!w_ih.empty() && w_ih[0].dim() == 2 && w_ih[0].size(0) > 0 && w_ih[0].size(0) <= dgates.size(-1),
              "w_ih: expected matrices of 1 to ", dgates.size(-1), " rows (gates * hidden), like dgates");
  for (const Tensor& w : w_ih)
    Checker{dgates}.tensor(w, "w_ih", w_ih[0].sizes(), "gates * hidden, input, like the first");
}

static std::atomic<bool> invariant{false};
bool batch_invariant() { return invariant; }
void set_batch_invariant(bool on) { invariant = on; }

}  // namespace rnn
