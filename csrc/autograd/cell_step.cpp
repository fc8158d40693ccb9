// The short way of a cell: from the tensors that Python holds straight to the autograd node. One step of a small cell
// takes a few microseconds; the way that every layer goes through Python costs several times as much.
#include "autograd/cell_step.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include "autograd/node.h"

namespace rnn {
namespace {

// No mode, transform, tracer or autocast is to see what runs.
bool undisturbed(at::DeviceType device) {
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included - c10::default_included_set).empty() && !at::impl::torch_function_mode_enabled() &&
         !at::autocast::is_autocast_enabled(device);
}

// A tensor of no subclass; parameters count as tensors.
const Tensor* exact_tensor(PyObject* object) {
  if (!object || !THPVariable_CheckTypeExact(Py_TYPE(object))) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  return at::isTensorSubclassLike(t) || t.is_nested() || t.layout() != at::kStrided ? nullptr : &t;
}

// The parameters of a cell, undefined where they are None. Another thread may replace them while this one computes.
struct Parameters {
  Tensor w_ih, w_hh, b_ih, b_hh;

  // Whether there are such parameters in a module's dictionary: somebody may have replaced them by something else.
  bool read(PyObject* dict) {
    static const std::array names{PyUnicode_InternFromString("weight_ih"), PyUnicode_InternFromString("weight_hh"),
                                  PyUnicode_InternFromString("bias_ih"), PyUnicode_InternFromString("bias_hh")};
    auto name = names.begin();
    for (Tensor* const to : {&w_ih, &w_hh, &b_ih, &b_hh}) {
      PyObject* const object = PyDict_GetItemWithError(dict, *name++);
      const bool missing = object == Py_None && to != &w_ih && to != &w_hh;
      const Tensor* const t = exact_tensor(object);
      if (!t && !missing) return false;
      if (t) *to = *t;
    }
    return true;
  }
};

TensorList list(const Tensor& t) { return t.defined() ? TensorList(t) : TensorList(); }

// Kernels for the device of a tensor are part of this build.
bool has_kernels(const Tensor& t) {
  static const bool cuda = SequenceOps<Library::kCompiled>::forward().hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  return t.is_cpu() || (t.is_cuda() && cuda);
}

}  // namespace

PyObject* py_cell_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "cell_step: expected 6 arguments, got ", count);
  const char* const cell = PyUnicode_AsUTF8(args[0]);
  const int64_t I = PyLong_AsLongLong(args[2]), H = PyLong_AsLongLong(args[3]);
  if (!cell || PyErr_Occurred()) return nullptr;
  TORCH_CHECK_TYPE(PyDict_Check(args[1]), "cell_step: expected a dict of parameters, got ", Py_TYPE(args[1])->tp_name);

  const bool has_c = find_cell(cell).S > 1;
  const bool given = args[5] != Py_None;
  PyObject *h_object = args[5], *c_object = nullptr;
  if (has_c && given) {
    if (!PyTuple_CheckExact(h_object) || PyTuple_GET_SIZE(h_object) != 2) Py_RETURN_NONE;
    c_object = PyTuple_GET_ITEM(h_object, 1);
    h_object = PyTuple_GET_ITEM(h_object, 0);
  }
  const Tensor* const x = exact_tensor(args[4]);
  Parameters p;
  if (!x || !p.read(args[1]) || x->dim() != 2 || x->size(1) != I || x->scalar_type() != p.w_ih.scalar_type() ||
      x->device() != p.w_ih.device() || !has_kernels(*x) || !undisturbed(x->device().type()))
    Py_RETURN_NONE;

  Tensor zeros;
  const auto state = [&](PyObject* object) -> const Tensor* {
    if (!given) {
      if (!zeros.defined()) zeros = at::zeros({x->size(0), H}, x->options());
      return &zeros;
    }
    const Tensor* const t = exact_tensor(object);
    const bool fits = t && t->sizes() == at::IntArrayRef({x->size(0), H}) && t->scalar_type() == x->scalar_type() &&
                      t->device() == x->device();
    return fits ? t : nullptr;
  };
  const Tensor *const h = state(h_object), *const c = has_c ? state(c_object) : nullptr;
  if (!h || (has_c && !c)) Py_RETURN_NONE;

  State next;
  {
    const pybind11::gil_scoped_release no_gil;
    next = cell_step(cell, *x, p.w_ih, p.w_hh, list(p.b_ih), list(p.b_hh), *h, c ? OptionalTensor(*c) : std::nullopt);
  }
  if (!has_c) return THPVariable_Wrap(std::move(next.h));
  const THPObjectPtr h_next(THPVariable_Wrap(std::move(next.h))), c_next(THPVariable_Wrap(std::move(*next.c)));
  return h_next && c_next ? PyTuple_Pack(2, h_next.get(), c_next.get()) : nullptr;
  END_HANDLE_TH_ERRORS
}

}  // namespace rnn
