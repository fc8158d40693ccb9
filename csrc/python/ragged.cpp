#include "python/ragged.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/index_copy.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <numeric>

#include "python/direct.h"

namespace rnn {
namespace {

using Numbers = std::vector<int64_t>;

// Rows or steps that are listed here; of more there may be none, but tensors that repeat one, and what becomes of these
// is told where everything is checked.
constexpr int64_t kMost = (int64_t(1) << 31) - 1;

Tensor tensor_of(const Numbers& numbers) {
  Tensor t = at::detail::empty_cpu({int64_t(numbers.size())}, at::kLong);
  std::copy(numbers.begin(), numbers.end(), t.mutable_data_ptr<int64_t>());
  return t;
}

template <class T>
Numbers values_of(const Tensor& t) {
  Numbers found(t.size(0));
  const T* const values = t.const_data_ptr<T>();
  for (size_t i = 0; i < found.size(); ++i) found[i] = int64_t(values[int64_t(i) * t.stride(0)]);
  return found;
}

// A tensor [count] of integers on the CPU, or a list or tuple of Python's own; nothing for anything else.
std::optional<Numbers> read_numbers(PyObject* object, int64_t count) {
  if (count > kMost) return std::nullopt;
  if (const Tensor* const t = exact_tensor(object)) {
    if (!t->is_cpu() || t->dim() != 1 || t->size(0) != count) return std::nullopt;
    if (t->scalar_type() == at::kLong) return values_of<int64_t>(*t);
    if (t->scalar_type() == at::kInt) return values_of<int32_t>(*t);
    return std::nullopt;
  }
  if (!PyList_CheckExact(object) && !PyTuple_CheckExact(object)) return std::nullopt;
  Numbers found(PySequence_Fast_GET_SIZE(object));
  if (int64_t(found.size()) != count) return std::nullopt;
  for (size_t i = 0; i < found.size(); ++i) {
    PyObject* const number = PySequence_Fast_GET_ITEM(object, Py_ssize_t(i));
    int overflow = 0;
    if (!PyLong_CheckExact(number)) return std::nullopt;
    found[i] = PyLong_AsLongLongAndOverflow(number, &overflow);
    if (overflow) return std::nullopt;
  }
  return found;
}

// Whether these are the numbers from 0 to below their count, in any order.
bool is_permutation(const Numbers& numbers) {
  std::vector<bool> seen(numbers.size());
  for (const int64_t i : numbers) {
    if (i < 0 || i >= int64_t(numbers.size()) || seen[i]) return false;
    seen[i] = true;
  }
  return true;
}

PyObject* packed_sequence_type() {
  namespace py = pybind11;
  static PyObject* const type =
      py::object(py::module_::import("torch.nn.utils.rnn").attr("PackedSequence")).release().ptr();
  return type;
}

}  // namespace

std::optional<PackedInput> packed_input(PyObject* object) {
  if (!PyTuple_Check(object) || reinterpret_cast<PyObject*>(Py_TYPE(object)) != packed_sequence_type() ||
      PyTuple_GET_SIZE(object) != 4)
    return std::nullopt;
  const auto part = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(object, i); };
  return PackedInput{part(0), part(1), part(2), part(3)};
}

PyObject* packed_output(const PackedInput& input, PyObject* steps) {
  return PyObject_CallFunctionObjArgs(packed_sequence_type(), steps, input.batch_sizes, input.sorted, input.unsorted,
                                      nullptr);
}

std::optional<Ragged> Ragged::of_padded(const Tensor& x, PyObject* lengths, PyObject* reset, bool batch_first) {
  Ragged found;
  const int64_t T = x.size(0), B = x.size(1);
  found.B_ = found.n_ = B;
  if (lengths != Py_None) {
    const std::optional<Numbers> given = read_numbers(lengths, B);
    if (!given) return std::nullopt;
    int64_t N = 0, shorter = 0;
    for (const int64_t n : *given) {
      if (n < 0 || n > std::min(T, kMost - N)) return std::nullopt;
      N += n;
      shorter += n < T;
    }
    if (!N) return std::nullopt;  // nothing is there to be packed
    if (shorter) {
      Numbers order;
      order.reserve(B);
      for (int64_t b = 0; b < B; ++b)
        if ((*given)[b]) order.push_back(b);
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return (*given)[a] > (*given)[b]; });
      Numbers sorted, sizes(given->at(order[0])), at;
      sorted.reserve(order.size());
      for (const int64_t b : order) sorted.push_back((*given)[b]);
      at.reserve(N);
      int64_t rows = int64_t(order.size());
      found.n_ = rows;
      for (int64_t t = 0; t < int64_t(sizes.size()); ++t) {
        while (sorted[rows - 1] <= t) --rows;
        sizes[t] = rows;
        for (int64_t b = 0; b < rows; ++b) at.push_back(t * B + order[b]);
      }
      found.places_ = {tensor_of(at), T, B};
      found.set_steps(sorted, sizes);
      if (found.n_ < B || !std::is_sorted(order.begin(), order.end())) found.order_ = std::move(order);
    }
  }
  if (!found.set_reset(reset, T, batch_first)) return std::nullopt;
  return found;
}

