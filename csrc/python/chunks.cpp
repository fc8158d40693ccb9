#include "python/chunks.h"

#include <ATen/EmptyTensor.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <cstring>
#include <vector>

#include "python/direct.h"

namespace rnn {
namespace {

// Whether the bytes of a tensor on a CPU are its values, and rows [.., n] of it lie in one piece.
bool readable(const Tensor& t) {
  return t.is_cpu() && t.dim() == 2 && !t.is_neg() && !t.is_conj() && (t.size(1) < 2 || t.stride(1) == 1);
}

// A row of each chunk, at one step after the other: visit(chunk, step, place in [N]).
template <class Visit>
void for_each_place(const std::vector<int64_t>& lengths, Visit visit) {
  size_t rows = lengths.size();
  int64_t place = 0;
  for (int64_t t = 0; rows; ++t) {
    while (rows && lengths[rows - 1] <= t) --rows;
    for (size_t b = 0; b < rows; ++b) visit(b, t, place++);
  }
}

// Lengths that descend to no less than 1.
bool ordered(const std::vector<int64_t>& lengths) {
  for (size_t b = 0; b < lengths.size(); ++b)
    if (lengths[b] < 1 || (b && lengths[b] > lengths[b - 1])) return false;
  return !lengths.empty();
}

const char* bytes(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }
char* own_bytes(const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }

}  // namespace

PyObject* py_chunk_lengths(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3 && PyList_Check(args[0]), "chunk_lengths: expected a list of chunks and 2 arguments");
  const int64_t inputs = PyLong_AsLongLong(args[1]);
  if (PyErr_Occurred()) return nullptr;
  const Tensor* const weight = exact_tensor(args[2]);
  if (!weight) Py_RETURN_NONE;
  const Py_ssize_t chunks = PyList_GET_SIZE(args[0]);
  THPObjectPtr lengths(PyList_New(chunks));
  for (Py_ssize_t i = 0; lengths && i < chunks; ++i) {
    const Tensor* const t = exact_tensor(PyList_GET_ITEM(args[0], i));
    if (!t || t->dim() != 2 || t->size(1) != inputs || t->scalar_type() != weight->scalar_type() ||
        t->device() != weight->device())
      Py_RETURN_NONE;
    PyObject* const length = PyLong_FromLongLong(t->size(0));
    if (!length) return nullptr;
    PyList_SET_ITEM(lengths.get(), i, length);
  }
  return lengths.release();
  END_HANDLE_TH_ERRORS
}

PyObject* py_join_chunks(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 1 && PyList_Check(args[0]), "join_chunks: expected a list of chunks");
  if (!undisturbed()) Py_RETURN_NONE;
  std::vector<Tensor> chunks;
  std::vector<int64_t> lengths;
  int64_t steps = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[0]); ++i) {
    const Tensor* const t = exact_tensor(PyList_GET_ITEM(args[0], i));
    if (!t || !readable(*t)) Py_RETURN_NONE;
    if (i && (t->size(1) != chunks[0].size(1) || t->scalar_type() != chunks[0].scalar_type())) Py_RETURN_NONE;
    chunks.push_back(*t);
    lengths.push_back(t->size(0));
    steps += t->size(0);
  }
  if (!ordered(lengths)) Py_RETURN_NONE;
  Tensor data, sizes;
  {
    const pybind11::gil_scoped_release no_gil;
    const int64_t inputs = chunks[0].size(1);
    const at::ScalarType dtype = chunks[0].scalar_type();
    data = at::detail::empty_cpu({steps, inputs}, dtype);
    sizes = at::detail::empty_cpu({lengths[0]}, at::kLong);
    int64_t* const size = sizes.mutable_data_ptr<int64_t>();
    const int64_t item = data.element_size(), row = inputs * item;
    char* const to = own_bytes(data);
    if (row)
      for_each_place(lengths, [&](size_t b, int64_t t, int64_t place) {
        std::memcpy(to + place * row, bytes(chunks[b]) + t * chunks[b].stride(0) * item, row);
      });
    size_t rows = lengths.size();
    for (int64_t t = 0; t < lengths[0]; ++t) {
      while (lengths[rows - 1] <= t) --rows;
      size[t] = static_cast<int64_t>(rows);
    }
  }
  const THPObjectPtr first(THPVariable_Wrap(std::move(data)));
  const THPObjectPtr second(THPVariable_Wrap(std::move(sizes)));
  return first && second ? PyTuple_Pack(2, first.get(), second.get()) : nullptr;
  END_HANDLE_TH_ERRORS
}

PyObject* py_part_steps(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2 && PyList_Check(args[1]), "part_steps: expected steps and a list of lengths");
  const Tensor* const given = exact_tensor(args[0]);
  if (!given || !readable(*given) || given->requires_grad() || !undisturbed()) Py_RETURN_NONE;
  const Tensor steps = *given;
  std::vector<int64_t> lengths;
  int64_t sum = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[1]); ++i) {
    lengths.push_back(PyLong_AsLongLong(PyList_GET_ITEM(args[1], i)));
    if (PyErr_Occurred()) return nullptr;
    if (lengths.back() > steps.size(0)) Py_RETURN_NONE;  // their sum fits
    sum += lengths.back();
  }
  if (!ordered(lengths) || sum != steps.size(0)) Py_RETURN_NONE;
  std::vector<Tensor> parts;
  {
    const pybind11::gil_scoped_release no_gil;
    parts.reserve(lengths.size());
    std::vector<char*> to;
    to.reserve(lengths.size());
    for (const int64_t length : lengths) {
      parts.push_back(at::detail::empty_cpu({length, steps.size(1)}, steps.scalar_type()));
      to.push_back(own_bytes(parts.back()));
    }
    const int64_t item = steps.element_size(), row = steps.size(1) * item, stride = steps.stride(0) * item;
    const char* const from = bytes(steps);
    if (row)
      for_each_place(lengths, [&](size_t b, int64_t t, int64_t place) {
        std::memcpy(to[b] + t * row, from + place * stride, row);
      });
  }
  THPObjectPtr list(PyList_New(static_cast<Py_ssize_t>(parts.size())));
  for (size_t b = 0; list && b < parts.size(); ++b) {
    PyObject* const part = THPVariable_Wrap(std::move(parts[b]));
    if (!part) return nullptr;
    PyList_SET_ITEM(list.get(), static_cast<Py_ssize_t>(b), part);
  }
  return list.release();
  END_HANDLE_TH_ERRORS
}

}  // namespace rnn
