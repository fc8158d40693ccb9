// A single step of the sequence ops on the CPU, without packing the weights; see step.h.
#pragma once

#include "cpu/kernels.h"
#include "ops/layers.h"

namespace rnn::cpu {

// Whether the kernels of a single step run this layer, whose tensors have been checked.
bool is_single_step(const ForwardLayer& a);
bool is_single_step(const BackwardLayer& a);

template <class IO>
void run_single(const ForwardLayer& a, const Entry<IO>& entry);
template <class IO>
void run_single(const BackwardLayer& a, const Entry<IO>& entry);

}  // namespace rnn::cpu
