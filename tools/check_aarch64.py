"""Cross-compiles the kernels for 64-bit Arm, without torch and Python, and runs a test of them in
an emulator.

    apt install g++-aarch64-linux-gnu qemu-user
    make test-aarch64

Exit status: 0 good, 1 not, 2 no compiler or emulator on this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from build_support import libraries, settings

ROOT = Path(__file__).resolve().parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
#: Where Debian's compiler has the C library of the machine that it is for.
SYSTEM = "/usr/aarch64-linux-gnu"


def program(library: Path) -> Path:
    """The test, linked with the kernels beside it."""
    made = library.parent / "kernels_alone"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wno-psabi", "-Icsrc", "-fopenmp"]
    links = [f"-L{library.parent}", f"-l:{library.name}", "-Wl,-rpath,$ORIGIN"]
    source = "tests/tooling/kernels_alone/program.cpp"
    subprocess.run([*settings.CXX, *flags, source, "-o", str(made), *links], check=True)
    return made


def main() -> int:
    for needed in (COMPILER, EMULATOR):
        if shutil.which(needed) is None:
            print(
                f"{needed} not found: apt install g++-aarch64-linux-gnu qemu-user", file=sys.stderr
            )
            return 2
    os.chdir(ROOT)
    settings.CXX[:] = [COMPILER]
    settings.FOLDER, settings.CUDA, settings.NATIVE = "aarch64", "0", False
    made = program(libraries.build_kernels())
    return subprocess.run([EMULATOR, "-L", SYSTEM, str(made)]).returncode


if __name__ == "__main__":
    sys.exit(main())
