// Steps of cells that users write, in place of those that nvcc compiles of each.
#pragma once

#include <string_view>

namespace rnn::cuda {

// Runs a step in float64 or bfloat16; false where there is no such cell. Not for steps that are the same for all cells.
template <class Step>
bool run_written(std::string_view cell, const Step& step);

}  // namespace rnn::cuda
