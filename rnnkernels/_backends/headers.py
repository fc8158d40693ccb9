"""The C++ sources that a user's cell is compiled from, and their digest.

setup.py runs this file by itself, before the package can be imported: it imports nothing of it.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

#: Of csrc: all that a file of a cell may include.
PATTERNS = ("common/*.h", "cpu/*.h", "cpu/*.inc", "cpu/kernels_*.cpp")
#: Where an installed package has them; a source tree has them beside the package.
INSTALLED = "_csrc"


def files(csrc: Path) -> list[Path]:
    """Relative to `csrc`, in one order."""
    found = {path.relative_to(csrc) for pattern in PATTERNS for path in csrc.glob(pattern)}
    return sorted(found)


def digest(csrc: Path) -> str:
    """Of the names and contents of all files."""
    total = sha256()
    for path in files(csrc):
        content = (csrc / path).read_bytes()
        total.update(f"{path.as_posix()} {len(content)}\n".encode() + content)
    return total.hexdigest()[:16]


def folder(package: Path) -> Path | None:
    """Where the sources lie that belong to the package in this folder, if anywhere."""
    for csrc in (package / INSTALLED, package.parent / "csrc"):
        if (csrc / "cpu" / "user_cell.inc").exists():
            return csrc
    return None
