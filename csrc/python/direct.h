// What the short ways of layers and cells share: from the tensors that Python holds straight to the autograd node.
#pragma once

#include <Python.h>

#include <optional>
#include <string_view>

#include "ops/calls.h"

namespace rnn {

// No transform, tracer or mode is to see what runs. A default device counts as none: nothing here depends on it.
bool undisturbed();

// A tensor of no subclass; parameters count as tensors. Null for anything else.
const Tensor* exact_tensor(PyObject* object);

// Kernels for the device of a tensor are part of this build, do what has been asked of all, and need no further
// question.
bool has_kernels(const Tensor& t);

// Whether calls on the CUDA device of this number may go past Python, which chooses backends: once it has found that
// kernels can run there.
void open_short_ways(int device, bool open);
bool short_ways_open(int device);

// What autocast makes of tensors on one device, if it is on there.
class Autocast {
 public:
  explicit Autocast(c10::Device device);

  // Casts to no narrower type than that of a state. On a CPU torch.nn's GRU, GRUCell and LSTMCell keep the type of
  // their state, which torch's list of what autocast casts there leaves out; on GPUs, and for its other classes, they
  // do not. The same in Python: rnnkernels._ops.autocast_dtype.
  void keep(const Tensor& state);

  Tensor operator()(const Tensor& t) const;

 private:
  c10::Device device_;
  std::optional<at::ScalarType> dtype_;
};

// Whether a layer of this cell, or a single step of it, keeps the type of its state: see Autocast::keep.
bool keeps_state_type(std::string_view cell, bool step);

// A tensor as autocast casts it to this type: float64 stays, and a parameter is cast once per region, as torch's own
// layers have it.
Tensor cast(const Tensor& t, at::ScalarType dtype);

// The same for a tensor as Python holds it; None where it is none to cast here, because it is unusual or somebody has
// to see it done.
PyObject* py_cast(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace rnn
