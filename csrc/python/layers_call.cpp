// The short way of layers. One step of a small one takes a few microseconds; the way that every call can go through
// Python costs several times as much.
#include "python/layers_call.h"

#include <ATen/ops/zeros.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include "ops/tables.h"
#include "python/direct.h"
#include "python/ragged.h"

namespace rnn {
namespace {

struct States {
  Tensor h, c;  // [L*D, B, ...]; c is undefined where there is none
};

// Whether a weak reference, or a tuple that holds one object in place of it, is to this object.
bool refers(PyObject* reference, PyObject* object) {
  if (PyTuple_Check(reference)) return PyTuple_GET_SIZE(reference) == 1 && PyTuple_GET_ITEM(reference, 0) == object;
  if (!PyWeakref_Check(reference)) return false;
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* target = nullptr;
  PyWeakref_GetRef(reference, &target);
  Py_XDECREF(target);
  return target == object;
#else
  return PyWeakref_GetObject(reference) == object;
#endif
}

// A list of weights as autocast has them, or nothing where it holds something else.
std::optional<std::vector<Tensor>> read(PyObject* list, const Autocast& autocast) {
  std::vector<Tensor> weights;
  weights.reserve(PyList_GET_SIZE(list));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    const Tensor* const t = exact_tensor(PyList_GET_ITEM(list, i));
    if (!t) return std::nullopt;
    weights.push_back(autocast(*t));
  }
  return weights;
}

// Undefined where an object is no state of this shape.
Tensor read_state(PyObject* object, at::IntArrayRef shape, const Tensor& x, const Autocast& autocast) {
  const Tensor* const t = exact_tensor(object);
  if (!t || t->sizes() != shape || t->device() != x.device()) return {};
  Tensor found = autocast(*t);
  return found.scalar_type() == x.scalar_type() ? found : Tensor();
}

}  // namespace

