// From the autograd formula to what the reference in Python computes for it.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace rnn {

// forward_tangents(*arguments of sequence_forward), gradient_tangents(*arguments of sequence_gradients) and
// second_order(arguments of sequence_gradients, of_gradients, positions): see csrc/autograd/by_reference.h.
void bring_reference(pybind11::function forward_tangents, pybind11::function gradient_tangents,
                     pybind11::function second_order);

}  // namespace rnn
