"""The persistent CUDA kernels on the CPU: their own sources, run by the emulator beside its tests
(tests/emulator/simt)."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import building
import op_parity
import stack_parity
from op_parity import Case
from rnnkernels._core.call import Layer

ROOT = Path(__file__).parents[2]
#: Such as "address,undefined": the kernels and the emulator are instrumented, as by setup.py.
SANITIZE = os.environ.get("RNNKERNELS_SANITIZE", "")
#: The types of numbers in memory that kernels are compiled for, the slowest first. What no
#: sanitizer runs, need not be compiled for it.
STORAGE = ("float", "bfloat16") if SANITIZE else ("float", "bfloat16", "float16")
#: Whose kernels have no order of threads that another type's lack; `full` watches them, too.
ALIKE = ("float16",)
#: Compiled for a sanitizer, and linked without it: the emulator has what it would call.
WATCH = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")


@dataclass(frozen=True)
class Layout:
    """How calls are laid out over blocks, and in which order threads run."""

    cluster: bool = True  # else through the grid
    batch: int = 1  # eights of rows in a tile
    units: int = 8  # of a block
    tiles: int = 1  # of a group of blocks
    launches: int = 1
    stages: int = 1  # layers of a stack at a time
    rows: int = 0  # of the batch in a tile; 0: as many as it has room for
    tf32: bool = False
    mode: str = "random"
    seed: int = 0
    skip: str = ""  # the site of a primitive that does nothing
    races: bool = False  # every access is watched
    weak: str = ""  # the site of a primitive that orders no memory
    device: int = 90  # its compute capability
    resident: int = 0  # clusters, or blocks of a grid, that it holds at once; 0: all
    shuffled: bool = False  # in which these begin: in the order of their numbers, or in any
    stepwise: int = 0  # the most blocks of rows of a launch, step by step; 0: persistent kernels
    twice: str = ""  # the kind of step of which two threads take each unit

    def __str__(self) -> str:
        exchange = "cluster" if self.cluster else "grid"
        sizes = f"b{self.batch}u{self.units}t{self.tiles}l{self.launches}s{self.stages}"
        sizes += f"r{self.rows}" if self.rows else ""
        return f"{exchange}-{sizes}"


#: dtype, TF32, largest error. IEEE products are as good as the CPU's; TF32 has 11 bits, the
#: 16-bit types have 8 and 11, and what backward starts from is rounded already.
PRECISIONS = {
    "float32": (torch.float32, False, 1e-6),
    "tf32": (torch.float32, True, 2e-3),
    "bfloat16": (torch.bfloat16, False, 3e-2),
    "float16": (torch.float16, False, 4e-3),
}


def load(watched: bool = False, full: bool = False) -> Any:
    """The ops on emulated kernels; see :func:`build`."""
    build(watched, full)
    return getattr(torch.ops, _name(watched))


def _name(watched: bool) -> str:
    return "rnnkernels_simt_watched" if watched else "rnnkernels_simt"


def build(watched: bool = False, full: bool = False) -> Path:
    """Compiles and loads the ops on emulated kernels; returns the folder of their objects. Watched,
    every access is compared with others for races: kernels take several times as long, and
    `Layout.races` says when; and they run step by step too. Persistent kernels are then those of
    all types if `full` is asked for."""
    name = _name(watched)
    stored = [kind for kind in STORAGE if full or not watched or kind not in ALIKE]
    sources = [f"tests/emulator/simt/kernels/{part}.cpp" for part in (*stored, "ops", "emulator")]
    level = "-O0" if SANITIZE else "-O1"  # with sanitizers it takes three times as long to optimize
    flags = ["-std=c++20", level, "-g0", "-ffp-contract=fast", "-Wno-unknown-pragmas"]
    flags.append(f"-DRNN_SIMT_OPS={name}")
    instrument = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1"] if SANITIZE else []
    if SANITIZE:  # locals that are used after return would take a second stack for each thread
        flags.append("--param=asan-use-after-return=0")
    if watched:
        # Nothing is shared with the other library of the process.
        flags += [*WATCH, "-g1", "-fno-gnu-unique"]
    return building.load_ops(name, sources, flags, instrument)


def runs(case: Case, precision: str = "float32") -> bool:
    """Do persistent kernels take such a call, and is there anything to run?"""
    bounded = precision == "float16" and case.clip.kind == "norm"
    return not (case.R or bounded or case.T * case.B == 0)


def forward(ops: Any, calls: list[Layer], dropout: float = 0) -> list[list[Tensor]]:
    """What each layer returns, one by itself or a stack."""
    if calls[1:]:
        return stack_parity.forward(ops, calls, dropout)
    return [op_parity.forward(ops, calls[0])]


def backward(
    ops: Any, calls: list[Layer], outs: list[list[Tensor]], dropout: float = 0
) -> list[list[Tensor]]:
    grads = stack_parity.random_gradients(calls, outs)
    if calls[1:]:
        return stack_parity.backward(ops, calls, outs, grads, dropout)
    return [op_parity.backward(ops, calls[0], outs[0], grads[0])]


def results(
    ops: Any,
    case: Case,
    layout: Layout,
    dtype: torch.dtype = torch.float32,
    layers: int = 0,
    dropout: float = 0,
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Of both passes, for each layer; there are as many as the layout has stages, unless it says
    otherwise."""
    ops.configure(*astuple(layout))
    calls = stack_parity.make(case, layers or layout.stages, dtype)
    outs = forward(ops, calls, dropout)
    return outs, backward(ops, calls, outs, dropout)


