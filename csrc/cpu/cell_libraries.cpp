#include "cpu/cell_libraries.h"

#include <dlfcn.h>

#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <utility>

namespace rnn::cpu {
namespace {

// They stay loaded: calls that began earlier may still run in them.
struct Loaded {
  std::shared_mutex mutex;
  std::unordered_map<int, CellTables> cells;
  CellCompiler compiler = [](const auto&...) { return std::string("nobody here compiles them"); };
};
Loaded& loaded() {
  static Loaded all;
  return all;
}

}  // namespace

std::string load_cell_library(int number, const char* path) {
  void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!handle) return dlerror();
  const auto* library = static_cast<const CellLibrary*>(dlsym(handle, kCellLibrary));
  std::string reason;
  if (!library) {
    reason = "it does not export " + std::string(kCellLibrary);
  } else if (std::strcmp(library->headers, kHeadersDigest) != 0) {
    reason = "it was compiled from other sources than this build of rnnkernels";
  } else if (!kernels() || std::strcmp(library->instruction_set, kernels()->name) != 0) {
    reason = "it was compiled for " + std::string(library->instruction_set) + ", and the kernels in use are for " +
             (kernels() ? kernels()->name : "none");
  }
  if (!reason.empty()) {
    dlclose(handle);
    return reason;
  }
  const std::unique_lock lock(loaded().mutex);
  CellTables& cell = loaded().cells[number];
  const auto take = [&]<class IO>(const CellKernels<IO>* kernels) {
    if (kernels) std::get<const CellKernels<IO>*>(cell) = kernels;
  };
  std::apply([&](const auto*... each) { (take(each), ...); }, library->kernels);
  return {};
}

void set_cell_compiler(CellCompiler compiler) {
  const std::unique_lock lock(loaded().mutex);
  loaded().compiler = std::move(compiler);
}

std::string compile_cell(const std::string& name, const std::string& type) {
  CellCompiler compiler;
  {
    const std::shared_lock lock(loaded().mutex);
    compiler = loaded().compiler;
  }
  return compiler(name, type);
}

template <class IO>
const CellKernels<IO>* loaded_cell(int number) {
  const std::shared_lock lock(loaded().mutex);
  const auto found = loaded().cells.find(number);
  return found == loaded().cells.end() ? nullptr : std::get<const CellKernels<IO>*>(found->second);
}
template const CellKernels<float>* loaded_cell(int);
template const CellKernels<double>* loaded_cell(int);
template const CellKernels<BFloat16>* loaded_cell(int);
template const CellKernels<Float16>* loaded_cell(int);

}  // namespace rnn::cpu
