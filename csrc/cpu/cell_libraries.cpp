#include "cpu/cell_libraries.h"

namespace rnn::cpu {

LoadedCells<CellKernels>& loaded_cells() {
  static LoadedCells<CellKernels> all;
  return all;
}

std::string load_cell_library(int number, const char* path) {
  return loaded_cells().load(number, path, kCellLibrary, kHeadersDigest, kernels_name);
}

}  // namespace rnn::cpu
