"""The stepwise CUDA kernels on the CPU: their own sources, with a plain loop over units in place of
launches (tests/emulator/cuda_host), of built-in cells and of some that are written."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

import building
import cells_in_one
import noise
import written_cells
from rnnkernels import _ops
from rnnkernels.cells import DefinedCell

#: Compiled in float64 and bfloat16 alone. Those that the package brings; and of the others what
#: none of these has: seven gates, more than two of them apart; noise, drawn beside a parameter.
WRITTEN: list[DefinedCell] = [
    *cells_in_one.BROUGHT,
    written_cells.crowd,
    written_cells.forgets,
    noise.ZONED_NOISY,
]
NAME = "rnnkernels_cuda_on_host"


def load() -> Any:
    """The ops, compiled where that was not done yet."""
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        pytest.skip("no Python headers to compile against")
    for cell in WRITTEN:
        _ops.register_cell(cell)
    text = cells_in_one.header(WRITTEN)
    with building.folder("cells_on_host", text) as folder:
        if not (header := folder / "emulator_written_cells.h").exists():
            header.write_text(text)
    sources = [f"tests/emulator/cuda_host/{name}.cpp" for name in ("on_host", "written")]
    flags = ["-std=c++20", "-O1", "-g0", "-ffp-contract=fast", f"-I{folder}"]
    building.load_ops(NAME, sources, flags, [])
    return getattr(torch.ops, NAME)
