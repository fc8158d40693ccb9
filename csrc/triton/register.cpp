// The sequence ops on Triton: tensors are checked and made here, as for every backend; the loops over time are launched
// by Python (rnnkernels/triton), where Triton lives.
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/utils/pybind.h>

#include "common/ops.h"

namespace rnn::triton {
namespace {

namespace py = pybind11;

py::object given(const Tensor& t) { return t.numel() ? py::cast(t) : py::none(); }
py::object given(const OptionalTensor& t) { return t ? py::cast(*t) : py::none(); }
// Triton has no pointers to bool.
py::object bytes(const OptionalTensor& t) { return t ? py::cast(t->view(at::kByte)) : py::none(); }

// What all directions have, as one tensor with a dimension for them in front.
Tensor stacked(const std::vector<Tensor>& parts) {
  return parts.size() == 1 ? parts[0].unsqueeze(0) : at::stack(parts);
}

void launch(const char* pass, c10::Device device, const py::dict& arguments) {
  c10::OptionalDeviceGuard guard;
  if (!device.is_cpu()) guard.reset_device(device);
  py::module_::import("rnnkernels.triton.launch").attr(pass)(**arguments);
}

void refuse(const Tensor& like, TensorList w_hr) {
  TORCH_CHECK_NOT_IMPLEMENTED(w_hr.empty(),
                              "rnnkernels: the triton backend has no projections. Leave out proj_size, "
                              "or ask for another backend.");
  TORCH_CHECK_NOT_IMPLEMENTED(like.scalar_type() != at::kDouble,
                              "rnnkernels: the triton backend computes in float32. Ask for another backend for "
                              "float64.");
}

// What both passes take; w_hh [D, G*H, H].
template <class Arguments>
py::dict common(const Arguments& a, const Sizes& n, const Tensor& w_hh) {
  py::dict arguments;
  arguments["cell"] = std::string(a.cell.name);
  arguments["w_hh"] = w_hh;
  arguments["h0"] = a.h0;
  arguments["c0"] = given(a.c0);
  arguments["lengths"] = given(a.steps.lengths);
  arguments["starts"] = given(a.steps.starts);
  arguments["reset"] = bytes(a.steps.reset);
  arguments["T"] = n.T;
  return arguments;
}

ForwardResults forward(ForwardArguments& a) {
  const Sizes n = check(a);
  refuse(a.x, a.w_hr);
  const ForwardTensors t = prepare(a, n, Input::kProjected);
  if (n.T == 0 || n.B == 0) {
    t.h_n.copy_(a.h0);
    if (a.c0) t.c_n.copy_(*a.c0);
    return t.results();
  }
  const Tensor w_hh = stacked(t.w_hh);
  // A bias that is missing beside another one is zero.
  const auto bias = [&](const std::vector<Tensor>& parts, const std::vector<Tensor>& others) {
    if (!parts.empty()) return py::cast(stacked(parts));
    return others.empty() ? py::object(py::none()) : py::cast(at::zeros_like(stacked(others)));
  };
  const py::gil_scoped_acquire gil;
  py::dict arguments = common(a, n, w_hh);
  arguments["gx"] = t.gx;
  arguments["b_ih"] = bias(t.b_ih, t.b_hh);
  arguments["b_hh"] = bias(t.b_hh, t.b_ih);
  arguments["y"] = t.y;
  arguments["h_n"] = t.h_n;
  arguments["c_n"] = given(t.c_n);
  arguments["c"] = given(t.c);
  arguments["saved"] = given(t.saved);
  launch("forward", a.x.device(), arguments);
  return t.results();
}

BackwardResults backward(BackwardArguments& a) {
  const Sizes n = check(a);
  refuse(a.y, a.w_hr);
  const BackwardTensors t = prepare(a, n);
  if (n.T == 0 || n.B == 0) {
    const auto same = [](const Tensor& to, const OptionalTensor& from) {
      if (to.numel() && from) to.copy_(*from);
      if (to.numel() && !from) to.zero_();
    };
    same(t.dh0, a.dh_n);
    same(t.dc0, a.dc_n);
    return t.results();
  }
  const Sequence q = sequence(a, n, a.window);
  const Tensor w_hh = stacked(t.w_hh);
  const py::gil_scoped_acquire gil;
  py::dict arguments = common(a, n, w_hh);
  arguments["dy"] = given(a.dy);
  arguments["dh_n"] = given(a.dh_n);
  arguments["dc_n"] = given(a.dc_n);
  arguments["dc"] = given(a.dc);
  arguments["y"] = a.y;
  arguments["c"] = given(a.c);
  arguments["saved"] = given(a.saved);
  arguments["dgates"] = t.dgates;
  arguments["dh0"] = given(t.dh0);
  arguments["dc0"] = given(t.dc0);
  arguments["flow"] = given(t.flow);
  arguments["steps"] = q.steps();
  arguments["rows"] = q.rows();
  arguments["clip"] = clip_name(a.clip.kind);
  arguments["bound"] = a.clip.bound;
  launch("backward", a.y.device(), arguments);
  return t.results();
}

}  // namespace
}  // namespace rnn::triton

// Triton's interpreter runs kernels on CPU tensors, for tests.
TORCH_LIBRARY_IMPL(rnnkernels_triton, CPU, library) {
  rnn::register_sequence_ops<rnn::triton::forward, rnn::triton::backward>(library);
}
TORCH_LIBRARY_IMPL(rnnkernels_triton, CUDA, library) {
  rnn::register_sequence_ops<rnn::triton::forward, rnn::triton::backward>(library);
}
