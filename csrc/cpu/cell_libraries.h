// Cells that are compiled and loaded while the process runs.
#pragma once

#include "cpu/kernels.h"

namespace rnn::cpu {

// The digest of the sources that a cell's library is compiled from, as they were when this library was built.
extern const char* const kHeadersDigest;

// Loads the library at `path` as the kernels of the cell with this number. Returns the reason where it cannot.
std::string load_cell_library(int number, const char* path);

LoadedCells<CellKernels>& loaded_cells();

}  // namespace rnn::cpu
