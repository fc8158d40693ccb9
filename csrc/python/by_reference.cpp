#include "python/by_reference.h"

#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>

#include "autograd/by_reference.h"

namespace rnn {
namespace {

namespace py = pybind11;

py::object to_python(const Tensor& t) { return t.defined() ? py::cast(t) : py::none(); }
py::object to_python(const OptionalTensor& t) { return t ? to_python(*t) : py::none(); }
py::object to_python(const std::vector<Tensor>& list) {
  py::list found;
  for (const Tensor& t : list) found.append(to_python(t));
  return found;
}
py::object to_python(TensorList list) { return to_python(list.vec()); }
py::object to_python(const OptionalList& list) { return list ? to_python(*list) : py::none(); }
py::object to_python(at::IntArrayRef list) { return py::cast(list.vec()); }
py::object to_python(c10::string_view text) { return py::str(text.data(), text.size()); }
py::object to_python(int64_t value) { return py::int_(value); }
py::object to_python(double value) { return py::float_(value); }
py::object to_python(bool value) { return py::bool_(value); }

template <class Call>
py::tuple arguments(const Call& call) {
  return std::apply([&](const auto&... field) { return py::make_tuple(to_python(call.*field.member)...); },
                    Call::fields());
}

// Runs f, which calls Python, and leaves it as an error of Python where one was raised.
template <class F>
std::vector<Tensor> in_python(F&& f) {
  const py::gil_scoped_acquire gil;
  try {
    std::vector<Tensor> found;
    for (const py::handle& t : py::list(f())) found.push_back(t.is_none() ? Tensor() : t.cast<Tensor>());
    return found;
  } catch (py::error_already_set& error) {
    error.restore();
    python_error raised;
    raised.persist();
    throw std::move(raised);
  }
}

}  // namespace

void bring_reference(py::function forward_tangents, py::function gradient_tangents, py::function second_order) {
  // Never destroyed: a backward may come while Python ends.
  struct Functions {
    py::function forward_tangents, gradient_tangents, second_order;
  };
  auto* const kept = new Functions{std::move(forward_tangents), std::move(gradient_tangents), std::move(second_order)};
  set_by_reference(
      {[kept](const ForwardCall& call) { return in_python([&] { return kept->forward_tangents(*arguments(call)); }); },
       [kept](const GradientsCall& call) {
         return in_python([&] { return kept->gradient_tangents(*arguments(call)); });
       },
       [kept](const GradientsCall& call, const std::vector<Tensor>& grads, const std::vector<int64_t>& positions) {
         return in_python([&] { return kept->second_order(arguments(call), to_python(grads), py::cast(positions)); });
       }});
}

}  // namespace rnn
