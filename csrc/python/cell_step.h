// One step of a cell for Python.
#pragma once

#include <Python.h>

namespace rnn {

// cell_step(cell, parameters, input_size, hidden_size, input, hx): the next state of a cell with these parameters (a
// module's dictionary of them, or a tuple of w_ih, w_hh, b_ih, b_hh), or None where anything is unusual. A
// METH_FASTCALL function.
PyObject* py_cell_step(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace rnn
