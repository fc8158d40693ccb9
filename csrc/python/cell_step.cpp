// The short way of a cell: from the tensors that Python holds straight to the autograd node. One step of a small cell
// takes a few microseconds; the way that every layer goes through Python costs several times as much.
#include "python/cell_step.h"

#include <ATen/ops/zeros.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include "autograd/node.h"
#include "ops/tables.h"
#include "python/direct.h"

namespace rnn {
namespace {

// The parameters of a cell as far as there are, w_ih, w_hh, b_ih, b_hh; nothing where there is something else in a
// module's dictionary, where somebody may have replaced them, or in a tuple.
bool read_parameters(PyObject* from, c10::SmallVector<Tensor, 4>& weights) {
  static const std::array names{PyUnicode_InternFromString("weight_ih"), PyUnicode_InternFromString("weight_hh"),
                                PyUnicode_InternFromString("bias_ih"), PyUnicode_InternFromString("bias_hh")};
  bool missing = false;
  for (size_t i = 0; i < names.size(); ++i) {
    PyObject* const object =
        PyDict_Check(from) ? PyDict_GetItemWithError(from, names[i]) : PyTuple_GetItem(from, Py_ssize_t(i));
    const Tensor* const t = exact_tensor(object);
    if (!t && (object != Py_None || i < 2)) return false;
    if (t && missing) return false;  // a bias_hh alone
    missing = !t;
    if (t) weights.push_back(*t);  // another thread may replace it while this one computes
  }
  return true;
}

}  // namespace

PyObject* py_cell_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "cell_step: expected 6 arguments, got ", count);
  const char* const cell = PyUnicode_AsUTF8(args[0]);
  const int64_t I = PyLong_AsLongLong(args[2]), H = PyLong_AsLongLong(args[3]);
  if (!cell || PyErr_Occurred()) return nullptr;
  TORCH_CHECK_TYPE(PyDict_Check(args[1]) || (PyTuple_Check(args[1]) && PyTuple_GET_SIZE(args[1]) >= 4),
                   "cell_step: expected a dict of parameters, or a tuple of four, got ", Py_TYPE(args[1])->tp_name);

  const CellInfo& info = find_cell(cell);
  // Parameters of its own, noise, states in one tensor and weights that are not there come by the way that knows of
  // them.
  if (info.P > 0 || info.E > 0 || info.C() > 1 || !info.recurrent) Py_RETURN_NONE;
  const bool has_c = info.C() > 0;
  const bool given = args[5] != Py_None;
  PyObject *h_object = args[5], *c_object = nullptr;
  if (has_c && given) {
    if (!PyTuple_CheckExact(h_object) || PyTuple_GET_SIZE(h_object) != 2) Py_RETURN_NONE;
    c_object = PyTuple_GET_ITEM(h_object, 1);
    h_object = PyTuple_GET_ITEM(h_object, 0);
  }
  const Tensor* const given_x = exact_tensor(args[4]);
  c10::SmallVector<Tensor, 4> weights;
  if (!given_x || !read_parameters(args[1], weights) || !undisturbed()) Py_RETURN_NONE;
  const Autocast autocast(given_x->device());
  if (given_x->dim() != 2 || given_x->size(1) != I || given_x->device() != weights[0].device() ||
      !has_kernels(*given_x, info))
    Py_RETURN_NONE;
  const Tensor x = autocast(*given_x);
  for (Tensor& t : weights) t = autocast(t);
  if (weights[0].scalar_type() != x.scalar_type()) Py_RETURN_NONE;

  Tensor zeros;
  const auto state = [&](PyObject* object) -> Tensor {  // undefined where it does not fit
    if (!given) {
      if (!zeros.defined()) zeros = at::zeros({x.size(0), H}, x.options());
      return zeros;
    }
    const Tensor* const t = exact_tensor(object);
    const bool fits = t && t->sizes() == at::IntArrayRef({x.size(0), H}) && t->device() == x.device();
    Tensor found = fits ? autocast(*t) : Tensor();
    return fits && found.scalar_type() == x.scalar_type() ? found : Tensor();
  };
  const Tensor h = state(h_object), c = has_c ? state(c_object) : Tensor();
  if (!h.defined() || (has_c && !c.defined())) Py_RETURN_NONE;

  State next;
  {
    const pybind11::gil_scoped_release no_gil;
    next = cell_step(cell, x, weights, h, has_c ? OptionalTensor(c) : std::nullopt);
  }
  if (!has_c) return THPVariable_Wrap(std::move(next.h));
  const THPObjectPtr h_next(THPVariable_Wrap(std::move(next.h))), c_next(THPVariable_Wrap(std::move(*next.c)));
  return h_next && c_next ? PyTuple_Pack(2, h_next.get(), c_next.get()) : nullptr;
  END_HANDLE_TH_ERRORS
}

}  // namespace rnn
