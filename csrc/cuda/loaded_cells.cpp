#include "cuda/cell_libraries.h"

namespace rnn::cuda {

LoadedCells<CellSteps>& loaded_cells() {
  static LoadedCells<CellSteps> all;
  return all;
}

std::string load_cell_library(int number, const char* path) {
  return loaded_cells().load(number, path, kCellLibrary, kHeadersDigest, nullptr);
}

}  // namespace rnn::cuda
