"""What compilers made of a Triton kernel: their reports, what is wrong with it, and tables."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """A GPU: how Triton names it, and how much of what it has."""

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int  # bytes that a program may use
    kind: str  # as in rnnkernels/_backends/triton/plan.py
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


PASSES = ("forward", "backward")
#: In the sources; the atomics that a kernel may have.
SIGNALS_AND_WAITS = {"forward": 2, "backward": 3}


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
    narrow: int = 0  # loads of what other programs sent that take 2 bytes at a time
    error: str = ""

    def faults(self) -> Iterator[str]:
        limit = TARGETS[self.target].shared
        if self.error:
            yield f"does not compile: {self.error}"
        if self.spills:
            yield f"spills: {self.spills}"
        if self.shared > limit:
            yield f"{self.shared} bytes of shared memory, of {limit}"
        if self.narrow:
            yield f"reads what others sent by 2 bytes, in {self.narrow} loads"
        counts = SIGNALS_AND_WAITS[self.variant.which] if self.kind == "grid" else 0
        if len(self.atomics) > counts or set(self.atomics) - {"i32"}:
            yield f"atomics beside those of the counts: on {', '.join(self.atomics)}"


SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
OF_AMD = re.compile(
    r"^\s*\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", re.MULTILINE
)
NARROW = re.compile(r"\bld\.global\.cg\.[bu]16\b")
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


def parse_narrow(ptx: str) -> int:
    """Loads past the L1 cache of 2 bytes: rows of 16 bits that were not found to be aligned."""
    return len(NARROW.findall(ptx))


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
        parse_narrow(compiled.asm.get("ptx", "")),
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


def innermost(error: BaseException) -> str:
    """What an error says without the sources that Triton quotes around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[-600:]
