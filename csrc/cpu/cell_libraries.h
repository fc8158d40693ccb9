// Cells that are compiled and loaded while the process runs.
#pragma once

#include <functional>
#include <string>

#include "cpu/kernels.h"

namespace rnn::cpu {

// The digest of the sources that a cell's library is compiled from, as they were when this library was built.
extern const char* const kHeadersDigest;

// Loads the library at `path` as the kernels of the cell with this number. Returns the reason where it cannot.
std::string load_cell_library(int number, const char* path);

// Of what was loaded; null where there is none of this type.
template <class IO>
const CellKernels<IO>* loaded_cell(int number);

// Who has a library made and loaded, given the name of its cell and of a storage type (kTypeName): for calls
// that did not come by a way that has seen to it, as those of programs that were exported. Returns the reason where
// that cannot be.
using CellCompiler = std::function<std::string(const std::string& name, const std::string& type)>;
void set_cell_compiler(CellCompiler compiler);
std::string compile_cell(const std::string& name, const std::string& type);

}  // namespace rnn::cpu
