"""The persistent CUDA kernels on the CPU: their own sources, run by the emulator beside this file.

The emulator runs threads in any order that barriers, messages and flags allow. What the kernels
compute must not depend on it, and must depend on every one of their barriers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from typing import Any, NamedTuple
from zlib import crc32

import pytest
import torch
from torch import Tensor

import emulated
import nonfinite
import op_parity
import stack_parity
from emulated import (
    EXCHANGES,
    GAVE_UP,
    PRECISIONS,
    PRIMITIVES,
    Layout,
    backward,
    errors,
    forward,
    results,
    runs,
    same,
)
from op_parity import ALL, CASES, CLIPS, DROPPED, Case
from rnnkernels._core.call import Clip
from rnnkernels.cells import CELLS


class Way(NamedTuple):
    precision: str
    exchange: str
    batch: int = 1  # eights of rows in a tile

    def __str__(self) -> str:
        return f"{self.exchange}-{self.precision}-b{self.batch}"


def in_turn(cases: Sequence[Case], others: Sequence[Way]) -> Iterator[tuple[int, Way, Any]]:
    """The number of each case, and how it runs: in one of the other ways, and in float32 on the
    exchange that this has not. The cases of a cell take turns, so that it meets each of the other
    ways, or as many as it has cases; in all the rest a case runs if `full` is asked for."""
    waiting = {cell: [*others[n:], *others[:n]] for n, cell in enumerate(CELLS)}
    for number, case in enumerate(cases):
        turns = waiting[case.cell]
        chosen = next(way for way in turns if runs(case, way.precision))
        turns.append(turns.pop(turns.index(chosen)))
        for way in [*(Way("float32", exchange) for exchange in EXCHANGES), *others]:
            if runs(case, way.precision):
                first = way.precision == "float32" and way.exchange != chosen.exchange
                plain = first or way == chosen
                yield number, way, () if plain else pytest.mark.full


LOW = [precision for precision in PRECISIONS if precision != "float32"]
TAKEN = list(filter(runs, [*CASES, *DROPPED]))
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
    exact = [Way("float32", exchange) for exchange in EXCHANGES]
    assert met == set(itertools.product(CELLS, [*exact, *ALL_WAYS]))
    met_exchanges = {(n, way.exchange) for n, way, marks in PRODUCT if not marks}
    assert met_exchanges == set(itertools.product(range(len(TAKEN)), EXCHANGES))


LAYOUTS = [
    (Case("lstm", 1, T=3, B=1, H=1), Layout()),
    (Case("lstm", 2, T=3, B=17, H=19), Layout(tiles=3)),
    (Case("lstm", 1, T=3, B=17, H=19, drop=True), Layout(tiles=2, rows=3)),
    (Case("lstm", 2, T=3, B=17, H=40), Layout(units=16, tiles=2)),  # a last block of 8 units
    (Case("gru", 1, T=3, B=20, H=100), Layout(units=64)),  # weights beyond the registers
    (Case("rnn_relu", 1, T=2, B=3, H=200), Layout(units=56)),
    (Case("rnn_tanh", 2, T=3, B=9, H=33), Layout(units=40)),  # one block
    (Case("gru", 2, T=4, B=9, H=24, window=2, clip=Clip("norm", 0.3), drop=True), Layout(tiles=2)),
    # Backward: more vectors of a message than a thread asks for at once, twice.
    (Case("lstm", 1, T=3, B=2, H=264), Layout(units=24)),
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
    Case("lstm", T=5, window=2, lengths=True, clip=Clip("norm", 0.3), drop=True),
    Case("gru", T=6, B=10, H=24, window=3, reset=True, bias=False, drop=True),
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
        forward, backward = errors(ops, case, layout, dtype, layers, dropout)
        assert forward <= tolerance, layout
        # The kink of relu falls on either side of a 16-bit rounding, and one gate in thousands is
        # another's: its gradients are compared in float32.
        if case.cell != "rnn_relu" or dtype.itemsize > 2:
            assert backward <= tolerance, layout


#: What fills no tile, block or fragment: with every option and several blocks and tiles, with none
#: and weights beyond the registers, and in stacks.
ODD: list[tuple[dict[str, Any], Layout]] = [
    (
        {**ALL, "D": 2, "T": 5, "B": 9, "H": 13, "window": 2, "clip": CLIPS[1], "drop": True},
        Layout(tiles=2),
    ),
    ({"D": 1, "T": 2, "B": 1, "H": 67, "bias": False}, Layout(units=64)),
    (
        {"T": 4, "B": 9, "H": 13, "lengths": True, "reset": True, "drop": True},
        Layout(tiles=2, stages=2, rows=5),
    ),
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
    Case("rnn_tanh", 1, T=12, B=9, H=20),  # through the grid, vectors are used again
]
BETWEEN = 0.5  # dropout between the layers of a stack


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
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_operands_lie_in_different_banks(ops: Any, blocks: int, stages: int, cluster: bool) -> None:
    """Rows of a buffer, with and without the parts of a norm, and of what comes from upstream."""
    for clip in (Clip(), Clip("norm", 0.3)):
        case = Case("gru", T=2, B=3, H=8 * blocks, clip=clip)
        results(ops, case, Layout(cluster, stages=stages), torch.bfloat16)
        assert ops.visits("load_matrices") > 0
        assert ops.bank_conflicts() == 0


@pytest.mark.parametrize("cluster", [True, False], ids=["cluster", "grid"])
@nonfinite.some
def test_nan_and_infinity(ops: Any, case: Case, title: str, cluster: bool) -> None:
    """They reach what they should, and through what pads units and rows nothing else."""
    layout = Layout(cluster, tiles=2, launches=1 if cluster else 2)
    for dtype in (torch.float32, torch.bfloat16):
        ops.configure(*astuple(layout))
        nonfinite.check(ops, case, title, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cluster", [True, False], ids=["cluster", "grid"])
def test_recurrent_dropout_of_a_row_is_that_of_its_weights(
    ops: Any, cluster: bool, dtype: torch.dtype
) -> None:
    """Where a row is by itself, W_hh may have the factors of its h; they are 0 or a power of two,
    so that both have the same bits, in both passes."""
    case = Case("gru", 1, T=4, B=1, H=20, reset=True, drop=True)
    ops.configure(*astuple(Layout(cluster)))
    call = op_parity.make(case, dtype)
    assert call.h_mask is not None
    mask = 2 * call.h_mask.sign()
    assert 0 < mask.count_nonzero() < mask.numel()
    (w_hh,) = call.w_hh
    dropped = call._replace(h_mask=mask)
    by_weights = call._replace(h_mask=None, w_hh=[w_hh * mask[0]])
    outs = [op_parity.forward(ops, each) for each in (dropped, by_weights)]
    assert all(map(torch.equal, *outs))
    grads = op_parity.random_gradients(call, outs[0])
    backs = [op_parity.backward(ops, each, outs[0], grads) for each in (dropped, by_weights)]
    assert all(map(torch.equal, *backs))


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
        got = run(lambda: forward(ops, calls, BETWEEN))
        if not same(got, outs):
            return True
        return not same(run(lambda: backward(ops, calls, got, BETWEEN)), backs)
    except RuntimeError as error:
        assert re.match(rf"block \d+, thread \d+, |deadlock: |{GAVE_UP}", str(error)), error
        return True


@pytest.mark.slow
def test_every_primitive_is_needed(ops: Any) -> None:
    """A barrier, message or flag that is left out shows, under one of a few schedules; runs that
    take the least time are tried first."""
    needed: set[str] = set()
    visited: set[str] = set()
    for case, cluster, tiles, stages in itertools.product(
        reversed(VISITS), (True, False), (2, 1), (1, 3)
    ):
        if (
            emulated.written_sites() <= {site.split("/")[-1] for site in needed}
            and visited == needed
        ):
            break
        layout = Layout(cluster, units=16, tiles=tiles, stages=stages)
        if stages > 1:  # of one direction
            case = replace(case, D=1)
        wanted = results(ops, case, layout, dropout=BETWEEN)
        for site, primitive in (line.split() for line in ops.sites()):
            if primitive not in PRIMITIVES or (stages > 1 and "upstream.cuh" not in site):
                continue
            visited.add(site)
            if site not in needed and any(
                noticed(ops, site, case, replace(layout, mode=mode, seed=seed), *wanted)
                for mode, seed in SCHEDULES
            ):
                needed.add(site)
    assert not visited - needed
    assert emulated.written_sites() <= {site.split("/")[-1] for site in needed}
