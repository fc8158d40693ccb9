// From an op to the kernels of its storage type.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "cpu/cell_libraries.h"
#include "ops/fields.h"
#include "ops/tables.h"

namespace rnn::cpu {

struct Workspace {
  at::Tensor memory;
  static void* allocate(int64_t bytes, void* context) {
    auto* self = static_cast<Workspace*>(context);
    self->memory = at::empty({bytes}, at::kByte);
    return self->memory.mutable_data_ptr();
  }
};

inline const Kernels& available() {
  const Kernels* k = kernels();
  TORCH_CHECK(k,
              "RNNKERNELS_CPU_CAPABILITY: expected default, avx2, avx512, avx512_bf16 or amx as far as this processor "
              "has it, got '",
              std::getenv("RNNKERNELS_CPU_CAPABILITY"), "'");
  return *k;
}

// Calls f(entry) with the kernels of this storage type.
template <class F>
void dispatch_dtype(at::ScalarType type, F&& f) {
  const Kernels& k = available();
  switch (type) {
    case at::kFloat:
      return f(k.float32);
    case at::kDouble:
      return f(k.float64);
    case at::kBFloat16:
      return f(k.bfloat16);
    case at::kHalf:
      return f(k.float16);
    default:
      TORCH_INTERNAL_ASSERT(false, "checked before");
  }
}

// A cell as the kernels of this storage type have it.
template <class IO>
const CellKernels<IO>& kernels_of(const CellInfo& cell, const Entry<IO>& entry) {
  if (cell.built_in()) return entry.cells[cell.number];
  const CellLibrary* library = cell_library(cell.number);
  if (!library) {
    const std::string reason = compile_cell(std::string(cell.name));
    library = cell_library(cell.number);
    TORCH_CHECK_NOT_IMPLEMENTED(library, "cell: there are no CPU kernels of '", cell.name, "': ", reason);
  }
  return *std::get<const CellKernels<IO>*>(library->kernels);
}

template <class Run>
void with_launch(Run&& run) {
  Workspace workspace;
  ThreadBudget threads(at::in_parallel_region() ? 1 : at::get_num_threads());
  run(Launch{threads, Workspace::allocate, &workspace});
}

}  // namespace rnn::cpu
