"""What the environment says of a build; setup.py lists it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from functools import cache
from typing import NoReturn

EXTENSION = os.environ.get("RNNKERNELS_EXTENSION", "1") != "0"
CUDA = os.environ.get("RNNKERNELS_CUDA", "")
CUDA_ARCHS = os.environ.get("RNNKERNELS_CUDA_ARCHS") or "80;90a"
SANITIZE = os.environ.get("RNNKERNELS_SANITIZE", "")
NATIVE = os.environ.get("RNNKERNELS_NATIVE", "") == "1"
CELLS = os.environ.get("RNNKERNELS_CELLS", "")
TORCH = os.environ.get("RNNKERNELS_TORCH", "")
#: Below build/.
FOLDER = "sanitize" if SANITIZE else "ext"
CXX = shlex.split(os.environ.get("CXX") or "c++")


def fail(message: str) -> NoReturn:
    """Ends the build; pip prints this last."""
    sys.exit(f"rnnkernels: {message}")


def find_cxx() -> str | None:
    return shutil.which(CXX[0])


@cache
def is_gcc() -> bool:
    """Whether the compiler is GCC, and not one that claims to be like it."""
    predefined = subprocess.run(
        [*CXX, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True
    )
    return "__GNUC__" in predefined.stdout and "__clang__" not in predefined.stdout


def cores() -> int:
    """How many compilers make progress at once."""
    return min(int(os.environ.get("MAX_JOBS") or 1 << 10), os.cpu_count() or 1)
