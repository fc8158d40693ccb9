// sequence_gradients: by the kernels, with a node whose backward is the reference's.
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "autograd/by_reference.h"
#include "autograd/make_node.h"
#include "autograd/saving.h"
#include "autograd/tangents.h"
#include "ops/sizes.h"

namespace rnn {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

GradientsCall call_of(const Settings& settings, const Kept& kept, const OutputGradients& out,
                      at::IntArrayRef positions) {
  GradientsCall call;
  static_cast<Settings&>(call) = settings;
  static_cast<OutputGradients&>(call) = out;
  static_cast<Steps&>(call) = kept.steps;
  call.x = kept.inputs[kX];
  call.weights = kept.weights();
  call.h0 = kept.inputs[kH0];
  call.c0 = kept.c0();
  call.masks = given(kept.masks);
  call.h_mask = kept.h_mask;
  call.wanted = positions;
  std::tie(call.y, call.ys, call.c, call.h_raw, call.saved) = std::tie(kept.y, kept.ys, kept.c, kept.h_raw, kept.saved);
  return call;
}

Kept kept_of(const GradientsCall& call) {
  Kept kept = given_to(call);
  std::tie(kept.y, kept.ys, kept.c, kept.h_raw, kept.saved) = std::tie(call.y, call.ys, call.c, call.h_raw, call.saved);
  return kept;
}

// The tensors that are taken apart before sequence_backward checks what it gets of them.
struct PartsCheck {
  const GradientsCall& call;
  const int64_t L, D;  // D counts each head

  void like_y(const Tensor& t, const std::string& name) const {
    TORCH_CHECK_VALUE(t.scalar_type() == call.y.scalar_type(), name, ": expected dtype ", call.y.scalar_type(),
                      " like y, got ", t.scalar_type());
    TORCH_CHECK(t.device() == call.y.device(), name, ": expected device ", call.y.device(), " like y, got ",
                t.device());
  }

  // [before.., T, B, after..], packed [before.., N, after..].
  std::vector<c10::SymInt> shape(std::vector<c10::SymInt> before, std::initializer_list<c10::SymInt> after) const {
    const auto steps = call.x.sym_sizes().slice(0, call.x.dim() - 1);
    before.insert(before.end(), steps.begin(), steps.end());
    before.insert(before.end(), after);
    return before;
  }
  void whole(const Tensor& t, const std::string& name, const std::vector<c10::SymInt>& expected) const {
    TORCH_CHECK(t.sym_sizes().equals(expected), name, ": expected shape ", c10::SymIntArrayRef(expected), ", got ",
                t.sym_sizes());
    like_y(t, name);
  }
  void first(const OptionalTensor& t, const char* name, int64_t count, const char* meaning) const {
    TORCH_CHECK(!t || (t->dim() > 1 && t->sym_size(0) == count), name, ": expected ", count, " (", meaning,
                ") in the first of several dimensions, got shape ", t->sym_sizes());
  }

