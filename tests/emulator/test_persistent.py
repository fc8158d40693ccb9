"""The persistent CUDA kernels on the CPU: their own sources, run by the emulator beside this file.

The emulator runs threads in any order that barriers, messages and flags allow. What the kernels
compute must not depend on it, and must depend on every one of their barriers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import pytest
import torch
from torch import Tensor

import nonfinite
import op_parity
import stack_parity
from op_parity import ALL, CASES, CLIPS, Case
from rnnkernels._core.call import Clip, Layer
from rnnkernels.cells import CELLS

ROOT = Path(__file__).parents[2]


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


class Way(NamedTuple):
    precision: str
    exchange: str
    batch: int = 1  # eights of rows in a tile

    def __str__(self) -> str:
        return f"{self.exchange}-{self.precision}-b{self.batch}"


def in_turn(cases: Sequence[Case], others: Sequence[Way]) -> Iterator[tuple[int, Way, Any]]:
    """The number of each case, and how it runs: in float32 on both exchanges, and in one of the
    other ways. Of these the cases of a cell take turns, so that it meets each, or as many as it
    has cases; in all the rest a case runs if that is marked as `full` is asked for."""
    waiting = {cell: [*others[n:], *others[:n]] for n, cell in enumerate(CELLS)}
    for number, case in enumerate(cases):
        turns = waiting[case.cell]
        chosen = next(way for way in turns if runs(case, way.precision))
        turns.append(turns.pop(turns.index(chosen)))
        for way in [*(Way("float32", exchange) for exchange in EXCHANGES), *others]:
            if runs(case, way.precision):
                plain = way.precision == "float32" or way == chosen
                yield number, way, () if plain else pytest.mark.full


LOW = [precision for precision in PRECISIONS if precision != "float32"]
TAKEN = list(filter(runs, CASES))
ALL_WAYS = [Way(*way) for way in itertools.product(LOW, EXCHANGES, (1, 2))]
PRODUCT = list(in_turn(TAKEN, ALL_WAYS))


@pytest.mark.parametrize(
    ("case", "way"),
    [pytest.param(TAKEN[n], way, id=f"{TAKEN[n]}-{way}", marks=marks) for n, way, marks in PRODUCT],
)
def test_matches_reference(ops: Any, case: Case, way: Way) -> None:
    dtype, tf32, tolerance = PRECISIONS[way.precision]
    seed = crc32(str(case).encode()) % 1000
    layout = Layout(EXCHANGES[way.exchange], way.batch, tf32=tf32, seed=seed)
    assert max(errors(ops, case, layout, dtype)) <= tolerance


def test_every_cell_meets_every_way() -> None:
    """Without what is `full`, too."""
    met = {(TAKEN[n].cell, way) for n, way, marks in PRODUCT if not marks}
    assert met >= set(itertools.product(CELLS, ALL_WAYS))


LAYOUTS = [
    (Case("lstm", 1, T=3, B=1, H=1), Layout()),
    (Case("lstm", 2, T=3, B=17, H=19), Layout(tiles=3)),
    (Case("lstm", 1, T=3, B=17, H=19), Layout(tiles=2, rows=3)),
    (Case("lstm", 2, T=3, B=17, H=40), Layout(units=16, tiles=2)),  # a last block of 8 units
    (Case("gru", 1, T=3, B=20, H=100), Layout(units=64)),  # weights beyond the registers
    (Case("rnn_relu", 1, T=2, B=3, H=200), Layout(units=56)),
    (Case("rnn_tanh", 2, T=3, B=9, H=33), Layout(units=40)),  # one block
    (Case("gru", 2, T=4, B=9, H=24, window=2, clip=Clip("norm", 0.3)), Layout(tiles=2)),
]


OTHERS = [way for way in ALL_WAYS if way.batch == 1]


@pytest.mark.parametrize(
    ("case", "layout", "way"),
    [
        pytest.param(*LAYOUTS[n], way, id=f"{LAYOUTS[n][0]}-{LAYOUTS[n][1]}-{way}", marks=marks)
        for n, way, marks in in_turn([case for case, _ in LAYOUTS], OTHERS)
    ],
)
def test_layouts(ops: Any, case: Case, layout: Layout, way: Way) -> None:
    """Several blocks, tiles and launches, and sizes that fill none of them."""
    dtype, tf32, tolerance = PRECISIONS[way.precision]
    layout = replace(layout, cluster=EXCHANGES[way.exchange], tf32=tf32)
    assert max(errors(ops, case, layout, dtype)) <= tolerance
    if not layout.cluster:
        assert max(errors(ops, case, replace(layout, tiles=1, launches=2), dtype)) <= tolerance


#: Of stacks: sizes whose rows are copied in whole chunks, and number by number.
STACKS = [
    *(Case(cell, lengths=True, reset=True) for cell in CELLS),
    *(Case(cell, T=7, B=9, H=16) for cell in CELLS),
    *(Case("gru", T=4, B=3, clip=clip) for clip in CLIPS),
    Case("lstm", T=5, window=2, lengths=True, clip=Clip("norm", 0.3)),
    Case("gru", T=6, B=10, H=24, window=3, reset=True, bias=False),
    Case("lstm", T=1, B=1, H=1, I=1),
]


@pytest.mark.parametrize(
    ("case", "way"),
    [
        pytest.param(STACKS[n], way, id=f"{STACKS[n]}-{way}", marks=marks)
        for n, way, marks in in_turn(STACKS, [way for way in ALL_WAYS if way.batch == 2])
    ],
)
def test_stacks(ops: Any, case: Case, way: Way) -> None:
    """All layers at a time, or two of three."""
    dtype, tf32, tolerance = PRECISIONS[way.precision]
    layout = Layout(
        EXCHANGES[way.exchange], way.batch, units=8 * (case.H % 3 + 1), tf32=tf32, seed=case.H
    )
    ways = [(2, 3, 2, 0.5), (3, 3, 1, 0), (2, 2, 1, 0.5)]
    for stages, layers, tiles, dropout in ways if way.precision == "float32" else ways[:1]:
        layout = replace(layout, stages=stages, tiles=tiles)
        assert max(errors(ops, case, layout, dtype, layers, dropout)) <= tolerance, layout


#: What fills no tile, block or fragment: with every option and several blocks and tiles, with none
#: and weights beyond the registers, and in stacks.
ODD: list[tuple[dict[str, Any], Layout]] = [
    ({**ALL, "D": 2, "T": 5, "B": 9, "H": 13, "window": 2, "clip": CLIPS[1]}, Layout(tiles=2)),
    ({"D": 1, "T": 2, "B": 1, "H": 67, "bias": False}, Layout(units=64)),
    ({"T": 4, "B": 9, "H": 13, "lengths": True, "reset": True}, Layout(tiles=2, stages=2, rows=5)),
]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("cluster", [True, False], ids=["cluster", "grid"])
@pytest.mark.parametrize("cell", CELLS)
def test_odd_sizes(ops: Any, cell: str, cluster: bool, precision: str) -> None:
    """What `make sanitize` runs: little work that touches all memory there is."""
    dtype, _, tolerance = PRECISIONS[precision]
    for options, layout in ODD:
        layout = replace(layout, cluster=cluster, batch=1 if precision == "float32" else 2)
        found = errors(ops, Case(cell, **options), layout, dtype, dropout=0.5)
        assert max(found) <= tolerance, options


SCHEDULES = [("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(4))]
#: Enough for every primitive: several blocks and tiles, a norm to bound by.
VISITS = [
    Case("lstm", 1, T=6, B=18, H=36),
    Case("gru", 2, T=6, B=18, H=36, clip=Clip("norm", 0.3)),
]
DROPPED = 0.5  # between the layers of a stack


@pytest.mark.parametrize("cluster", [True, False], ids=["cluster", "grid"])
@pytest.mark.parametrize("case", VISITS, ids=str)
def test_same_bits_in_any_order(ops: Any, case: Case, cluster: bool) -> None:
    layout = Layout(cluster, units=16, tiles=2)
    wanted = results(ops, case, layout)
    for mode, seed in SCHEDULES:
        got = results(ops, case, replace(layout, mode=mode, seed=seed))
        assert all(map(same, got, wanted)), (mode, seed)


@pytest.mark.parametrize("cluster", [True, False], ids=["cluster", "grid"])
def test_a_row_has_the_same_bits_in_any_batch(ops: Any, cluster: bool) -> None:
    """Whatever the tile that it is in, and its place there."""
    ops.configure(*astuple(Layout(cluster, tiles=2)))
    call = op_parity.make(Case("gru", 1, T=3, B=11, H=20), torch.float32)
    call = op_parity.with_exact_projection(call)
    whole = op_parity.forward(ops, call)[0]
    for b in (0, 5, 10):
        alone = op_parity.rows(call, slice(b, b + 1))
        assert torch.equal(op_parity.forward(ops, alone)[0], whole[:, b : b + 1])


@pytest.mark.parametrize("cluster", [True, False], ids=["cluster", "grid"])
@nonfinite.some
def test_nan_and_infinity(ops: Any, case: Case, title: str, cluster: bool) -> None:
    """They reach what they should, and through what pads units and rows nothing else."""
    layout = Layout(cluster, tiles=2, launches=1 if cluster else 2)
    for dtype in (torch.float32, torch.bfloat16):
        ops.configure(*astuple(layout))
        nonfinite.check(ops, case, title, dtype)


PRIMITIVES = [
    "sync_block", "sync_cluster", "open", "expect", "await", "send", "publish", "copy_async",
    "copies_arrive",
]  # fmt: skip
PRIMITIVE = re.compile(rf"\b(?:{'|'.join(PRIMITIVES)})\(")


def written_sites() -> set[str]:
    """file:line of every barrier, message and flag in the sources of the kernels."""
    found = set()
    for name in ("exchange.cuh", "upstream.cuh", "persistent.cuh", "product.cuh"):
        for number, line in enumerate((ROOT / "csrc/cuda" / name).read_text().splitlines(), 1):
            code = line.split("//")[0]
            declares = "RNN_DEVICE" in code or re.search(r"(exchange|upstream)_\.\w+\(", code)
            if PRIMITIVE.search(code) and not declares:
                found.add(f"{name}:{number}")
    return found


#: What a wait that reached its bound says.
GAVE_UP = (
    r"rnnkernels::sequence_(for|back)ward: a kernel of the (cluster|grid) family gave up: block "
    r"(\d+) waited 4 s for what (the other blocks that share the weights|the layer before it in a "
    r"stack) send, at tile (\d+), round (\d+)\. "
)


def noticed(
    ops: Any, site: str, case: Case, layout: Layout, outs: list[list[Tensor]], backs: Any
) -> bool:
    """Does a run without this primitive fail, or compute something else?"""

    def run(op: Callable[[], list[list[Tensor]]]) -> list[list[Tensor]]:
        ops.configure(*astuple(replace(layout, skip=site)))
        try:
            return op()
        except ValueError as error:  # a site of the other pass
            assert "nothing ran at the site" in str(error)
            ops.configure(*astuple(layout))
            return op()

    calls = stack_parity.make(case, layout.stages, torch.float32)
    try:
        got = run(lambda: forward(ops, calls, DROPPED))
        if not same(got, outs):
            return True
        return not same(run(lambda: backward(ops, calls, got, DROPPED)), backs)
    except RuntimeError as error:
        assert re.match(rf"block \d+, thread \d+, |deadlock: |{GAVE_UP}", str(error)), error
        return True


@pytest.mark.slow
def test_every_primitive_is_needed(ops: Any) -> None:
    """A barrier, message or flag that is left out shows, under one of a few schedules."""
    seen: set[str] = set()
    needless = []
    layouts = [
        Layout(cluster, units=16, tiles=tiles, stages=stages)
        for cluster in (True, False)
        for tiles in (2, 1)
        for stages in (1, 3)
    ]
    visits: dict[str, list[tuple[Any, ...]]] = {}
    for layout in layouts:
        for case in VISITS:
            if layout.stages > 1:  # of one direction
                case = replace(case, D=1)
            wanted = results(ops, case, layout, dropout=DROPPED)
            for place, primitive in (site.split() for site in ops.sites()):
                if primitive in PRIMITIVES and (layout.stages == 1 or "upstream.cuh" in place):
                    visits.setdefault(place, []).append((case, layout, *wanted))
    for site, where in sorted(visits.items()):
        name = site.split("/")[-1]
        seen.add(name)
        if not any(
            noticed(ops, site, case, replace(layout, mode=mode, seed=seed), *wanted)
            for case, layout, *wanted in where
            for mode, seed in SCHEDULES
        ):
            needless.append(name)
    assert not needless
    assert written_sites() <= seen
