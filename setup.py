"""Builds the compiled part (build_support/); the metadata is in pyproject.toml.

  librnnkernels_kernels.so            the kernels, which know neither torch nor Python
  _bindings/torchX.Y/librnnkernels.so the ops and their autograd, without Python: what a C++
                                      program loads
  _bindings/torchX.Y/_C               the Python module
  _cells/                             kernels of the package's own cells, where asked for

Read from the environment:
  RNNKERNELS_EXTENSION=0   install the Python package alone
  RNNKERNELS_TORCH         folders that hold a torch, with : between them: a binding is built for
                           each of these (default: the torch of this environment)
  RNNKERNELS_CUDA=0|1      leave out / insist on the CUDA kernels (default: where there are a GPU
                           and nvcc)
  RNNKERNELS_CUDA_ARCHS    GPU architectures to compile for (default: 80;90a), or all, for wheels:
                           those of EVERY_ARCH that nvcc knows
  RNNKERNELS_NATIVE=1      kernels for this machine's processor alone: a fraction of the time
  RNNKERNELS_CELLS=1       compile the kernels of the package's own cells (MGU ..., zoneout) too,
                           for float32 and float64, or for types that it names with commas between
                           them (default: each machine compiles them on first use)
  RNNKERNELS_SANITIZE      for instance address,undefined: the C++ part alone, instrumented
  MAX_JOBS                 how many compilers run at once
  CXX, CXXFLAGS, LDFLAGS   another compiler, and flags after those of the build
"""

import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).parent))  # not there where pip builds

from build_support import readme, settings
from build_support.commands import BuildExt, BuildPy, Wheel

if __name__ == "__main__":
    setup(
        license="Apache-2.0",
        long_description=readme.for_index(Path(__file__).with_name("README.md").read_text("utf-8")),
        long_description_content_type="text/markdown",
        # Says that the wheel is one of a platform; what is in it, BuildExt knows.
        ext_modules=[Extension("rnnkernels._C", [])] if settings.EXTENSION else [],
        cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "bdist_wheel": Wheel},
    )
