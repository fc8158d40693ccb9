// The short way of layers. One step of a small one takes a few microseconds; the way that every call can go through
// Python costs several times as much.
#include "autograd/layers_call.h"

#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include "autograd/direct.h"

namespace rnn {
namespace {

struct Layers {
  const CellInfo& cell;
  int64_t I, H, P, L, D;
  bool batch_first;

  int64_t R() const { return P ? P : H; }
};

struct States {
  Tensor h, c;  // [L*D, B, ...]; c is undefined where there is none
};

// The weights of one layer, one for each direction; empty lists of those that are missing.
enum Kind { kWIh, kWHh, kBIh, kBHh, kWHr, kKinds };
using Weights = std::array<c10::SmallVector<Tensor, 2>, kKinds>;

// A list of weights as the layers have them, or nothing where it is another one.
std::optional<std::vector<Weights>> read(PyObject* list, const Layers& n, const Autocast& autocast) {
  const int64_t groups = n.L * n.D, count = PyList_GET_SIZE(list), each = groups ? count / groups : 0;
  const int64_t biases = each - 2 - (n.P > 0);
  if (!groups || count != each * groups || biases < 0 || biases > 2) return std::nullopt;
  std::vector<Weights> layers(n.L);
  for (int64_t i = 0; i < count; ++i) {
    const Tensor* const t = exact_tensor(PyList_GET_ITEM(list, i));
    if (!t) return std::nullopt;
    const int64_t place = i % each;
    layers[i / (each * n.D)][n.P && place == each - 1 ? kWHr : place].push_back(autocast(*t));
  }
  return layers;
}

// Undefined where an object is no state of this shape.
Tensor read_state(PyObject* object, at::IntArrayRef shape, const Tensor& given_x, const Tensor& x,
                  const Autocast& autocast) {
  const Tensor* const t = exact_tensor(object);
  if (!t || t->sizes() != shape || !autocast.accepts(*t, given_x.scalar_type()) || t->device() != x.device()) return {};
  Tensor found = autocast(*t);
  return found.scalar_type() == x.scalar_type() ? found : Tensor();
}

// x [T, B, I], or with the first two dimensions the other way round.
std::pair<Tensor, States> run(const Layers& n, const Tensor& x, const std::vector<Weights>& weights,
                              const States& initial) {
  std::vector<Tensor> h_n, c_n;
  Tensor y = n.batch_first ? x.transpose(0, 1) : x;
  for (int64_t l = 0; l < n.L; ++l) {
    const auto& [w_ih, w_hh, b_ih, b_hh, w_hr] = weights[l];
    const auto of_layer = [&](const Tensor& t) { return n.L == 1 ? t : t.narrow(0, l * n.D, n.D); };
    auto results = SequenceOps<Library::kCompiled>::forward().call(
        n.cell.name, y, w_ih, w_hh, given(b_ih), given(b_hh), given(w_hr), of_layer(initial.h),
        initial.c.defined() ? OptionalTensor(of_layer(initial.c)) : std::nullopt, std::nullopt, std::nullopt,
        std::nullopt, false, false, l, 0, "none", 1.0);
    y = std::get<0>(results);
    h_n.push_back(std::move(std::get<1>(results)));
    if (initial.c.defined()) c_n.push_back(std::move(std::get<2>(results)));
  }
  const auto joined = [](const std::vector<Tensor>& parts) { return parts.size() == 1 ? parts[0] : at::cat(parts); };
  States last{joined(h_n), c_n.empty() ? Tensor() : joined(c_n)};
  return {n.batch_first ? y.transpose(0, 1) : y, std::move(last)};
}

}  // namespace

PyObject* py_layers_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 10, "layers_call: expected 10 arguments, got ", count);
  const char* const cell = PyUnicode_AsUTF8(args[0]);
  if (!cell) return nullptr;
  std::array<int64_t, 6> sizes;
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = PyLong_AsLongLong(args[2 + i]);
  if (PyErr_Occurred()) return nullptr;
  TORCH_CHECK_TYPE(PyList_Check(args[1]), "layers_call: expected a list of weights, got ", Py_TYPE(args[1])->tp_name);
  const auto [I, H, P, L, D, batch_first] = sizes;
  const Layers n{find_cell(cell), I, H, P, L, D, batch_first != 0};

  const Tensor* const given_x = exact_tensor(args[8]);
  if (!given_x || given_x->dim() != 3 || given_x->size(2) != I || !has_kernels(*given_x) || !undisturbed())
    Py_RETURN_NONE;
  if (L > 1 && !given_x->is_cpu()) Py_RETURN_NONE;  // there is a way to run all of them at once
  const Autocast autocast(given_x->device());
  const Tensor* const first = PyList_GET_SIZE(args[1]) ? exact_tensor(PyList_GET_ITEM(args[1], 0)) : nullptr;
  if (!first || !autocast.accepts(*given_x, first->scalar_type()) || given_x->device() != first->device())
    Py_RETURN_NONE;
  const auto weights = read(args[1], n, autocast);
  if (!weights) Py_RETURN_NONE;
  const Tensor x = autocast(*given_x);
  if (x.scalar_type() != (*weights)[0][kWIh][0].scalar_type()) Py_RETURN_NONE;

  const bool has_c = n.cell.S > 1;
  const std::array<int64_t, 3> h_shape{L * D, x.size(n.batch_first ? 0 : 1), n.R()}, c_shape{h_shape[0], h_shape[1], H};
  States initial;
  if (args[9] == Py_None) {
    initial.h = at::zeros(h_shape, x.options());
    if (has_c) initial.c = n.P ? at::zeros(c_shape, x.options()) : initial.h;
  } else if (!has_c) {
    initial.h = read_state(args[9], h_shape, *given_x, x, autocast);
  } else if (PyTuple_CheckExact(args[9]) && PyTuple_GET_SIZE(args[9]) == 2) {
    initial.h = read_state(PyTuple_GET_ITEM(args[9], 0), h_shape, *given_x, x, autocast);
    initial.c = read_state(PyTuple_GET_ITEM(args[9], 1), c_shape, *given_x, x, autocast);
  }
  if (!initial.h.defined() || initial.c.defined() != has_c) Py_RETURN_NONE;

  std::pair<Tensor, States> found;
  {
    const pybind11::gil_scoped_release no_gil;
    found = run(n, x, *weights, initial);
  }
  auto& [y, last] = found;
  const THPObjectPtr output(THPVariable_Wrap(std::move(y)));
  THPObjectPtr states(THPVariable_Wrap(std::move(last.h)));
  if (has_c && states) {
    const THPObjectPtr c(THPVariable_Wrap(std::move(last.c)));
    states = c ? PyTuple_Pack(2, states.get(), c.get()) : nullptr;
  }
  return output && states ? PyTuple_Pack(2, output.get(), states.get()) : nullptr;
  END_HANDLE_TH_ERRORS
}

}  // namespace rnn
