// Layers for Python, with nothing but their weights and sizes.
#pragma once

#include <Python.h>

namespace rnn {

// layers_call(cell, weights, input_size, hidden_size, proj_size, num_layers, directions, merge_mode,
// batch_first, input, hx, lengths, reset): what layers with this flat list of weights return, all of them in torch's
// order, or None where anything is unusual. A METH_FASTCALL function.
PyObject* py_layers_call(PyObject* self, PyObject* const* args, Py_ssize_t count);

// same_weights(parameters, names, flat_weights, references): whether a module's list of weights holds its parameters of
// these names, and the weak references that torch.nn keeps are to them. A METH_FASTCALL function.
PyObject* py_same_weights(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace rnn
