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
  if (!k) [[unlikely]] {
    const char* wanted = std::getenv("RNNKERNELS_CPU_CAPABILITY");
    TORCH_CHECK(!wanted, "RNNKERNELS_CPU_CAPABILITY: expected one of ", kernels_built(),
                ", which this build has, as far as this processor has it, got '", wanted, "'");
    TORCH_CHECK(false, "this build has CPU kernels for ", kernels_built(),
                " alone, which this processor does not run; build it here, or without RNNKERNELS_NATIVE=1");
  }
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
  const CellKernels<IO>* found = loaded_cells().find<IO>(cell.number);
  if (!found) {
    const std::string reason = loaded_cells().compile(std::string(cell.name), kTypeName<IO>);
    found = loaded_cells().find<IO>(cell.number);
    TORCH_CHECK_NOT_IMPLEMENTED(found, "cell: there are no CPU kernels of '", cell.name, "' for ", kTypeName<IO>, ": ",
                                reason);
  }
  return *found;
}

// Of a cell that is not built in: can its kernels for this storage type be called at once?
inline bool is_loaded(const CellInfo& cell, at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return loaded_cells().find<float>(cell.number);
    case at::kDouble:
      return loaded_cells().find<double>(cell.number);
    case at::kBFloat16:
      return loaded_cells().find<BFloat16>(cell.number);
    case at::kHalf:
      return loaded_cells().find<Float16>(cell.number);
    default:
      return false;
  }
}

template <class Run>
void with_launch(Run&& run) {
  Workspace workspace;
  ThreadBudget threads(at::in_parallel_region() ? 1 : at::get_num_threads());
  run(Launch{threads, Workspace::allocate, &workspace});
}

}  // namespace rnn::cpu