  void layers(bool merged) const {
    for (const auto& [t, name] :
         {std::pair(call.dh_n, "dh_n"), {call.dc_n, "dc_n"}, {call.c0, "c0"}, {call.h_mask, "h_mask"}})
      first(t, name, L * D, "layers * directions");
    const int64_t inner = merged ? L : L - 1;
    const c10::SymInt R = call.h0.sym_size(2), width = merged ? call.heads * R : D * R;
    whole(call.ys, "ys", shape({inner}, {D * R}));
    first(call.dys, "dys", inner, "layers of ys");
    first(call.dc, "dc", L, "layers");
    for (const auto& [t, name] : {std::pair(call.c, "c"), {call.saved, "saved"}})
      if (t.dim() > 1) first(t, name, L, "layers");
    if (!call.masks) return;
    TORCH_CHECK_VALUE(int64_t(call.masks->size()) == L - 1, "masks: expected ", L - 1,
                      " tensors, one between any two layers, or None, got ", call.masks->size());
    for (const Tensor& mask : *call.masks) {
      const bool repeats = mask.dim() == 3 && mask.sym_size(0) == 1;
      whole(mask, "masks", repeats ? std::vector<c10::SymInt>{1, call.h0.sym_size(1), width} : shape({}, {width}));
    }
  }
};

// What sequence_backward does not take, or is not given as a whole; it checks the rest.
void check(const GradientsCall& call, const Kept& kept) {
  for (const int64_t i : call.wanted)
    TORCH_CHECK_VALUE(i >= 0 && size_t(i) < kept.inputs.size(), "wanted: expected positions from 0 to ",
                      kept.inputs.size() - 1, ", of x, h0, c0 and the weights, got ", i);
  const Tensor &x = call.x, &y = call.y;
  const int64_t dim = call.starts ? 2 : 3;
  TORCH_CHECK(x.dim() == dim && y.dim() == dim, "x, y: expected ", dim, " dimensions (",
              dim == 2 ? "packed steps" : "time, batch", ", features), got shapes ", x.sym_sizes(), " and ",
              y.sym_sizes());
  for (int64_t i = 0; i + 1 < dim; ++i)
    TORCH_CHECK(x.sym_size(i) == y.sym_size(i), "x: expected the steps of y, of shape ", y.sym_sizes(), ", got shape ",
                x.sym_sizes());
  const Weights weights(call.weights, call);
  for (int64_t l = 0; l < call.layers; ++l) {
    for (int64_t d = 0; d < call.directions; ++d) {
      for (const Weight kind : {kWIh, kWHr})
        TORCH_CHECK(!weights.has(kind) || weights.get(kind, l, d).dim() == 2, parameter_name(kind, l, d, false),
                    ": expected 2 dimensions, got shape ", weights.get(kind, l, d).sym_sizes());
    }
  }
  const PartsCheck parts{call, call.layers, all_directions(call)};
  TORCH_CHECK(call.h0.dim() == 3, "h0: expected 3 dimensions (layers * directions, batch, state), got shape ",
              call.h0.sym_sizes());
  parts.first(call.h0, "h0", parts.L * parts.D, "layers * directions");
  const c10::SymInt B = call.h0.sym_size(1);
  TORCH_CHECK_VALUE(call.lanes >= 0 && (call.lanes == 0 || B % call.lanes == 0), "lanes: expected 0, or a divisor of ",
                    "the batch of ", B, " rows, got ", call.lanes);
  const CellInfo& cell = find_cell(call.cell);
  const c10::SymInt H = call.projected ? weights.get(kWHr, 0, 0).sym_size(1) : call.h0.sym_size(2);
  for (int64_t d = 0; d < call.directions; ++d)  // of further layers sequence_backward has a use for it
    parts.whole(weights.get(kWIh, 0, d), parameter_name(kWIh, 0, d, false),
                {H * (call.heads * cell.G), cell.normed ? c10::SymInt(0) : x.sym_sizes().back()});
  if (call.projected)
    parts.whole(call.h_raw, "h_raw", parts.shape({parts.L}, {parts.D, weights.get(kWHr, 0, 0).sym_size(1)}));
  if (call.layers > 1) parts.layers(call.directions > 1 && find_merge(call.merge_mode) != Merge::kConcat);
  TORCH_CHECK_VALUE(x.scalar_type() == y.scalar_type(), "x: expected dtype ", y.scalar_type(), " like y, got ",
                    x.scalar_type());
}

template <Library library>
GradientsOp::Results run(GradientsCall& call) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const Kept kept = kept_of(call);
  check(call, kept);
  std::vector<bool> wanted(kept.inputs.size());
  for (const int64_t i : call.wanted) wanted[size_t(i)] = true;
  const bool plain = !at::areAnyTensorSubclassLike(kept.inputs) && !at::isTensorSubclassLike(call.y);
  Gradients found =
      gradients(call, kept, call, wanted, {library, call.invariant, call.record, plain, false, call.lanes});
  GradientsOp::Results results;
  for (const int64_t i : call.wanted) std::get<0>(results).push_back(found.inputs[i]);
  std::get<1>(results) = call.record ? found.flow : at::empty({0}, call.x.options());
  return results;
}

// The number of gradients of outputs, which stand before the inputs of forward among what the op depends on.
constexpr size_t kOut = 5;

// What the gradients depend on: dy, dh_n, dc_n, dys, dc, x, h0, c0 and the weights; undefined where there is none.
variable_list sources(const GradientsCall& call) {
  variable_list all;
  all.reserve(kOut + kFirstWeight + call.weights.size());
  const auto add = [&](const auto&... t) { (all.push_back(t.value_or(Tensor())), ...); };
  add(call.dy, call.dh_n, call.dc_n, call.dys, call.dc);
  all.insert(all.end(), {call.x, call.h0, call.c0.value_or(Tensor())});
  all.insert(all.end(), call.weights.begin(), call.weights.end());
  return all;
}

class GradientsBackward final : public torch::autograd::Node {
 public:
  GradientsBackward(const GradientsCall& call, const variable_list& from)
      : settings_(lasting(call)), wanted_(call.wanted.vec()), invariant_(call.invariant), lanes_(call.lanes) {
    const variable_list masks = list_of(call.masks).vec();
    masks_ = masks.size();
    for (const variable_list& list : {from, masks})
      for (const Tensor& t : list) {
        add_next_edge(edge_to(t));
        saved_.emplace_back(t, false);
      }
    for (const auto of : kOfSteps) saved_.emplace_back(call.*of, false);
    saved_.emplace_back(call.h_mask, false);
    // What forward returned, as constants with no say in whether others have been written to.
    for (const Tensor& t : {call.y, call.ys, call.c, call.h_raw, call.saved})
      saved_.emplace_back(t.defined() ? t.variable_data() : t, false);
  }

  std::string name() const override { return "SequenceGradientsBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& t : saved_) t.reset_data();
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    collect_fields(args, settings_);
    args.collect(wanted_);
    args.collect(invariant_);
    args.collect(lanes_);
    for (const SavedVariable& t : saved_) args.collect(t, false);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (SavedVariable& t : saved_) swap.before(t);
    variable_list result = apply(variable_list(grads));
    for (SavedVariable& t : saved_) swap.after(t);
    return result;
  }

