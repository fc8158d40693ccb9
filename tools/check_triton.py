"""Compiles the Triton kernels for each GPU and checks what the compilers made of them.

No GPU is needed: rnnkernels/triton/launch.py runs on tensors without memory, and what it would
launch is compiled. A kernel must keep its values in registers (no spills), fit the shared memory,
and use atomics for nothing but the counts that programs signal with.

Exit status: 0 all good, 1 something found or not compiled, 2 no Triton on this machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rnnkernels.cells import CELLS

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Target:
    """A GPU: how Triton names it, and how much of what it has."""

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int  # bytes that a program may use
    kind: str  # as in rnnkernels/triton/plan.py
    processors: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 << 10, "cuda", 108),
        Target("sm_90", "cuda", 90, 32, 227 << 10, "cuda", 132),
        Target("sm_100", "cuda", 100, 32, 227 << 10, "cuda", 148),
        Target("gfx942", "hip", "gfx942", 64, 64 << 10, "cdna", 304),
        Target("gfx1100", "hip", "gfx1100", 32, 64 << 10, "rdna", 96),
    )
}


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
PASSES = ("forward", "backward")
EXTENTS = ("few", "each", "all")
#: In the sources; the atomics that a kernel may have.
SIGNALS_AND_WAITS = {"forward": 2, "backward": 3}
#: all: lengths, resets, every gradient and the norms of those of h; norm: bounded by their norm.
OPTIONS = ("bare", "all", "norm")


@dataclass(frozen=True)
class Variant:
    """What is asked for."""

    cell: str
    which: str  # pass
    precision: str
    H: int
    rows: int
    options: str

    def __str__(self) -> str:
        return f"{self.cell} {self.which} {self.precision} H={self.H} {self.options}"


@dataclass(frozen=True)
class Kernel:
    """What came of it."""

    variant: Variant
    target: str
    kind: str = "?"
    warps: int = 0
    shared: int = 0
    registers: int = 0
    spills: int = 0
    atomics: tuple[str, ...] = ()  # types of what they point to
    error: str = ""

    def faults(self) -> Iterator[str]:
        limit = TARGETS[self.target].shared
        if self.error:
            yield f"does not compile: {self.error}"
        if self.spills:
            yield f"spills: {self.spills}"
        if self.shared > limit:
            yield f"{self.shared} bytes of shared memory, of {limit}"
        counts = SIGNALS_AND_WAITS[self.variant.which] if self.kind == "grid" else 0
        if len(self.atomics) > counts or set(self.atomics) - {"i32"}:
            yield f"atomics beside those of the counts: on {', '.join(self.atomics)}"


def selected(extent: str) -> Iterator[tuple[Variant, str]]:
    """Variants and targets.

    ``all`` of them; ``each`` pass of each cell in each precision, sizes and options in turn; and
    ``few`` with every pass of every cell, and every precision, size and option, on every target.
    """
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
                options = OPTIONS[m % (3 if which == "backward" else 2)]
                size = SIZES[(2 * m + turn + PASSES.index(which)) % len(SIZES)]
                yield Variant(cell, which, precision, *size, options), target


# --- What launch.py launches ------------------------------------------------------------------


def arguments(v: Variant) -> dict[str, Any]:
    """What the compiled part gives to launch.py, over two steps; tensors have no memory."""
    cell, dtype, T, B, D, H = CELLS[v.cell], PRECISIONS[v.precision].dtype, 2, v.rows, 1, v.H
    full = v.options != "bare"

    def tensor(*shape: int, yes: bool = True, of: torch.dtype = dtype) -> Tensor | None:
        return torch.empty(shape, dtype=of, device="meta") if yes else None

    two, has_saved = cell.S > 1, cell.K > 0
    given: dict[str, Any] = {
        "cell": v.cell,
        "w_hh": tensor(D, cell.G * H, H),
        "h0": tensor(D, B, H),
        "c0": tensor(D, B, H, yes=two),
        "y": tensor(T, B, D * H),
        "c": tensor(T, B, D, H, yes=two),
        "saved": tensor(T, B, D, cell.K * H, yes=has_saved),
        "lengths": tensor(B, yes=full, of=torch.int64),
        "starts": None,
        "T": T,
        "reset": tensor(T, B, yes=full, of=torch.uint8),
    }
    if v.which == "forward":
        return given | {
            "gx": tensor(T, B, D, cell.G * H),
            "b_ih": tensor(D, cell.G * H, yes=full),
            "b_hh": tensor(D, cell.G * H, yes=full),
            "h_n": tensor(D, B, H),
            "c_n": tensor(D, B, H, yes=two),
        }
    return given | {
        "dy": tensor(T, B, D * H),
        "dh_n": tensor(D, B, H, yes=full),
        "dc_n": tensor(D, B, H, yes=full and two),
        "dc": tensor(T, B, D, H, yes=full and two),
        "dgates": tensor(T, B, D, (cell.G + cell.A) * H),
        "dh0": tensor(D, B, H, yes=full),
        "dc0": tensor(D, B, H, yes=full and two),
        "flow": tensor(T, B, D, yes=full),
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
            kind = "resident" if constants["RESIDENT"] else "step"
            names = self.kernel.arg_names
            if values[names.index("counts")] is not None:
                kind = "grid"
            compiled = self.kernel.warmup(*values, grid=grid, **constants)
            if all(compiled is not other for _, other in self.found):
                self.found.append((kind, compiled))

        return compile


def compile_one(job: tuple[Variant, str]) -> list[Kernel]:
    """All kernels that a pass launches."""
    variant, name = job
    from triton.runtime.driver import driver

    from rnnkernels._backends.triton import launch, sequence

    target, precision = TARGETS[name], PRECISIONS[variant.precision]
    driver.set_active(Driver(target))
    torch.backends.cudnn.allow_tf32 = precision.tf32
    torch.set_float32_matmul_precision(precision.matmul)
    found: list[tuple[str, Any]] = []
    kernel = getattr(sequence, variant.which)
    launch.device_of = lambda like: (target.kind, target.processors)
    setattr(sequence, variant.which, Compiler(kernel, found))
    failed: list[Kernel] = []
    try:
        getattr(launch, variant.which)(**arguments(variant))
    except Exception as error:  # of many kinds: reported, and counted as a fault
        failed.append(Kernel(variant, name, error=innermost(error)))
    finally:
        setattr(sequence, variant.which, kernel)
    return [examined(variant, target, kind, compiled) for kind, compiled in found] + failed


def innermost(error: BaseException) -> str:
    """What an error says without the sources that Triton quotes around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[-600:]


