"""Kernels of cells that are the package's own, compiled when it is built: whoever installs a wheel
need not have a compiler.

    python -m rnnkernels.nn.shipped FOLDER TYPES INSTRUCTIONS [JOBS]

puts a library for each cell, type and instruction set into a folder, by what compiles them on first
use (``user_cells``), which looks into the package's folder first. setup.py runs it, where it is
asked to.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from rnnkernels import _ops
from rnnkernels._backends import headers
from rnnkernels._backends.user_cells import (
    PACKAGE,
    TYPES,
    Library,
    compile,
    find_compiler,
    no_compiler,
    no_sources,
    shipped,
    target,
)
from rnnkernels.cells import CELLS, DefinedCell, stated, zoned_out
from rnnkernels.nn import gated


def cells() -> list[DefinedCell]:
    """The gated cells, and the cells that torch.nn has with zoneout of some of their states."""
    found = [gated.mgu, gated.cifg, gated.peephole_lstm, gated.ind_rnn, gated.slstm]
    for name in CELLS:
        cell = stated(name)
        for number in range(1, 1 << cell.S):
            found.append(zoned_out(cell, tuple(bool(number >> i & 1) for i in range(cell.S))))
    return found


def libraries(types: Sequence[str], instructions: Sequence[str], digest: str) -> list[Library]:
    """Those for types, as torch names them, and instruction sets, of which some are for bfloat16
    alone."""
    names = [(TYPES[getattr(torch, type)], each) for type in types for each in instructions]
    wanted = [(type, each) for type, each in names if target(each, type) == each]
    return [Library(cell, type, each, digest) for cell in cells() for type, each in wanted]


def there() -> list[str]:
    """The types, as torch names them, for which every cell's kernels came with the package, for the
    instruction set in use."""
    build = _ops.build_info()
    return [
        str(dtype).removeprefix("torch.")
        for dtype, type in TYPES.items()
        if all(
            shipped(
                Library(cell, type, target(build["cpu_capability"], type), build["headers"])
            ).exists()
            for cell in cells()
        )
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rnnkernels.nn.shipped")
    parser.add_argument("folder", type=Path)
    parser.add_argument("types", type=lambda text: text.split(","))
    parser.add_argument("instructions", type=lambda text: text.split(","))
    parser.add_argument("jobs", type=int, nargs="?", default=1)
    args = parser.parse_args(arguments)
    csrc, compiler = headers.folder(PACKAGE), find_compiler()
    if csrc is None or compiler is None:
        print(f"rnnkernels: {no_sources() if csrc is None else no_compiler()}", file=sys.stderr)
        return 1
    args.folder.mkdir(parents=True, exist_ok=True)
    wanted = libraries(args.types, args.instructions, headers.digest(csrc, "cpu"))
    begin = time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        each = [
            pool.submit(compile, library, csrc, compiler, args.folder / library.file())
            for library in wanted
        ]
    for done in each:
        done.result()
    size = sum(path.stat().st_size for path in args.folder.glob("*.so"))
    print(
        f"rnnkernels: compiled libraries of cells: {len(wanted)}, of {size / 1e6:.1f} MB, in "
        f"{time.perf_counter() - begin:.0f} s",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
