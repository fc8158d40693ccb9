"""Kernels of the package's own cells, compiled with it where that is asked for: else each machine
compiles them on first use, with a compiler that it has to have."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

from build_support import processor, settings
from build_support.settings import fail

TYPES = ("float32", "float64", "bfloat16", "float16")
#: In the package; rnnkernels/_backends/user_cells.py looks for it.
FOLDER = "_cells"


def types(setting: str) -> tuple[str, ...]:
    """By the value of RNNKERNELS_CELLS; none where they are left to each machine."""
    if setting in ("", "0"):
        return ()
    named = TYPES[:2] if setting == "1" else tuple(setting.split(","))
    if not set(named) <= set(TYPES):
        fail(
            f"RNNKERNELS_CELLS must be 0, 1 (for {','.join(TYPES[:2])}), empty, or some of "
            f"{','.join(TYPES)} with commas between them, got {setting!r}"
        )
    return named


def instructions() -> list[str]:
    """Those that the kernels are built for."""
    every = ["default"]
    if platform.machine() == "x86_64":
        every += [*processor.LEVELS, *processor.FOR_BFLOAT16]
    left_out = processor.without()
    return [each for each in every if each not in left_out]


def check() -> None:
    """Ends a build that could not compile them, before it has compiled all else."""
    if types(settings.CELLS) and importlib.util.find_spec("torch") is None:
        fail(
            "RNNKERNELS_CELLS: what is compiled is derived from the cells by the package, which "
            "needs a torch to import, and none is here. Build with 'pip install "
            "--no-build-isolation' or 'make wheel', or leave RNNKERNELS_CELLS out"
        )


def build(root: Path, to: Path) -> None:
    """Compiles them into a folder by the package that lies in `root`."""
    # -B: what Python compiles of the package would lie in the folder that becomes the wheel.
    command = [sys.executable, "-B", "-P", "-W", "ignore", "-m", "rnnkernels.nn.shipped", str(to)]
    asked = [",".join(types(settings.CELLS)), ",".join(instructions()), str(settings.cores())]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([*command, *asked], env=environment, check=True)
