// The sequence ops on Triton: tensors are checked and made here, as for every backend; the loops over time are launched
// by Python (rnnkernels/_backends/triton), where Triton lives.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/unflatten.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/utils/pybind.h>

#include "ops/pointers.h"

namespace rnn::triton {
namespace {

namespace py = pybind11;

py::object given(const Tensor& t) { return t.numel() ? py::cast(t) : py::none(); }
py::object given(const OptionalTensor& t) { return t ? py::cast(*t) : py::none(); }
// Triton has no pointers to bool.
py::object bytes(const OptionalTensor& t) { return t ? py::cast(t->view(at::kByte)) : py::none(); }

// What all directions have, each with the rows of its heads, as one tensor with a dimension for all of them in front.
Tensor stacked(const LayerWeights::List& parts, int64_t heads) {
  LayerWeights::List apart;
  for (const Tensor& part : parts) apart.push_back(part.unflatten(0, {heads, part.size(0) / heads}));
  return apart.size() == 1 ? apart[0] : at::cat(apart);
}
// Of a cell that has none, a shape alone.
Tensor recurrent_weights(const CellInfo& cell, const Sizes& n, const LayerWeights& w, const Tensor& like) {
  return cell.recurrent ? stacked(w.w_hh, n.heads) : at::empty({1}, like.options()).expand({n.D, cell.G * n.H, n.H});
}

void launch(const char* pass, const CellInfo& cell, c10::Device device, const py::dict& arguments) {
  c10::OptionalDeviceGuard guard;
  if (!device.is_cpu()) guard.reset_device(device);
  const char* const module =
      cell.normed ? "rnnkernels._backends.triton.normed_launch" : "rnnkernels._backends.triton.launch";
  py::module_::import(module).attr(pass)(**arguments);
}

void refuse(const Tensor& like, const LayerWeights& w) {
  TORCH_CHECK_NOT_IMPLEMENTED(w.w_hr.empty(),
                              "rnnkernels: the triton backend has no projections. Leave out proj_size, "
                              "or ask for another backend.");
  TORCH_CHECK_NOT_IMPLEMENTED(like.scalar_type() != at::kDouble,
                              "rnnkernels: the triton backend computes in float32. Ask for another backend for "
                              "float64.");
}

// What both passes take; w_hh [D, G*H, H].
template <class Layer>
py::dict common(const Layer& a, const Tensor& w_hh) {
  py::dict arguments;
  arguments["cell"] = std::string(a.cell.name);
  arguments["w_hh"] = w_hh;
  arguments["params"] = a.w.unit.empty() ? py::object(py::none()) : py::cast(at::cat(a.w.unit));
  arguments["h_mask"] = given(a.h_mask);
  arguments["heads"] = a.n.heads;
  arguments["h0"] = a.h0;
  arguments["c0"] = given(a.c0);
  arguments["lengths"] = given(a.call.lengths);
  arguments["starts"] = given(a.call.starts);
  arguments["reset"] = bytes(a.call.reset);
  arguments["noise"] = given(a.call.noise);
  arguments["draws"] = given(a.call.draws);
  arguments["layer"] = a.index * a.n.D;
  arguments["T"] = a.n.T;
  return arguments;
}

void forward_layer(const ForwardLayer& a) {
  refuse(a.x, a.w);
  const Tensor gx = a.cell.normed ? a.x.contiguous() : project_input(a);
  if (a.n.T == 0 || a.n.B == 0) {
    a.h_n.copy_(a.h0);
    if (a.c0) a.c_n.copy_(*a.c0);
    return;
  }
  const Tensor w_hh = recurrent_weights(a.cell, a.n, a.w, a.x);
  // A bias that is missing beside another one is zero.
  const auto bias = [&](const LayerWeights::List& parts, const LayerWeights::List& others) {
    if (!parts.empty()) return py::cast(stacked(parts, a.n.heads));
    return others.empty() ? py::object(py::none()) : py::cast(at::zeros_like(stacked(others, a.n.heads)));
  };
  const py::gil_scoped_acquire gil;
  py::dict arguments = common(a, w_hh);
  arguments["gx"] = gx;
  arguments["b_ih"] = bias(a.w.b_ih, a.w.b_hh);
  arguments["b_hh"] = bias(a.w.b_hh, a.w.b_ih);
  arguments["y"] = a.y;
  arguments["h_n"] = a.h_n;
  arguments["c_n"] = given(a.c_n);
  arguments["c"] = given(a.c);
  arguments["saved"] = given(a.saved);
  launch("forward", a.cell, a.x.device(), arguments);
}

void backward_layer(const BackwardLayer& a) {
  refuse(a.y, a.w);
  if (a.n.T == 0 || a.n.B == 0) {
    const auto same = [](const Tensor& to, const OptionalTensor& from) {
      if (to.numel() && from) to.copy_(*from);
      if (to.numel() && !from) to.zero_();
    };
    same(a.dh0, a.dh_n);
    same(a.dc0, a.dc_n);
    return;
  }
  const Sequence q = sequence(a);
  const Tensor w_hh = recurrent_weights(a.cell, a.n, a.w, a.y);
  const py::gil_scoped_acquire gil;
  py::dict arguments = common(a, w_hh);
  arguments["dy"] = given(a.dy);
  arguments["dh_n"] = given(a.dh_n);
  arguments["dc_n"] = given(a.dc_n);
  arguments["dc"] = given(a.dc);
  arguments["y"] = a.y;
  arguments["c"] = given(a.c);
  arguments["saved"] = given(a.saved);
  arguments["dgates"] = a.dgates;
  arguments["dh0"] = given(a.dh0);
  arguments["dc0"] = given(a.dc0);
  arguments["flow"] = given(a.flow);
  arguments["dunit"] = given(a.dunit);
  arguments["steps"] = q.steps();
  arguments["rows"] = q.rows();
  arguments["clip"] = std::string(a.call.clip);
  arguments["bound"] = a.clip.bound;
  launch("backward", a.cell, a.y.device(), arguments);
}

void forward(ForwardRun& all) { all.each(forward_layer); }
void backward(BackwardRun& all) { all.each(backward_layer); }

}  // namespace
}  // namespace rnn::triton

// Triton's interpreter runs kernels on CPU tensors, for tests.
TORCH_LIBRARY_IMPL(rnnkernels_triton, CPU, library) {
  rnn::register_sequence_ops<rnn::triton::forward, rnn::triton::backward>(library);
}
TORCH_LIBRARY_IMPL(rnnkernels_triton, CUDA, library) {
  rnn::register_sequence_ops<rnn::triton::forward, rnn::triton::backward>(library);
}
