// Which steps the rows of a batch have, as users say it: lengths of padded rows, a PackedSequence; and where states are
// reset. From there to what the op takes, and back.
#pragma once

#include <Python.h>

#include <vector>

#include "autograd/rows.h"
#include "ops/calls.h"

namespace rnn {

// A PackedSequence, taken apart; the objects are its own.
struct PackedInput {
  PyObject *data, *batch_sizes, *sorted, *unsorted;
};
// Nothing where an object is something else.
std::optional<PackedInput> packed_input(PyObject* object);
// One with these steps, and otherwise like it; null with an error set where there is none.
PyObject* packed_output(const PackedInput& input, PyObject* steps);

// The rows of a batch on a CPU. Those that the op takes are ordered as packed steps have them, longest first, without
// those that have no step.
class Ragged {
 public:
  // Of x [T, B, I], by lengths and resets as users give them, or None; nothing where anything is unusual or wrong.
  static std::optional<Ragged> of_padded(const Tensor& x, PyObject* lengths, PyObject* reset, bool batch_first);
  // Of a PackedSequence whose data is x [N, I].
  static std::optional<Ragged> of_packed(const Tensor& x, const PackedInput& input, PyObject* reset, bool batch_first);

  int64_t rows() const { return B_; }   // of the batch
  int64_t taken() const { return n_; }  // of them, by the op

  // x as the op takes it, and y as the user does.
  Tensor enter(const Tensor& x) const;
  Tensor leave(const Tensor& y) const;
  // The same of states [L*D, B, ..], whose rows without a step keep what they have, which is `initial`; undefined: 0.
  Tensor enter_state(const Tensor& state) const;
  Tensor leave_state(const Tensor& state, const Tensor& initial) const;

  const Steps& steps() const { return steps_; }

 private:
  bool order_by(PyObject* sorted, PyObject* unsorted);
  void set_steps(const std::vector<int64_t>& lengths, const std::vector<int64_t>& sizes);
  bool set_reset(PyObject* object, int64_t T, bool batch_first);
  Places of_states(const std::vector<int64_t>& rows, int64_t layers) const;

  int64_t B_ = 0, n_ = 0;
  std::vector<int64_t> order_, back_;  // numbers of rows: of the batch those that the op takes, and the other way round
  Places places_;                      // of packed steps in padded ones; undefined where these are not packed here
  bool even_ = false;                  // a PackedSequence all of whose rows have every step
  Steps steps_;
};

}  // namespace rnn
