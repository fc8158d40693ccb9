// Cells that nvcc compiles while the process runs: what follows their products, step by step.
#pragma once

#include "common/cell_library.h"
#include "cuda/pointwise.h"

namespace rnn::cuda {

// What a library has of a cell, for one storage type: launches of the steps that have a text per cell, as launch() of
// pointwise.h.
template <class IO>
struct CellSteps {
  const char* (*forward)(const ForwardCell<IO>&, Stream);
  const char* (*backward)(const BackwardCell<IO>&, Stream);
  const char* (*bound)(const BackwardBound<IO>&, Stream);

  const char* launch(const ForwardCell<IO>& step, Stream stream) const { return forward(step, stream); }
  const char* launch(const BackwardCell<IO>& step, Stream stream) const { return backward(step, stream); }
  const char* launch(const BackwardBound<IO>& step, Stream stream) const { return bound(step, stream); }
};

constexpr const char* kCellLibrary = "rnnkernels_cuda_cell";

// The digest of the sources that such a library is compiled from, as they were when this library was built.
extern const char* const kHeadersDigest;

// Loads the library at `path` as the kernels of the cell with this number. Returns the reason where it cannot.
std::string load_cell_library(int number, const char* path);

LoadedCells<CellSteps>& loaded_cells();

}  // namespace rnn::cuda