PyObject* py_same_weights(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4, "same_weights: expected 4 arguments, got ", count);
  const auto [parameters, names, flat, references] = std::array{args[0], args[1], args[2], args[3]};
  if (!PyDict_Check(parameters) || !PyList_CheckExact(names) || !PyList_CheckExact(flat) ||
      !PyList_CheckExact(references))
    Py_RETURN_FALSE;
  const Py_ssize_t weights = PyList_GET_SIZE(flat);
  if (weights != PyList_GET_SIZE(names) || weights != PyList_GET_SIZE(references)) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < weights; ++i) {
    PyObject* const weight = PyList_GET_ITEM(flat, i);
    PyObject* const parameter = PyDict_GetItemWithError(parameters, PyList_GET_ITEM(names, i));
    if (!parameter && PyErr_Occurred()) return nullptr;
    if (parameter != weight || weight == Py_None || !refers(PyList_GET_ITEM(references, i), weight)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

PyObject* py_layers_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 13, "layers_call: expected 13 arguments, got ", count);
  const char* const cell = PyUnicode_AsUTF8(args[0]);
  const char* const merge_mode = PyUnicode_AsUTF8(args[7]);
  if (!cell || !merge_mode) return nullptr;
  std::array<int64_t, 6> sizes;
  for (const size_t i : {0, 1, 2, 3, 4}) sizes[i] = PyLong_AsLongLong(args[2 + i]);
  sizes[5] = PyLong_AsLongLong(args[8]);
  if (PyErr_Occurred()) return nullptr;
  TORCH_CHECK_TYPE(PyList_Check(args[1]), "layers_call: expected a list of weights, got ", Py_TYPE(args[1])->tp_name);
  const auto [I, H, P, L, D, batch_first] = sizes;
  const int64_t count_of_weights = PyList_GET_SIZE(args[1]);
  if (L < 1 || L > count_of_weights || D < 1 || D > 2) Py_RETURN_NONE;  // their product fits
  const int64_t each = count_of_weights / (L * D);
  const CellInfo& info = find_cell(cell);
  const int64_t matrices = 1 + info.recurrent, biases = each - matrices - (P > 0) - info.P;
  // States in one tensor and noise come by the way that knows of them.
  if (biases < 0 || biases > matrices || count_of_weights != each * L * D || info.C() > 1 || info.E > 0) Py_RETURN_NONE;

  const std::optional<PackedInput> packed = packed_input(args[9]);
  const Tensor* const given_x = exact_tensor(packed ? packed->data : args[9]);
  if (!given_x || given_x->dim() != (packed ? 2 : 3) || given_x->size(-1) != I || !has_kernels(*given_x, info) ||
      !undisturbed())
    Py_RETURN_NONE;
  const Autocast autocast(given_x->device());
  const Tensor* const first = PyList_GET_SIZE(args[1]) ? exact_tensor(PyList_GET_ITEM(args[1], 0)) : nullptr;
  if (!first || given_x->device() != first->device()) Py_RETURN_NONE;
  const auto weights = read(args[1], autocast);
  if (!weights) Py_RETURN_NONE;
  Tensor x = autocast(*given_x);
  if (x.scalar_type() != weights->front().scalar_type()) Py_RETURN_NONE;
  if (batch_first && !packed) x = x.transpose(0, 1);
  std::optional<Ragged> ragged;
  if (packed || args[11] != Py_None || args[12] != Py_None) {
    if (!x.is_cpu() || (packed && args[11] != Py_None)) Py_RETURN_NONE;
    ragged = packed ? Ragged::of_packed(x, *packed, args[12], batch_first)
                    : Ragged::of_padded(x, args[11], args[12], batch_first);
    if (!ragged) Py_RETURN_NONE;
  }

  const bool has_c = info.C() > 0;
  const int64_t R = P ? P : H;
  const std::array<int64_t, 3> h_shape{L * D, ragged ? ragged->rows() : x.size(1), R}, c_shape{L * D, h_shape[1], H};
  States initial;
  PyObject* const hx = args[10];
  const bool given = hx != Py_None;
  if (!given) {
    const int64_t rows = ragged ? ragged->taken() : h_shape[1];
    initial.h = at::zeros({L * D, rows, R}, x.options());
    if (has_c) initial.c = P ? at::zeros({L * D, rows, H}, x.options()) : initial.h;
  } else if (!has_c) {
    initial.h = read_state(hx, h_shape, x, autocast);
  } else if (PyTuple_CheckExact(hx) && PyTuple_GET_SIZE(hx) == 2) {
    initial.h = read_state(PyTuple_GET_ITEM(hx, 0), h_shape, x, autocast);
    initial.c = read_state(PyTuple_GET_ITEM(hx, 1), c_shape, x, autocast);
  }
  if (!initial.h.defined() || initial.c.defined() != has_c) Py_RETURN_NONE;

  Tensor y, h_n, c_n;
  {
    const pybind11::gil_scoped_release no_gil;
    ForwardCall call;
    call.cell = cell;
    call.layers = L;
    call.directions = D;
    call.projected = P > 0;
    call.merge_mode = merge_mode;
    call.x = ragged ? ragged->enter(x) : x;
    call.weights = *weights;
    call.h0 = ragged && given ? ragged->enter_state(initial.h) : initial.h;
    if (has_c) call.c0 = ragged && given ? ragged->enter_state(initial.c) : initial.c;
    if (ragged) static_cast<Steps&>(call) = ragged->steps();
    auto results = ForwardOp::call(SequenceOps<Library::kCompiled>::forward(), call);
    y = std::move(std::get<0>(results));
    h_n = std::move(std::get<1>(results));
    c_n = std::move(std::get<2>(results));
    if (ragged) {
      y = ragged->leave(y);
      h_n = ragged->leave_state(h_n, given ? initial.h : Tensor());
      if (has_c) c_n = ragged->leave_state(c_n, given ? initial.c : Tensor());
    }
    if (batch_first && !packed) y = y.transpose(0, 1);
  }
  THPObjectPtr output(THPVariable_Wrap(std::move(y)));
  if (packed && output) output = packed_output(*packed, output.get());
  THPObjectPtr states(THPVariable_Wrap(std::move(h_n)));
  if (has_c && states) {
    const THPObjectPtr c(THPVariable_Wrap(std::move(c_n)));
    states = c ? PyTuple_Pack(2, states.get(), c.get()) : nullptr;
  }
  return output && states ? PyTuple_Pack(2, output.get(), states.get()) : nullptr;
  END_HANDLE_TH_ERRORS
}

}  // namespace rnn
