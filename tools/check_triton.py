"""Compiles the Triton kernels for each GPU and checks what the compilers made of them.

No GPU is needed: rnnkernels/_backends/triton/launch.py runs on tensors without memory, and what it
would launch is compiled. A kernel must keep its values in registers (no spills), fit the shared
memory, read whole rows of what other programs sent, and use atomics for nothing but the counts that
programs signal with.

Exit status: 0 all good, 1 something found or not compiled, 2 no Triton on this machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cells_in_one import BROUGHT
from rnnkernels.cells import CELLS, NORMED, find
from triton_report import (
    PASSES,
    TARGETS,
    Kernel,
    Target,
    Variant,
    as_markdown,
    examined,
    innermost,
    print_aligned,
    print_kernels,
    table,
)

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Precision:
    """Of tensors, and of the products of float32 as torch's switches have it."""

    dtype: torch.dtype
    tf32: bool = False
    matmul: str = "highest"


PRECISIONS = {
    "ieee": Precision(torch.float32),
    "tf32": Precision(torch.float32, tf32=True),
    "tf32x3": Precision(torch.float32, matmul="high"),
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16),
}
#: H and rows of the batch: from all units in one program to more programs than run at once.
SIZES = ((16, 16), (64, 16), (96, 64), (256, 16), (1024, 128), (10_240, 16))
EXTENTS = ("few", "each", "all")
#: all: lengths, resets, recurrent dropout, every gradient and the norms of those of h; packed: the
#: same, of packed steps; norm: of all, bounded by their norm.
OPTIONS = ("bare", "all", "packed", "norm")
#: Cells that are written, by name: those that the package brings, and zoneout.
WRITTEN = {cell.name: cell for cell in BROUGHT}
KNOWN = [*CELLS, *NORMED, *WRITTEN]
#: Of cells whose products are normalised, which torch multiplies: precisions, H and rows, and the
#: kernels of a pass.
NORMED_PRECISIONS = ("ieee", "bfloat16", "float16")
NORMED_SIZES = ((7, 16), (96, 64), (1024, 128), (10_240, 16))
NORMED_KERNELS = {"forward": ("forward",), "backward": ("backward", "finish")}


