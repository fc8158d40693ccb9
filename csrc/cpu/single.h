// A single step of the sequence ops on the CPU, without packing the weights; see step.h.
#pragma once

#include "common/ops.h"
#include "cpu/kernels.h"

namespace rnn::cpu {

// Whether the kernels of a single step run this call, whose tensors have been checked.
bool is_single_step(const ForwardArguments& a, const Sizes& n);
bool is_single_step(const BackwardArguments& a, const Sizes& n);

template <class IO>
ForwardResults forward_single(const ForwardArguments& a, const Sizes& n, const Entry<IO>& entry);
template <class IO>
BackwardResults backward_single(const BackwardArguments& a, const Sizes& n, const Entry<IO>& entry);

}  // namespace rnn::cpu