# --- What compilers report --------------------------------------------------------------------

SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
OF_AMD = re.compile(
    r"^\s*\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", re.MULTILINE
)
ATOMIC = re.compile(r"\btt\.atomic_\w+ .*?!tt\.ptr<(\w+)>")


def parse_ptxas(report: str) -> tuple[int, int]:
    """Registers, and bytes spilled."""
    registers, spilled = REGISTERS.search(report), SPILLED.search(report)
    if registers is None or spilled is None:
        raise ValueError(f"ptxas reports no registers or spills: {report!r}")
    return int(registers[1]), int(spilled[1]) + int(spilled[2])


def parse_amd(assembly: str) -> tuple[int, int]:
    """Vector registers, and bytes of memory that a thread needs beside them.

    Scalar registers spill into lanes of vector registers first: only what reaches memory counts.
    """
    found = {name: int(count) for name, count in OF_AMD.findall(assembly)}
    if len(found) != 3:
        raise ValueError(f"the assembly reports no registers or spills: {sorted(found)}")
    return found["vgpr_count"], max(
        4 * found["vgpr_spill_count"], found["private_segment_fixed_size"]
    )


def parse_atomics(ttir: str) -> tuple[str, ...]:
    """The types that atomics point to, one for each."""
    return tuple(ATOMIC.findall(ttir))


def ptxas(ptx: str, arch: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}"]
        done = subprocess.run(
            [*command, str(source), "-o", str(Path(folder, "kernel.cubin"))],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    return done.stdout + done.stderr


def examined(variant: Variant, target: Target, kind: str, compiled: Any) -> Kernel:
    if isinstance(target.arch, int):
        registers, spills = parse_ptxas(ptxas(compiled.asm["ptx"], target.arch))
    else:
        registers, spills = parse_amd(compiled.asm["amdgcn"])
    return Kernel(
        variant, target.name, kind, compiled.metadata.num_warps, compiled.metadata.shared,
        registers, spills, parse_atomics(compiled.asm["ttir"]),
    )  # fmt: skip


def table(kernels: list[Kernel]) -> Iterator[list[str]]:
    """The worst of each target and pass."""
    yield ["target", "pass", "kernels", "registers", "shared memory (limit)", "kernels that spill"]
    for target, which in itertools.product(TARGETS.values(), PASSES):
        of = [
            k
            for k in kernels
            if (k.target, k.variant.which) == (target.name, which) and not k.error
        ]
        if of:
            shared = f"{max(k.shared for k in of)} ({target.shared})"
            registers, spill = max(k.registers for k in of), sum(k.spills > 0 for k in of)
            yield [target.name, which, str(len(of)), str(registers), shared, str(spill)]


def as_markdown(kernels: list[Kernel], command: str) -> str:
    import triton

    head, *rows = table(kernels)
    lines = [head, ["---"] * len(head), *rows]
    worst = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"# The Triton kernels as compiled\n\nThe most that kernels of each pass take, as compiled "
        f"by Triton {triton.__version__} with\n\n    {command}\n\nregisters of a thread; bytes of "
        f"shared memory of a program, of those that it may have.\n\n{worst}\n"
    )


def print_aligned(lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip())


def print_kernels(kernels: list[Kernel]) -> None:
    rows = [["kernel", "target", "layout", "warps", "registers", "shared", "spills", ""]]
    for k in kernels:
        numbers = (k.warps, k.registers, k.shared, k.spills)
        fault = "FAIL" if any(k.faults()) else ""
        rows.append([str(k.variant), k.target, k.kind, *map(str, numbers), fault])
    print_aligned(rows)


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
        "--cell", action="append", choices=CELLS, help="one cell, may be repeated (default: all)"
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
        if target in (args.target or TARGETS) and variant.cell in (args.cell or CELLS)
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
