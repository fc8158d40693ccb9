"""The C++ sources that a user's cell is compiled from, and their digest.

setup.py runs this file by itself, before the package can be imported: it imports nothing of it.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

#: Of csrc: all that a file of a cell may include, by backend.
PATTERNS = {
    "cpu": ("common/*.h", "cpu/*.h", "cpu/*.inc", "cpu/kernels_*.cpp"),
    "cuda": (
        "common/*.h", "cuda/cell_libraries.h", "cuda/pointwise*.cuh", "cuda/pointwise.h",
        "cuda/step.h", "cuda/unit.h", "cuda/noise.h", "cuda/scalar.cuh", "cuda/storage.cuh",
        "cuda/activation.h", "cuda/user_cell.inc",
    ),
}  # fmt: skip
#: Where an installed package has them; a source tree has them beside the package.
INSTALLED = "_csrc"


def files(csrc: Path, *backends: str) -> list[Path]:
    """Those of some backends, or of all; relative to `csrc`, in one order."""
    patterns = [p for backend in backends or PATTERNS for p in PATTERNS[backend]]
    return sorted({path.relative_to(csrc) for each in patterns for path in csrc.glob(each)})


def digest(csrc: Path, backend: str) -> str:
    """Of the names and contents of all files of a backend."""
    total = sha256()
    for path in files(csrc, backend):
        content = (csrc / path).read_bytes()
        total.update(f"{path.as_posix()} {len(content)}\n".encode() + content)
    return total.hexdigest()[:16]


def folder(package: Path) -> Path | None:
    """Where the sources lie that belong to the package in this folder, if anywhere."""
    for csrc in (package / INSTALLED, package.parent / "csrc"):
        if (csrc / "cpu" / "user_cell.inc").exists():
            return csrc
    return None
