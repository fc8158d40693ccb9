// What the short ways of layers and cells share: from the tensors that Python holds straight to the autograd node.
#pragma once

#include <Python.h>

#include "ops/calls.h"
#include "ops/tables.h"

namespace rnn {

// No transform, tracer or mode is to see what runs. A default device counts as none: nothing here depends on it.
bool undisturbed();

// A tensor of no subclass; parameters count as tensors. Null for anything else.
const Tensor* exact_tensor(PyObject* object);

// Kernels for the device of a tensor are part of this build, do what has been asked of all, and need no further
// question; and have the cell.
bool has_kernels(const Tensor& t, const CellInfo& cell);

// Whether calls on the CUDA device of this number may go past Python, which chooses backends: once it has found that
// kernels can run there.
void open_short_ways(int device, bool open);
bool short_ways_open(int device);

// What autocast makes of tensors on one device, if it is on there.
class Autocast {
 public:
  explicit Autocast(c10::Device device);

  Tensor operator()(const Tensor& t) const;

 private:
  std::optional<at::ScalarType> dtype_;
};

// A tensor as autocast casts it to this type: float64 stays, and a parameter is cast once per region, as torch's own
// layers have it.
Tensor cast(const Tensor& t, at::ScalarType dtype);

// The same for a tensor as Python holds it; None where it is none to cast here, because it is unusual or somebody has
// to see it done.
PyObject* py_cast(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace rnn
