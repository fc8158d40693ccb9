// The loops over tangents, of one layer.
#include "cpu/check_values.h"
#include "cpu/launch.h"
#include "ops/pointers.h"
#include "ops/tangent_calls.h"

namespace rnn::cpu {
namespace {

// What both directions of the loops ask of a call.
template <class Call>
void check_one_layer(const Call& call, const CellInfo& cell) {
  TORCH_CHECK_VALUE(call.layers == 1, "layers: expected 1, got ", call.layers);
  TORCH_CHECK_VALUE(call.directions == 1 || find_merge(call.merge_mode) == Merge::kConcat,
                    "merge_mode: expected concat, got ", call.merge_mode);
  TORCH_CHECK_NOT_IMPLEMENTED(cell.built_in() && !cell.normed, "cell: there are no loops over tangents of '", cell.name,
                              "'");
}

template <class Call>
void check_type(const Call& call, const Tensor& like) {
  TORCH_CHECK_TYPE(like.scalar_type() == at::kFloat || like.scalar_type() == at::kDouble,
                   "tangents: expected float32 or float64, got ", like.scalar_type());
}

// A further tensor of a call, next to each other in memory.
void expect(Tensor& t, const char* name, at::IntArrayRef shape, const Tensor& like) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, ": expected shape ", shape, ", got ", t.sizes());
  TORCH_CHECK_VALUE(t.scalar_type() == like.scalar_type(), name, ": expected dtype ", like.scalar_type(), ", got ",
                    t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == like.device(), name, ": expected device ", like.device(), ", got ", t.device());
  t = t.contiguous();
}
void expect(OptionalTensor& t, const char* name, at::IntArrayRef shape, const Tensor& like) {
  if (t) expect(*t, name, shape, like);
}

// h0, c0, y, c and saved, in their names with an ending.
struct StatesCheck {
  const Sizes& n;
  const CellInfo& cell;
  const Tensor& like;

  void operator()(Tensor& h0, OptionalTensor& c0, Tensor& y, Tensor& c, Tensor& saved, const std::string& end) const {
    const auto every = [&](int64_t width) { return n.shape_of(1, {n.D, width}); };
    expect(h0, ("h0" + end).c_str(), {n.D, n.B, n.R}, like);
    TORCH_CHECK_VALUE(c0.has_value() == (cell.C() > 0), "c0", end, ": a cell '", cell.name, "' takes ",
                      cell.C() ? "one" : "none", ", got ", c0 ? "one" : "none");
    expect(c0, ("c0" + end).c_str(), {n.D, n.B, cell.C() * n.H}, like);
    expect(y, ("y" + end).c_str(), n.shape({n.D * n.R}), like);
    if (cell.C()) expect(c, ("c" + end).c_str(), every(cell.C() * n.H), like);
    if (cell.K) expect(saved, ("saved" + end).c_str(), every(cell.K * n.H), like);
  }
};

template <class IO>
States<IO> states(const Tensor& h0, const OptionalTensor& c0, const Tensor& y, const Tensor& c, const Tensor& saved) {
  return {pointer<const IO>(h0), pointer<const IO>(c0), pointer<const IO>(y), pointer<const IO>(c),
          pointer<const IO>(saved)};
}

// Calls f(entry, kernels of the cell) where there is a row and a step.
template <class F>
void dispatch(const Sizes& n, const CellInfo& cell, const Tensor& like, F&& f) {
  if (n.N == 0 || n.B == 0) return;
  const auto call = [&](const auto& entry) { f(entry, CellKernels(entry.cells[cell.number])); };
  like.scalar_type() == at::kDouble ? call(available().float64) : call(available().float32);
}

