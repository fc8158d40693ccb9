// The CPU kernels of one instruction set, behind plain function pointers.
#pragma once

#include "common/layout.h"
#include "common/storage.h"

namespace rnn::cpu {

// Called once with the size of the workspace that the call needs, in bytes; returns memory aligned to 64 bytes.
using Allocate = void* (*)(int64_t bytes, void* context);

struct Launch {
  int cell;     // number in AllCells
  int threads;  // at most this many
  Allocate allocate;
  void* context;
};

template <class IO>
struct Entry {
  void (*forward)(const Launch&, const Forward<IO>&);
  void (*backward)(const Launch&, const Backward<IO>&);
};

struct Kernels {
  const char* name;
  Entry<float> float32;
  Entry<double> float64;
  Entry<BFloat16> bfloat16;
  Entry<Float16> float16;
};

// The best that this processor runs, or the one that the environment variable RNNKERNELS_CPU_CAPABILITY names
// (default, avx2, avx512). Null where that name is unknown or not supported by this processor.
const Kernels* kernels();

}  // namespace rnn::cpu