 protected:
  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    refuse_invariant(invariant_, "the derivative of a gradient (a second backward, after create_graph=True)");
    std::vector<int64_t> positions;
    const size_t edges = saved_.size() - kConstants - kResults;
    for (size_t i = 0; i < edges - masks_; ++i)
      if (task_should_compute_output(i)) positions.push_back(int64_t(i));
    variable_list all;
    for (const SavedVariable& t : saved_) all.push_back(t.unpack());
    const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    Kept kept;
    const auto masks = all.begin() + ptrdiff_t(edges - masks_);
    kept.inputs.assign(all.begin() + kOut, masks);
    kept.masks.assign(masks, all.begin() + ptrdiff_t(edges));
    for (size_t i = 0; i < kSteps; ++i) kept.steps.*kOfSteps[i] = optional(all[edges + i]);
    kept.h_mask = optional(all[edges + kSteps]);
    const Tensor* const results = &all[edges + kConstants];
    std::tie(kept.y, kept.ys, kept.c, kept.h_raw, kept.saved) =
        std::tie(results[0], results[1], results[2], results[3], results[4]);
    const OutputGradients out{optional(all[0]), optional(all[1]), optional(all[2]), optional(all[3]), optional(all[4])};
    GradientsCall call = call_of(settings_, kept, out, wanted_);
    call.lanes = lanes_;
    std::vector<Tensor> found = by_reference().second_order(call, grads, positions);
    variable_list result(edges);
    for (size_t i = 0; i < positions.size(); ++i) result[positions[i]] = std::move(found[i]);
    return result;
  }

 private:
  const Settings settings_;
  const std::vector<int64_t> wanted_;
  const bool invariant_;
  const int64_t lanes_;
  static constexpr size_t kSteps = kOfSteps.size(), kConstants = kSteps + 1, kResults = 5;
  size_t masks_;
  std::vector<SavedVariable> saved_;  // the sources, the masks; what Steps has, and h_mask; forward's results
};

template <Library library>
GradientsOp::Results with_history(c10::DispatchKeySet keys, GradientsCall& call) {
  const variable_list from = sources(call);
  decltype(make_node<GradientsBackward>(call, from)) node;
  if (torch::autograd::compute_requires_grad(TensorList(from))) node = make_node<GradientsBackward>(call, from);
  GradientsOp::Results results = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return GradientsOp::redispatch(SequenceOps<library>::gradients(), keys & c10::after_autograd_keyset, call);
  }();
  std::vector<Tensor>& found = std::get<0>(results);
  if (node) torch::autograd::set_history(found, node);
  if (has_tangents(from)) {
    refuse_invariant(call.invariant, "a tangent (forward mode)");
    set_tangents(found, by_reference().gradient_tangents(call));
  }
  return results;
}

template <Library library>
void implement(torch::Library& implementation, bool autograd) {
  using Op = GradientsOp;
  if (autograd) {
    implementation.impl("sequence_gradients",
                        TORCH_FN((Op::Dispatched::entry_with_keys<Op::Results, with_history<library>>)));
  } else {
    implementation.impl("sequence_gradients", TORCH_FN((Op::Dispatched::entry<Op::Results, run<library>>)));
  }
}

ByReference functions;

}  // namespace

void refuse_invariant(bool invariant, const char* what) {
  TORCH_CHECK(!invariant, "batch_invariant: ", what,
              " comes from the reference, whose products depend on the batch. Run forward without batch_invariant.");
}

const ByReference& by_reference() {
  TORCH_CHECK(
      functions.second_order,
      "rnnkernels: tangents, and derivatives of gradients, come from the reference in Python. Import rnnkernels "
      "there.");
  return functions;
}
void set_by_reference(ByReference brought) { functions = std::move(brought); }

Gradients gradients_as_op(const Settings& settings, const Kept& kept, const OutputGradients& out,
                          const std::vector<bool>& wanted, Library library, bool invariant, bool record) {
  std::vector<int64_t> positions;
  for (size_t i = 0; i < wanted.size(); ++i)
    if (wanted[i]) positions.push_back(int64_t(i));
  GradientsCall call = call_of(settings, kept, out, positions);
  call.invariant = invariant;
  call.record = record;
  auto [found, norms] = with_ops(library, [&](auto ops) { return GradientsOp::call(ops.gradients(), call); });
  Gradients result{std::vector<Tensor>(kept.inputs.size()), norms};
  for (size_t i = 0; i < positions.size(); ++i) result.inputs[positions[i]] = found[i];
  return result;
}

}  // namespace rnn

TORCH_LIBRARY_IMPL(rnnkernels, CompositeExplicitAutograd, library) {
  rnn::implement<rnn::Library::kCompiled>(library, false);
}
TORCH_LIBRARY_IMPL(rnnkernels_triton, CompositeExplicitAutograd, library) {
  rnn::implement<rnn::Library::kTriton>(library, false);
}
TORCH_LIBRARY_IMPL(rnnkernels, Autograd, library) { rnn::implement<rnn::Library::kCompiled>(library, true); }
TORCH_LIBRARY_IMPL(rnnkernels_triton, Autograd, library) { rnn::implement<rnn::Library::kTriton>(library, true); }