ForwardOutputs forward_tangents(ForwardTangentsCall& call) {
  call.save = true;
  ForwardRun all(call);
  check_one_layer(call, all.cell());
  check_type(call, call.x);
  check_values(call, all.sizes());
  const Sizes& n = all.sizes();
  StatesCheck{n, all.cell(), call.x}(call.h0_at, call.c0_at, call.y_at, call.c_at, call.saved_at, "_at");
  for (const auto& [t, name] : {std::pair(&call.of_gx, "of_gx"), {&call.of_gh, "of_gh"}})
    expect(*t, name, n.shape({n.D, all.cell().G * n.H}), call.x);
  expect(call.of_h, "of_h", n.shape({n.D * n.R}), call.x);
  ForwardLayer layer = all.layer(0, call.x);
  dispatch(n, all.cell(), call.x, [&]<class IO>(const Entry<IO>& entry, CellKernels<IO> kernels) {
    kernels.forward = kernels.forward_tangents;
    kernels.carries_tangents = true;
    const ForwardTangents<IO> p{
        parameters<IO>(layer), states<IO>(call.h0_at, call.c0_at, call.y_at, call.c_at, call.saved_at),
        pointer<const IO>(call.of_gx), pointer<const IO>(call.of_gh), pointer<const IO>(call.of_h)};
    with_launch([&](const Launch& launch) { entry.forward(launch, kernels, p, {}); });
  });
  return std::move(all).outputs();
}

// What a loop backwards of one layer may not be asked for here.
void check_backward(const BackwardCall& call, const BackwardRun& all) {
  check_one_layer(call, all.cell());
  check_type(call, call.y);
  check_values(call, all.sizes());
  TORCH_CHECK_VALUE(call.window == 0 && call.clip == "none" && !call.record,
                    "window, clip, record: expected none of them, got ", call.window, ", ", call.clip, ", ",
                    call.record);
}

BackwardRecordOutputs backward_record(BackwardCall& call) {
  BackwardRun all(call);
  check_backward(call, all);
  const Sizes& n = all.sizes();
  const Tensor dnext = fresh(n.shape_of(1, {n.D, all.cell().S * n.H}), call.y.options());
  BackwardLayer layer = all.layer(0, call.dy);
  dispatch(n, all.cell(), call.y, [&]<class IO>(const Entry<IO>& entry, CellKernels<IO> kernels) {
    kernels.backward = kernels.backward_record;
    const BackwardRecord<IO> p{parameters<IO>(layer), pointer<IO>(dnext)};
    with_launch([&](const Launch& launch) { entry.backward(launch, kernels, p); });
  });
  return {std::move(all).outputs(), dnext};
}

BackwardOutputs backward_tangents(BackwardTangentsCall& call) {
  BackwardRun all(call);
  check_backward(call, all);
  const Sizes& n = all.sizes();
  StatesCheck{n, all.cell(), call.y}(call.h0_t, call.c0_t, call.y_t, call.c_t, call.saved_t, "_t");
  expect(call.dnext, "dnext", n.shape_of(1, {n.D, all.cell().S * n.H}), call.y);
  expect(call.of_raw, "of_raw", n.shape({n.D, n.H}), call.y);
  BackwardLayer layer = all.layer(0, call.dy);
  dispatch(n, all.cell(), call.y, [&]<class IO>(const Entry<IO>& entry, CellKernels<IO> kernels) {
    kernels.backward = kernels.backward_tangents;
    const BackwardTangents<IO> p{parameters<IO>(layer), pointer<const IO>(call.dnext),
                                 states<IO>(call.h0_t, call.c0_t, call.y_t, call.c_t, call.saved_t),
                                 pointer<const IO>(call.of_raw)};
    with_launch([&](const Launch& launch) { entry.backward(launch, kernels, p); });
  });
  return std::move(all).outputs();
}

}  // namespace
}  // namespace rnn::cpu

TORCH_LIBRARY_IMPL(rnnkernels, CPU, library) {
  using namespace rnn;
  const auto add = [&]<class O, typename O::Outputs (*run)(typename O::Call&)>(const char* name) {
    library.impl(name, O::Dispatched::template entry<typename O::Results, O::template implementation<run>>);
  };
  add.operator()<ForwardTangentsOp, cpu::forward_tangents>("forward_tangents");
  add.operator()<BackwardRecordOp, cpu::backward_record>("backward_record");
  add.operator()<BackwardTangentsOp, cpu::backward_tangents>("backward_tangents");
}
