// Launches persistent kernels on a GPU. The implementation is compiled by nvcc, one file per storage type.
#pragma once

#include <string>

#include "cuda/plan.h"
#include "cuda/pointwise.h"
#include "cuda/stages.h"

namespace rnn::cuda {

// The limits of the current device. Returns null, or what went wrong.
const char* query(Device& device);

// Where kernels on the current device record that they have waited in vain, for kernels and for the host: memory that
// the host reads without waiting. Returns null, or what went wrong.
struct FaultRecord {
  uint64_t *on_device, *on_host;
};
const char* fault_record(FaultRecord& record);

// What was recorded on a device since the last time, in words; nothing where that is nothing.
std::string take_fault(int device);

// What became of a launch: an error, or null. Where the device refused this layout as such, the error is remembered,
// and whoever asks runs_here() hears of it.
struct Outcome {
  const char* error;
  bool refused;
};

// On the current device.
template <class IO>
Outcome launch(int cell, const ForwardStages<IO>& stages, const Plan& plan, const Part& part, Stream stream);
template <class IO>
Outcome launch(int cell, const BackwardStages<IO>& stages, const Plan& plan, const Part& part, Stream stream);

// A Check of the current device. It is asked once for each kernel and layout.
template <class IO>
std::string runs_here(int cell, bool backward, const Plan& plan, int D);

}  // namespace rnn::cuda
