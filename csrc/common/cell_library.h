// Cells that are compiled and loaded while the process runs, each as libraries of one storage type, for every backend
// that has cells so. What a backend calls of a cell is its Kernels<IO>.
#pragma once

#include <dlfcn.h>

#include <cstring>
#include <functional>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <tuple>
#include <unordered_map>

#include "storage.h"

namespace rnn {

// As torch has it.
template <class IO>
constexpr const char* kTypeName = "float32";
template <>
inline constexpr const char* kTypeName<double> = "float64";
template <>
inline constexpr const char* kTypeName<BFloat16> = "bfloat16";
template <>
inline constexpr const char* kTypeName<Float16> = "float16";

// Null but for the type that a library is compiled for.
template <template <class> class Kernels>
using TablesOf =
    std::tuple<const Kernels<float>*, const Kernels<double>*, const Kernels<BFloat16>*, const Kernels<Float16>*>;

// What a library exports.
template <template <class> class Kernels>
struct LibraryOf {
  const char* headers;  // the digest of the sources it was compiled from
  const char* target;   // what it was compiled for
  TablesOf<Kernels> kernels;
};

template <template <class> class Kernels, class IO>
constexpr TablesOf<Kernels> table_of(const Kernels<IO>* kernels) {
  TablesOf<Kernels> found{};
  std::get<const Kernels<IO>*>(found) = kernels;
  return found;
}

// Who has a library made and loaded, given the name of its cell and of a storage type (kTypeName): for calls
// that did not come by a way that has seen to it, as those of programs that were exported. Returns the reason where
// that cannot be.
using CellCompiler = std::function<std::string(const std::string& name, const std::string& type)>;

// Those of a backend, by the numbers of their cells. They stay loaded: calls that began earlier may still run in them.
template <template <class> class Kernels>
class LoadedCells {
 public:
  // What is in use of a backend for bfloat16, or for the other types.
  using Target = const char* (*)(bool bfloat16);

  // Loads the library at `path`, which exports a LibraryOf under `name`, made of the sources of this digest; where a
  // target is in use, for that. Returns the reason where it cannot.
  std::string load(int number, const char* path, const char* name, const char* headers, Target target) {
    void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) return dlerror();
    const auto* library = static_cast<const LibraryOf<Kernels>*>(dlsym(handle, name));
    std::string reason;
    if (!library) {
      reason = "it does not export " + std::string(name);
    } else if (std::strcmp(library->headers, headers) != 0) {
      reason = "it was compiled from other sources than this build of rnnkernels";
    } else if (target) {
      const char* in_use = target(std::get<const Kernels<BFloat16>*>(library->kernels) != nullptr);
      if (std::strcmp(library->target, in_use) != 0)
        reason = "it was compiled for " + std::string(library->target) + ", and the kernels in use are for " + in_use;
    }
    if (!reason.empty()) {
      dlclose(handle);
      return reason;
    }
    const std::unique_lock lock(mutex_);
    auto& cell = cells_[number];
    const auto take = [&]<class IO>(const Kernels<IO>* kernels) {
      if (kernels) std::get<const Kernels<IO>*>(cell) = kernels;
    };
    std::apply([&](const auto*... each) { (take(each), ...); }, library->kernels);
    return {};
  }

  // Null where there is none of this type.
  template <class IO>
  const Kernels<IO>* find(int number) {
    const std::shared_lock lock(mutex_);
    const auto found = cells_.find(number);
    return found == cells_.end() ? nullptr : std::get<const Kernels<IO>*>(found->second);
  }

  void set_compiler(CellCompiler compiler) {
    const std::unique_lock lock(mutex_);
    compiler_ = std::move(compiler);
  }
  std::string compile(const std::string& name, const std::string& type) {
    CellCompiler compiler;
    {
      const std::shared_lock lock(mutex_);
      compiler = compiler_;
    }
    return compiler(name, type);
  }

 private:
  std::shared_mutex mutex_;
  std::unordered_map<int, TablesOf<Kernels>> cells_;
  CellCompiler compiler_ = [](const auto&...) { return std::string("nobody here compiles them"); };
};

}  // namespace rnn
