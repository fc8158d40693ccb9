#include "python/direct.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <atomic>

#include "cpu/launch.h"
#include "cuda/plan.h"
#include "ops/check.h"

namespace rnn {
namespace {

// The type of the mode that a default device is.
PyTypeObject* default_device() {
  static PyTypeObject* const type = [] {
    namespace py = pybind11;
    return reinterpret_cast<PyTypeObject*>(
        py::object(py::module_::import("torch.utils._device").attr("DeviceContext")).release().ptr());
  }();
  return type;
}

std::array<std::atomic<bool>, cuda::kMostDevices> open_devices{};  // others stay closed

bool unseen_by_dispatch() {
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included - c10::default_included_set).empty();
}

}  // namespace

bool undisturbed() {
  if (!unseen_by_dispatch()) return false;
  if (!at::impl::torch_function_mode_enabled()) return true;
  using Modes = at::impl::PythonTorchFunctionTLS;
  for (int64_t i = 0; i < Modes::stack_len(); ++i)
    if (Py_TYPE(Modes::get_stack_at(i)->ptr(getPyInterpreter())) != default_device()) return false;
  return true;
}

const Tensor* exact_tensor(PyObject* object) {
  if (!object || !THPVariable_CheckTypeExact(Py_TYPE(object))) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  return at::isTensorSubclassLike(t) || t.is_nested() || t.layout() != at::kStrided ? nullptr : &t;
}

bool has_kernels(const Tensor& t, const CellInfo& cell) {
  static const bool cuda = SequenceOps<Library::kCompiled>::forward().hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  if (!cell.built_in()) return t.is_cpu() && cpu::is_loaded(cell, t.scalar_type());
  if (t.is_cpu()) return true;
  return t.is_cuda() && cuda && !batch_invariant() && short_ways_open(t.get_device());
}

void open_short_ways(int device, bool open) {
  if (device >= 0 && device < int(open_devices.size())) open_devices[device] = open;
}
bool short_ways_open(int device) { return device >= 0 && device < int(open_devices.size()) && open_devices[device]; }

Autocast::Autocast(c10::Device device) {
  if (at::autocast::is_autocast_enabled(device.type())) dtype_ = at::autocast::get_autocast_dtype(device.type());
}

Tensor Autocast::operator()(const Tensor& t) const { return dtype_ && t.defined() ? cast(t, *dtype_) : t; }

Tensor cast(const Tensor& t, at::ScalarType dtype) {
  if (t.scalar_type() == dtype || t.scalar_type() == at::kDouble) return t;
  Tensor kept = at::autocast::cached_cast(dtype, t, t.device().type());
  // One that was cast without a history, under torch.no_grad(), may have been kept first.
  const bool lost = at::GradMode::is_enabled() && t.requires_grad() && !kept.requires_grad();
  return lost ? t.to(dtype) : kept;
}

PyObject* py_cast(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "cast: expected 2 arguments, got ", count);
  TORCH_CHECK_TYPE(THPDtype_Check(args[1]), "cast: expected a dtype, got ", Py_TYPE(args[1])->tp_name);
  const Tensor* const t = exact_tensor(args[0]);
  if (!t || !unseen_by_dispatch()) Py_RETURN_NONE;
  return THPVariable_Wrap(cast(*t, reinterpret_cast<THPDtype*>(args[1])->scalar_type));
  END_HANDLE_TH_ERRORS
}

}  // namespace rnn
