// Whether this build's kernels can run on a device at all.
#pragma once

#include <string>

namespace rnn::cuda {

// Of the current device: empty where they can, else why not: no driver, one that is older than the CUDA runtime in this
// build, no code for this card. Launches nothing, and leaves no error behind for others to find.
std::string probe();

}  // namespace rnn::cuda
