#include "common/arguments.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cmath>
#include <utility>

#include "common/cell_list.h"

namespace rnn {

const CellInfo& find_cell(std::string_view name) {
  static const std::vector<CellInfo> table = [] {
    std::vector<CellInfo> t;
    for_each_cell([&](auto cell) {
      t.push_back({int(t.size()), cell.kName, cell.kGates, cell.G, cell.S, cell.K, cell.A, cell.kReadsH});
    });
    return t;
  }();
  for (const CellInfo& info : table)
    if (info.name == name) return info;
  std::string known;
  for (const CellInfo& info : table) known += (known.empty() ? "" : ", ") + std::string(info.name);
  TORCH_CHECK_VALUE(false, "cell: expected one of ", known, ", got '", name, "'");
}

static constexpr std::pair<const char*, Clip::Kind> clips[] = {
    {"none", Clip::kNone}, {"value", Clip::kValue}, {"norm", Clip::kNorm}, {"tanh", Clip::kTanh}};

Clip find_clip(std::string_view kind, double bound) {
  for (const auto& [name, number] : clips) {
    if (name != kind) continue;
    TORCH_CHECK_VALUE(number == Clip::kNone || (bound > 0 && std::isfinite(bound)),
                      "bound: expected a finite number above zero, got ", bound);
    return {number, bound};
  }
  TORCH_CHECK_VALUE(false, "clip: expected one of none, value, norm, tanh, got '", kind, "'");
}

const char* clip_name(Clip::Kind kind) {
  for (const auto& [name, number] : clips)
    if (number == kind) return name;
  TORCH_INTERNAL_ASSERT(false, "no such clip: ", int(kind));
}

Tensor fresh(at::IntArrayRef shape, const at::TensorOptions& options) {
  Tensor t = at::empty(shape, options);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  if (t.is_cpu() && t.nbytes() >= 2 * kHugePage) {
    const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = (address + t.nbytes()) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: nothing depends on its being heard
  }
#endif
  return t;
}

namespace {

std::string parameter_name(const char* base, int64_t layer, size_t direction) {
  if (layer < 0) return base;
  return std::string(base) + "_l" + std::to_string(layer) + (direction ? "_reverse" : "");
}

// Everything is held against the input: its device and dtype are those of the call.
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

  void optional(const OptionalTensor& t, const std::string& name, at::IntArrayRef shape, const char* meaning) const {
    if (t) tensor(*t, name, shape, meaning);
  }

  void per_direction(TensorList list, const char* base, int64_t layer, at::IntArrayRef shape,
                     const char* meaning) const {
    for (size_t d = 0; d < list.size(); ++d) tensor(list[d], parameter_name(base, layer, d), shape, meaning);
  }