def errors(
    ops: Any,
    case: Case,
    layout: Layout,
    dtype: torch.dtype,
    layers: int = 0,
    dropout: float = 0,
) -> tuple[float, float]:
    outs, backs = results(ops, case, layout, dtype, layers, dropout)
    calls = stack_parity.make(case, len(outs), dtype)
    for call, out, back in zip(calls, outs, backs, strict=True):
        assert op_parity.padding_is_zero(call, [out[0], *out[3:], back[0], *back[3:]])
    grads = stack_parity.random_gradients(calls, outs)
    return (
        stack_parity.forward_error(calls, outs, dropout),
        stack_parity.backward_error(calls, outs, backs, grads, dropout),
    )


def same(got: list[list[Tensor]], wanted: list[list[Tensor]]) -> bool:
    """Are all tensors of all layers the same, bit by bit?"""
    pairs = zip(itertools.chain(*got), itertools.chain(*wanted), strict=True)
    return all(torch.equal(g, w) for g, w in pairs)


EXCHANGES = {"cluster": True, "grid": False}


PRIMITIVES = [
    "sync_block", "sync_cluster", "open", "expect", "await", "send", "publish", "copy_async",
    "copies_arrive", "put", "empty",
]  # fmt: skip


def written_sites(primitives: Sequence[str] = PRIMITIVES) -> set[str]:
    """file:line of every barrier, message and flag in the sources of the kernels, or of some."""
    wanted = re.compile(rf"\b(?:{'|'.join(primitives)})\(")
    found = set()
    for name in ("exchange.cuh", "upstream.cuh", "persistent.cuh", "product.cuh"):
        for number, line in enumerate((ROOT / "csrc/cuda" / name).read_text().splitlines(), 1):
            code = line.split("//")[0]
            declares = "RNN_DEVICE" in code or re.search(r"(exchange|upstream)_\.\w+\(", code)
            if wanted.search(code) and not declares:
                found.add(f"{name}:{number}")
    return found


#: What a wait that reached its bound says.
GAVE_UP = (
    r"rnnkernels::sequence_(for|back)ward: a kernel of the (cluster|grid) family gave up: block "
    r"(\d+) waited 4 s for what (the other blocks that share the weights|the layer before it in a "
    r"stack) send, at tile (\d+), round (\d+)\. "
)
