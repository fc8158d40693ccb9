// Runs a package of AOTInductor that holds layers of rnnkernels, without Python.
//
//   run_package LIBRNNKERNELS PACKAGE INPUTS OUTPUTS
//
// LIBRNNKERNELS is librnnkernels.so of the installed package: it brings the ops that the package calls. INPUTS is a
// list of tensors as torch.save writes it; OUTPUTS is a tuple of tensors for torch.load.
//
// It needs torch's headers and libraries, those of the torch for which rnnkernels was built:
//
//   TORCH=$(python -c "import torch, os; print(os.path.dirname(torch.__file__))")
//   c++ -std=c++20 -O2 run_package.cpp -o run_package -I$TORCH/include -I$TORCH/include/torch/csrc/api/include
//     -L$TORCH/lib -Wl,-rpath,$TORCH/lib -ltorch -ltorch_cpu -lc10 -ldl
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <utility>
#include <vector>

namespace {

std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, path, ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

void run(const char* library, const char* package, const char* inputs, const char* outputs) {
  // Before the package is loaded, which looks its ops up.
  TORCH_CHECK(dlopen(library, RTLD_NOW | RTLD_GLOBAL), dlerror());
  torch::inductor::AOTIModelPackageLoader loader(package);
  std::vector<at::Tensor> given;
  const c10::IValue list = torch::jit::pickle_load(read(inputs));
  for (const c10::IValue& value : list.toListRef()) given.push_back(value.toTensor());
  std::vector<c10::IValue> results;
  for (at::Tensor& result : loader.run(given)) results.emplace_back(std::move(result));
  const std::vector<char> found = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(results)));
  std::ofstream file(outputs, std::ios::binary);
  file.write(found.data(), static_cast<std::streamsize>(found.size()));
  TORCH_CHECK(file.flush(), outputs, ": cannot be written");
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 5) {
    std::fprintf(stderr, "usage: %s LIBRNNKERNELS PACKAGE INPUTS OUTPUTS\n", arguments[0]);
    return 2;
  }
  try {
    run(arguments[1], arguments[2], arguments[3], arguments[4]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", arguments[0], error.what());
    return 1;
  }
  return 0;
}