def selected(extent: str) -> Iterator[tuple[Variant, str]]:
    """Variants and targets: those of built-in cells, each written one on a target, and each
    normalised one on all.

    ``all`` of them; ``each`` pass of each cell in each precision, sizes and options in turn; and
    ``few`` with every pass of every cell, and every precision, size and option, on every target.
    """
    for n, (cell, which) in enumerate(itertools.product(WRITTEN, PASSES)):
        precision, target = (list(of)[n // 2 % len(of)] for of in (PRECISIONS, TARGETS))
        yield Variant(cell, which, precision, *SIZES[n % 4], "all"), target
    yield from _normed(extent)
    if extent == "all":
        for cell, which, precision, size, options, target in itertools.product(
            CELLS, PASSES, PRECISIONS, SIZES, OPTIONS, TARGETS
        ):
            if options != "norm" or which == "backward":
                yield Variant(cell, which, precision, *size, options), target
        return
    turns = len(PRECISIONS) if extent == "each" else 1
    for shift, target in enumerate(TARGETS):
        for n, cell in enumerate(CELLS, shift):
            for turn, which in itertools.product(range(turns), PASSES):
                m = n + turn
                precision = list(PRECISIONS)[m % len(PRECISIONS)]
                options = OPTIONS[m % (4 if which == "backward" else 3)]
                size = SIZES[(2 * m + turn + PASSES.index(which)) % len(SIZES)]
                yield Variant(cell, which, precision, *size, options), target


def _normed(extent: str) -> Iterator[tuple[Variant, str]]:
    """Of cells whose products are normalised: all; each pass of each in each precision on each
    target, sizes and options in turn; or both passes of one on each target."""
    if extent == "all":
        for cell, which, precision, size, options, target in itertools.product(
            NORMED, PASSES, NORMED_PRECISIONS, NORMED_SIZES, OPTIONS, TARGETS
        ):
            yield Variant(cell, which, precision, *size, options), target
        return
    cells, precisions = list(NORMED), NORMED_PRECISIONS
    for n, target in enumerate(TARGETS):
        few = [(cells[n % len(cells)], precisions[n % len(precisions)])]
        for turn, (cell, precision) in enumerate(
            itertools.product(cells, precisions) if extent == "each" else few, n
        ):
            for m, which in enumerate(PASSES):
                size = NORMED_SIZES[(turn + m + n) % len(NORMED_SIZES)]
                yield Variant(cell, which, precision, *size, OPTIONS[turn % len(OPTIONS)]), target


# --- What launch.py and normed_launch.py launch -----------------------------------------------


def arguments(v: Variant) -> dict[str, Any]:
    """What the compiled part gives to launch.py, over two steps; tensors have no memory."""
    cell, dtype, T, B, D, H = find(v.cell), PRECISIONS[v.precision].dtype, 2, v.rows, 1, v.H
    full, packed = v.options != "bare", v.options == "packed"

    def tensor(*shape: int, yes: bool = True, of: torch.dtype = dtype) -> Tensor | None:
        return torch.empty(shape, dtype=of, device="meta") if yes else None

    def steps(*shape: int, yes: bool = True, of: torch.dtype = dtype) -> Tensor | None:
        """[T, B, ...], or of packed steps [N, ...]."""
        return tensor(*((T * B,) if packed else (T, B)), *shape, yes=yes, of=of)

    two, C, has_saved = cell.S > 1, cell.C * H, cell.K > 0
    hidden_bias = full and not cell.normed  # of which it is a parameter
    given: dict[str, Any] = {
        "cell": v.cell,
        "w_hh": tensor(D, cell.G * H, H),
        "h0": tensor(D, B, H),
        "params": tensor(D, cell.P, H, yes=cell.P > 0),
        "h_mask": tensor(D, B, H, yes=full and cell.recurrent),
        "c0": tensor(D, B, C, yes=two),
        "y": steps(D * H),
        "c": steps(D, C, yes=two),
        "saved": steps(D, cell.K * H, yes=has_saved),
        "lengths": tensor(B, yes=full, of=torch.int64),
        "starts": tensor(T + 1, yes=packed, of=torch.int64),
        "T": T,
        "reset": steps(yes=full, of=torch.uint8),
        "noise": tensor(cell.E, yes=cell.E > 0, of=torch.float64),
        "draws": tensor(B, 5, yes=cell.E > 0, of=torch.int64),
    }
    if v.which == "forward":
        return given | {
            "gx": steps(D, cell.G * H),
            "b_ih": tensor(D, cell.G * H, yes=full),
            "b_hh": tensor(D, cell.G * H, yes=hidden_bias),
            "h_n": tensor(D, B, H),
            "c_n": tensor(D, B, C, yes=two),
        }
    return given | {
        "dy": steps(D * H),
        "dh_n": tensor(D, B, H, yes=full),
        "dc_n": tensor(D, B, C, yes=full and two),
        "dc": steps(D, C, yes=full and two),
        "dunit": tensor(B, D, cell.P * H, yes=cell.P > 0, of=torch.float32),
        "dgates": steps(D, (cell.G + cell.A) * H),
        "dh0": tensor(D, B, H, yes=full),
        "dc0": tensor(D, B, C, yes=full and two),
        "flow": steps(D, yes=full),
        "steps": T,
        "rows": B,
        "clip": "norm" if v.options == "norm" else "none",
        "bound": 1.0,
    }


class Driver:
    """Answers Triton in place of a GPU's driver, as far as compiling asks."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(target.backend, target.arch, target.warp)
        self.device = list(TARGETS).index(target.name)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """Stands for a kernel: compiles what is launched."""

    def __init__(self, kernel: Any, found: list[tuple[str, Any]]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: Any) -> Any:
        def compile(*values: Any, **constants: Any) -> None:
            kind = "resident" if constants.get("RESIDENT") else "step"
            names = self.kernel.arg_names
            if "counts" in names and values[names.index("counts")] is not None:
                kind = "grid"
            compiled = self.kernel.warmup(*values, grid=grid, **constants)
            if all(compiled is not other for _, other in self.found):
                self.found.append((kind, compiled))

        return compile


def compile_one(job: tuple[Variant, str]) -> list[Kernel]:
    """All kernels that a pass launches."""
    variant, name = job
    from triton.runtime.driver import driver

    from rnnkernels._backends.triton import launch, normed, normed_launch, sequence

    target, precision = TARGETS[name], PRECISIONS[variant.precision]
    driver.set_active(Driver(target))
    torch.backends.cudnn.allow_tf32 = precision.tf32
    torch.set_float32_matmul_precision(precision.matmul)
    found: list[tuple[str, Any]] = []
    launch.device_of = lambda like: (target.kind, target.processors)
    is_normed = find(variant.cell).normed
    launches, home = (normed_launch, normed) if is_normed else (launch, sequence)
    names = NORMED_KERNELS[variant.which] if is_normed else (variant.which,)
    kernels = {name: getattr(home, name) for name in names}
    failed: list[Kernel] = []
    try:
        for which, kernel in kernels.items():
            setattr(home, which, Compiler(kernel, found))
        getattr(launches, variant.which)(**arguments(variant))
    except Exception as error:  # of many kinds: reported, and counted as a fault
        failed.append(Kernel(variant, name, error=innermost(error)))
    finally:
        for which, kernel in kernels.items():
            setattr(home, which, kernel)
    return [examined(variant, target, kind, compiled) for kind, compiled in found] + failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--extent",
        choices=EXTENTS,
        default="few",
        help="few kernels with everything in some of them; each cell, pass and precision on each "
        "GPU; or all (hours) (default: few)",
    )
    parser.add_argument(
        "--target", action="append", choices=TARGETS, help="one GPU, may be repeated (default: all)"
    )
    parser.add_argument(
        "--cell",
        action="append",
        choices=KNOWN,
        help="one cell, may be repeated (default: all)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="compilers at once (default: the number of cores)",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a short table there")
    args = parser.parse_args()
    try:
        import triton  # noqa: F401
    except ImportError:
        print("Triton is not installed", file=sys.stderr)
        return 2

    jobs = [
        (variant, target)
        for variant, target in selected(args.extent)
        if target in (args.target or TARGETS) and variant.cell in (args.cell or KNOWN)
    ]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        kernels = list(itertools.chain(*pool.map(compile_one, jobs)))
    print_kernels(kernels)
    print()
    print_aligned(list(table(kernels)))
    if args.markdown:
        command = "python tools/check_triton.py " + shlex.join(sys.argv[1:])
        args.markdown.write_text(as_markdown(kernels, command))
    faults = [f"{k.variant} for {k.target}: {fault}" for k in kernels for fault in k.faults()]
    if not kernels:
        faults.append("nothing was compiled")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