std::optional<Ragged> Ragged::of_packed(const Tensor& x, const PackedInput& input, PyObject* reset, bool batch_first) {
  const Tensor* const t = exact_tensor(input.batch_sizes);
  if (!t || !t->is_cpu() || t->dim() != 1 || t->scalar_type() != at::kLong || !t->size(0) ||
      t->size(0) > std::min(x.size(0), kMost))
    return std::nullopt;
  const Numbers sizes = values_of<int64_t>(*t);
  const int64_t T = int64_t(sizes.size()), N = x.size(0);
  Ragged found;
  found.B_ = found.n_ = sizes[0];
  int64_t sum = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] < 1 || (i && sizes[i] > sizes[i - 1]) || sizes[i] > N - sum) return std::nullopt;
    sum += sizes[i];
  }
  if (sum != N || !found.order_by(input.sorted, input.unsorted)) return std::nullopt;
  found.even_ = sizes.back() == sizes[0];
  if (!found.even_) {
    Numbers lengths(sizes[0]);
    int64_t rows = sizes[0];
    for (int64_t t = 1; t <= T; ++t)
      for (const int64_t left = t < T ? sizes[t] : 0; rows > left;) lengths[--rows] = t;
    found.set_steps(lengths, sizes);
  }
  if (!found.set_reset(reset, T, batch_first)) return std::nullopt;
  return found;
}

bool Ragged::order_by(PyObject* sorted, PyObject* unsorted) {
  for (auto& [object, numbers] : {std::pair(sorted, &order_), std::pair(unsorted, &back_)}) {
    if (object == Py_None) continue;
    const Tensor* const order = exact_tensor(object);
    // Torch's operations save them for backward, and say why they cannot.
    if (!order || (order->is_inference() && at::GradMode::is_enabled())) return false;
    const std::optional<Numbers> given = read_numbers(object, B_);
    if (!given || !is_permutation(*given)) return false;
    if (!std::is_sorted(given->begin(), given->end())) *numbers = *given;
  }
  return true;
}

void Ragged::set_steps(const Numbers& lengths, const Numbers& sizes) {
  Numbers starts(sizes.size() + 1);
  std::partial_sum(sizes.begin(), sizes.end(), starts.begin() + 1);
  steps_.lengths = tensor_of(lengths);
  steps_.starts = tensor_of(starts);
}

bool Ragged::set_reset(PyObject* object, int64_t T, bool batch_first) {
  if (object == Py_None) return true;
  const Tensor* const given = exact_tensor(object);
  const std::array<int64_t, 2> shape{batch_first ? B_ : T, batch_first ? T : B_};
  if (!given || !given->is_cpu() || given->scalar_type() != at::kBool || given->sizes() != shape) return false;
  const Tensor marks = batch_first ? given->transpose(0, 1) : *given;
  if (!steps_.starts && order_.empty()) {
    steps_.reset = marks;
    return true;
  }
  Places places = places_;
  if (!places.at.defined()) {  // of a PackedSequence
    Numbers at;
    const int64_t* const starts = steps_.starts ? steps_.starts->const_data_ptr<int64_t>() : nullptr;
    for (int64_t t = 0; t < T; ++t)
      for (int64_t b = 0; b < (starts ? starts[t + 1] - starts[t] : B_); ++b)
        at.push_back(t * B_ + (order_.empty() ? b : order_[b]));
    places = {tensor_of(at), T, B_};
  }
  const int64_t N = places.at.numel();
  const Tensor picked = pick_rows(marks.unsqueeze(-1), places, {N});
  steps_.reset = steps_.starts ? picked.view({N}) : picked.view({T, B_});
  return true;
}

Tensor Ragged::enter(const Tensor& x) const {
  if (places_.at.defined()) return pick_rows(x, places_, {places_.at.numel()});
  return even_ ? x.view({-1, B_, x.size(-1)}) : x;
}

Tensor Ragged::leave(const Tensor& y) const {
  if (places_.at.defined()) return place_rows(y, places_);
  return even_ ? y.flatten(0, 1) : y;
}

Places Ragged::of_states(const Numbers& rows, int64_t layers) const {
  Numbers at;
  at.reserve(layers * rows.size());
  for (int64_t l = 0; l < layers; ++l)
    for (const int64_t b : rows) at.push_back(l * B_ + b);
  return {tensor_of(at), layers, B_};
}

Tensor Ragged::enter_state(const Tensor& state) const {
  if (order_.empty()) return state;
  return pick_rows(state, of_states(order_, state.size(0)), {state.size(0), n_});
}

Tensor Ragged::leave_state(const Tensor& state, const Tensor& initial) const {
  if (!back_.empty()) return pick_rows(state, of_states(back_, state.size(0)), {state.size(0), n_});
  if (order_.empty() || !places_.at.defined()) return state;
  if (initial.defined() && n_ < B_) return initial.index_copy(1, tensor_of(order_), state);
  return place_rows(state, of_states(order_, state.size(0)));
}

}  // namespace rnn
