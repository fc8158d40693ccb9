// Chunks of many streams as one batch, and the outputs of the batch as those of the streams: what torch does with an
// operation and a tensor or two for each stream takes longer than a step of a small layer for all of them.
#pragma once

#include <Python.h>

namespace rnn {

// chunk_lengths(chunks, input_size, weight): T of each of these chunks [T, input_size], or None where one of them has
// another shape, dtype or device than a layer with this weight takes, or is unusual. A METH_FASTCALL function, as the
// others are.
PyObject* py_chunk_lengths(PyObject* self, PyObject* const* args, Py_ssize_t count);

// join_chunks(chunks): chunks [T, I], longest first and none empty, step after step as in a PackedSequence: data [N, I]
// and batch sizes [T] (int64). None where they are not on a CPU or anything is unusual.
PyObject* py_join_chunks(PyObject* self, PyObject* const* args, Py_ssize_t count);

// part_steps(steps, lengths): the way back: from steps [N, R] of chunks of these lengths, which descend from T to no
// less than 1, to a tensor [T, R] for each, in memory of its own. None where they are not on a CPU or anything is
// unusual.
PyObject* py_part_steps(PyObject* self, PyObject* const* args, Py_ssize_t count);

}  // namespace rnn