  void steps(const Steps& steps, const Sizes& n) const {
    const auto& [lengths, starts, reset] = steps;
    if (lengths) numbers(*lengths, "lengths", n.B, "batch");
    if (starts) {
      TORCH_CHECK_VALUE(lengths, "starts: packed sequences need lengths beside their starts, got none");
      numbers(*starts, "starts", n.T + 1, "time, and one more");
    }
    if (reset) {
      TORCH_CHECK_VALUE(reset->sizes() == n.shape({}), "reset: expected shape ", at::IntArrayRef(n.shape({})),
                        n.packed ? " (packed steps)" : " (time, batch)", ", got ", reset->sizes());
      TORCH_CHECK_TYPE(reset->scalar_type() == at::kBool, "reset: expected dtype bool, got ", reset->scalar_type());
      on_device(*reset, "reset");
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

void count(size_t got, int64_t expected, const char* name) {
  TORCH_CHECK_VALUE(int64_t(got) == expected, name, ": expected ", expected, " tensors, one per direction, got ", got);
}

void floating(const Tensor& t, const char* name) {
  const auto type = t.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, name,
                   ": expected float32, float64, bfloat16 or float16, got ", type);
}

Tensor nothing(const Tensor& like) { return at::empty({0}, like.options()); }

void make_contiguous(Tensor& t) { t = t.contiguous(); }
void make_contiguous(OptionalTensor& t) {
  if (t) t = t->contiguous();
}

void make_contiguous(Steps& steps) {
  for (OptionalTensor* t : {&steps.lengths, &steps.starts, &steps.reset}) make_contiguous(*t);
}

std::vector<Tensor> contiguous(TensorList list) {
  std::vector<Tensor> out;
  for (const Tensor& t : list) out.push_back(t.contiguous());
  return out;
}

Sizes sizes_of_states(const CellInfo& cell, const Tensor& h0, const OptionalTensor& c0, TensorList w_hh,
                      TensorList w_hr) {
  Sizes n{};
  n.D = int64_t(w_hh.size());
  TORCH_CHECK_VALUE(n.D == 1 || n.D == 2, "w_hh: expected 1 or 2 tensors, one per direction, got ", n.D);
  TORCH_CHECK(h0.dim() == 3, "h0: expected 3 dimensions (directions, batch, state), got shape ", h0.sizes());
  n.B = h0.size(1);
  n.R = h0.size(2);
  TORCH_CHECK_VALUE(c0.has_value() == (cell.S > 1), "c0: a cell '", cell.name, "' takes ",
                    cell.S > 1 ? "an initial c" : "no c", ", got ", c0 ? "one" : "none");
  TORCH_CHECK(!c0 || c0->dim() == 3, "c0: expected 3 dimensions (directions, batch, hidden), got shape ", c0->sizes());
  n.H = c0 ? c0->size(2) : n.R;
  TORCH_CHECK(n.H > 0 && n.R > 0, "h0: expected a hidden size above zero, got shape ", h0.sizes());
  TORCH_CHECK(n.H == n.R || !w_hr.empty(), "h0: expected the hidden size of c0, ", n.H,
              ", where there is no projection, got ", n.R);
  // Only a cell that never asks for its own h can be projected.
  TORCH_CHECK_VALUE(w_hr.empty() || cell.S > 1, "w_hr: a projection needs a cell with a state beside h, got '",
                    cell.name, "'");
  return n;
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
  n.N = n.T * t.size(1);
  return t.size(1);
}

}  // namespace

Sizes check(ForwardArguments& a) {
  floating(a.x, "input");
  Sizes n = sizes_of_states(a.cell, a.h0, a.c0, a.w_hh, a.w_hr);
  const int64_t B = sizes_of_steps(n, a.steps, a.x, "input", "features"), rows = a.cell.G * n.H;
  n.I = a.x.size(-1);
  const Checker like{a.x};
  count(a.w_ih.size(), n.D, "w_ih");
  if (!a.b_ih.empty()) count(a.b_ih.size(), n.D, "b_ih");
  if (!a.b_hh.empty()) count(a.b_hh.size(), n.D, "b_hh");
  if (!a.w_hr.empty()) count(a.w_hr.size(), n.D, "w_hr");
  like.tensor(a.h0, "hx", {n.D, B, n.R}, "directions, batch, state");
  like.optional(a.c0, "cx", {n.D, B, n.H}, "directions, batch, hidden");
  like.per_direction(a.w_ih, "weight_ih", a.layer, {rows, n.I}, "gates * hidden_size, input");
  like.per_direction(a.w_hh, "weight_hh", a.layer, {rows, n.R}, "gates * hidden_size, state");
  like.per_direction(a.b_ih, "bias_ih", a.layer, {rows}, "gates * hidden_size");
  like.per_direction(a.b_hh, "bias_hh", a.layer, {rows}, "gates * hidden_size");
  like.per_direction(a.w_hr, "weight_hr", a.layer, {n.R, n.H}, "proj_size, hidden_size");
  like.steps(a.steps, n);
  make_contiguous(a.h0);
  make_contiguous(a.c0);
  make_contiguous(a.steps);
  return n;
}

Sizes check(BackwardArguments& a) {
  floating(a.y, "y");
  Sizes n = sizes_of_states(a.cell, a.h0, a.c0, a.w_hh, a.w_hr);
  sizes_of_steps(n, a.steps, a.y, "y", "directions * state");
  const Checker like{a.y};
  const int64_t B = n.B, rows = a.cell.G * n.H;
  if (!a.w_hr.empty()) count(a.w_hr.size(), n.D, "w_hr");
  like.tensor(a.y, "y", n.shape({n.D * n.R}), "time, batch, directions * state");
  like.tensor(a.h0, "h0", {n.D, B, n.R}, "directions, batch, state");
  like.optional(a.c0, "c0", {n.D, B, n.H}, "directions, batch, hidden");
  like.per_direction(a.w_hh, "w_hh", -1, {rows, n.R}, "gates * hidden, state");
  like.per_direction(a.w_hr, "w_hr", -1, {n.R, n.H}, "projection, hidden");
  like.optional(a.dy, "dy", a.y.sizes(), "the shape of y");
  like.optional(a.dh_n, "dh_n", a.h0.sizes(), "the shape of h0");
  const bool c = a.cell.S > 1;
  TORCH_CHECK_VALUE(c || (!a.dc_n && !a.dc), "dc: a cell '", a.cell.name, "' has no c");
  if (c) {
    like.optional(a.dc_n, "dc_n", a.c0->sizes(), "the shape of c0");
    like.optional(a.dc, "dc", n.shape({n.D, n.H}), "time, batch, directions, hidden");
    like.tensor(a.c, "c", n.shape({n.D, n.H}), "time, batch, directions, hidden");
  }
  if (a.cell.K)
    like.tensor(a.saved, "saved", n.shape({n.D, a.cell.K * n.H}), "time, batch, directions, saved * hidden");
  if (a.over_saved) {
    TORCH_CHECK_VALUE(a.cell.K > 0 && a.cell.K == a.cell.G + a.cell.A, "saved: a cell '", a.cell.name,
                      "' saves values of another size than the gradients of its gates. Call sequence_backward.");
    TORCH_CHECK(a.saved.is_contiguous(), "saved: expected contiguous memory to write over. Call sequence_backward.");
  }
  like.steps(a.steps, n);
  TORCH_CHECK_VALUE(a.window >= 0, "window: expected a number of steps, or 0 for none, got ", a.window);
  for (Tensor* t : {&a.h0, &a.y, &a.c, &a.saved}) make_contiguous(*t);
  for (OptionalTensor* t : {&a.dy, &a.dh_n, &a.dc_n, &a.dc, &a.c0}) make_contiguous(*t);
  make_contiguous(a.steps);
  return n;
}

void check_input_gradient(const Tensor& dgates, TensorList w_ih) {
  floating(dgates, "dgates");
  TORCH_CHECK(
      dgates.dim() == 4 || dgates.dim() == 3,
      "dgates: expected 4 dimensions (time, batch, directions, gates * hidden), or 3 where steps are packed, got "
      "shape ",
      dgates.sizes());
  count(w_ih.size(), dgates.size(-2), "w_ih");
  TORCH_CHECK(!w_ih.empty() && w_ih[0].dim() == 2 && w_ih[0].size(0) > 0 && w_ih[0].size(0) <= dgates.size(-1),
              "w_ih: expected matrices of 1 to ", dgates.size(-1), " rows (gates * hidden), like dgates");
  Checker{dgates}.per_direction(w_ih, "w_ih", -1, w_ih[0].sizes(), "gates * hidden, input, like the first");
}

static std::atomic<bool> invariant{false};
bool batch_invariant() { return invariant; }
void set_batch_invariant(bool on) { invariant = on; }

static Tensor project_input(const ForwardArguments& a, const Sizes& n) {
  TORCH_CHECK(!batch_invariant(), "rnnkernels.batch_invariant: expected a CPU tensor, got one on ", a.x.device(),
              ", where torch's products depend on the size of the batch. Move the layer to the CPU, or switch it off.");
  const int64_t width = a.cell.G * n.H;
  Tensor gx = fresh(n.shape({n.D, width}), a.x.options());
  const Tensor x = a.x.reshape({n.N, n.I});
  for (int64_t d = 0; d < n.D && gx.numel(); ++d) {
    Tensor out = gx.view({n.N, n.D * width}).narrow(1, d * width, width);
    at::mm_out(out, x, a.w_ih[d].t());
  }
  return gx;
}

ForwardTensors prepare(const ForwardArguments& a, const Sizes& n, Input input) {
  ForwardTensors t;
  const auto options = a.x.options();
  if (input == Input::kProjected) t.gx = project_input(a, n);
  t.x = a.x.numel() == 0 || a.x.stride(-1) == 1 ? a.x : a.x.contiguous();
  t.w_ih = contiguous(a.w_ih);
  t.w_hh = contiguous(a.w_hh);
  t.b_ih = contiguous(a.b_ih);
  t.b_hh = contiguous(a.b_hh);
  t.w_hr = contiguous(a.w_hr);
  const bool c = a.cell.S > 1;
  t.y = fresh(n.shape({n.D * n.R}), options);
  t.h_n = fresh({n.D, n.B, n.R}, options);
  t.c_n = c ? fresh({n.D, n.B, n.H}, options) : nothing(a.x);
  t.c = c && (a.save || a.all_c) ? fresh(n.shape({n.D, n.H}), options) : nothing(a.x);
  t.h_raw = a.save && !t.w_hr.empty() ? fresh(n.shape({n.D, n.H}), options) : nothing(a.x);
  if (!a.save || a.cell.K == 0) {
    t.saved = nothing(a.x);
  } else {
    const bool shared = t.gx.defined() && a.cell.K == a.cell.G;
    t.saved = shared ? t.gx : fresh(n.shape({n.D, a.cell.K * n.H}), options);
  }
  return t;
}

BackwardTensors prepare(const BackwardArguments& a, const Sizes& n) {
  BackwardTensors t;
  const auto options = a.y.options();
  t.w_hh = contiguous(a.w_hh);
  t.w_hr = contiguous(a.w_hr);
  t.dgates = a.over_saved ? a.saved : fresh(n.shape({n.D, (a.cell.G + a.cell.A) * n.H}), options);
  t.dh0 = a.initial ? fresh({n.D, n.B, n.R}, options) : nothing(a.y);
  t.dc0 = a.initial && a.cell.S > 1 ? fresh({n.D, n.B, n.H}, options) : nothing(a.y);
  t.dproj = t.w_hr.empty() ? nothing(a.y) : fresh(n.shape({n.D, n.R}), options);
  const auto wide = options.dtype(a.y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  t.flow = a.flow ? at::empty(n.shape({n.D}), wide) : at::empty({0}, wide);
  return t;
}

}  // namespace rnn
