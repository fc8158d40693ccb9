"""No two accesses of the CUDA kernels' threads to the same memory are left without an order, and
each barrier, wait and fence of the sources is what puts some of them in order.

One run of a case is enough, whatever its schedule: see tests/emulator/simt/races.h.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import astuple, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import emulated
import op_parity
import stack_parity
from emulated import EXCHANGES, PRECISIONS, Layout
from op_parity import CASES, CLIPS, NORMED_CASES, OVER_SAVED, Case
from rnnkernels._core.call import Clip, Layer

pytestmark = pytest.mark.skipif(
    bool(emulated.SANITIZE), reason="the compiler instruments for one sanitizer at a time"
)


@pytest.fixture(scope="session")
def ops(pytestconfig: pytest.Config) -> Any:
    return emulated.load(watched=True, full=pytestconfig.getoption("full"))


NORM = Clip("norm", 0.3)
DROPPED = 0.5  # between the layers of a stack


class Run(NamedTuple):
    case: Case
    layout: Layout
    precision: str = "float32"

    def __str__(self) -> str:
        return "-".join(map(str, self))

    def on(self, exchange: str, **options: Any) -> Run:
        tf32 = PRECISIONS[self.precision][1]
        of_all = {"cluster": EXCHANGES[exchange], "tf32": tf32, "mode": "forward", "races": True}
        return self._replace(layout=replace(self.layout, **of_all, **options))

    def calls(self) -> list[Layer]:
        dtype = PRECISIONS[self.precision][0]
        return stack_parity.make(self.case, self.layout.stages, dtype)


#: Several blocks and tiles in each, and rounds enough that buffers are used again. Together they
#: have every option, on each exchange and in stacks; the rest is for `full`.
CHOSEN = [
    Run(Case("lstm", 2, T=4, B=9, H=12, lengths=True, reset=True, drop=True), Layout(tiles=2)),
    Run(Case("gru", 1, T=5, B=9, H=20, clip=NORM, window=3), Layout(tiles=2)),
    Run(Case("lstm", 2, T=4, B=9, H=12, packed=True, flow=True), Layout(units=16)),
    Run(Case("rnn_tanh", T=5, B=17, H=40, clip=CLIPS[0]), Layout(batch=2, tiles=2), "bfloat16"),
    Run(Case("gru", T=4, B=9, H=12, bias=False), Layout(batch=2), "tf32"),
    Run(Case("lstm", T=4, B=9, H=12, lengths=True, reset=True), Layout(tiles=2, stages=2, rows=5)),
    Run(
        Case("gru", T=4, B=9, H=12, clip=NORM, drop=True), Layout(units=16, tiles=2, stages=2)
    ),  # one block
    Run(Case("gru", T=4, B=3, H=16, clip=NORM), Layout(stages=3), "tf32"),
    Run(
        Case("gru", T=4, B=9, H=16, clip=CLIPS[2], window=2), Layout(batch=2, stages=2), "bfloat16"
    ),
    Run(Case("rnn_relu", T=2, B=3, H=72), Layout(units=64)),  # weights in shared memory
    Run(Case("lstm", T=4, B=9, H=12, lengths=True), Layout(tiles=2, stages=2), "bfloat16"),
    # Through the grid, vectors are used again from round 9 on.
    Run(Case("rnn_tanh", T=12, B=3, H=12), Layout(tiles=2, rows=2)),
]
#: Everything that the emulator's other tests hold against the reference.
ALL_RUNS = [
    Run(case, Layout(batch=batch, tiles=2, stages=stages), precision)
    for precision in PRECISIONS
    for case in CASES
    if emulated.runs(case, precision)
    for batch in ((1,) if precision == "float32" else (1, 2))
    for stages in ((1, 2) if case.D == 1 and not case.flow else (1,))
]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    "run",
    [
        *(pytest.param(run, id=str(run)) for run in CHOSEN),
        *(pytest.param(run, id=f"all-{run}", marks=pytest.mark.full) for run in ALL_RUNS),
    ],
)
def test_no_races(ops: Any, run: Run, exchange: str) -> None:
    """In both passes."""
    run, dtype = run.on(exchange), PRECISIONS[run.precision][0]
    dropout = 0 if run.case.packed else DROPPED  # whose masks are padded
    emulated.results(ops, run.case, run.layout, dtype, dropout=dropout)
    assert ops.watched() > 1000 * run.case.T


def test_gradients_over_saved_values(ops: Any) -> None:
    """Where backward writes over what forward has saved, a unit's values are read by its thread."""
    for exchange, cell in itertools.product(EXCHANGES, OVER_SAVED):
        run = Run(Case(cell, T=4, B=9, H=12, clip=NORM), Layout(tiles=2)).on(exchange)
        ops.configure(*astuple(run.layout))
        (call,) = run.calls()
        out = op_parity.forward(ops, call)
        op_parity.backward_over_saved(ops, call, out, op_parity.random_gradients(call, out))
        assert ops.watched() > 1000 * run.case.T


# --- Step by step: no thread waits for another -------------------------------------------------

#: Fewer blocks of rows than rows need: a thread takes several.
STEPWISE = Layout(stepwise=2, races=True, mode="forward")
#: Every option, with what persistent kernels do not take.
CHOSEN_STEPS = [
    (Case("lstm", 2, R=9, B=5, H=33, lengths=True, reset=True, clip=NORM), torch.float64),
    (Case("lstm", 2, R=3, B=6, window=2, reset=True, flow=True, packed=True), torch.float16),
    (Case("gru", 2, B=9, H=40, window=3, flow=True, clip=NORM), torch.float16),
    (Case("gru", 2, B=6, reset=True, packed=True, clip=CLIPS[0]), torch.bfloat16),
    (Case("rnn_tanh", B=9, lengths=True, reset=True, window=1), torch.float32),
    (
        Case("layer_norm_lstm", 2, B=5, H=33, R=3, lengths=True, reset=True, flow=True),
        torch.float64,
    ),
    (Case("layer_norm_gru", B=9, packed=True, reset=True, window=2, clip=NORM), torch.bfloat16),
]
DTYPES = (torch.float64, *{dtype for dtype, _, _ in PRECISIONS.values()})
ALL_STEPS = [
    (case, dtype) for case in (*CASES, *NORMED_CASES) if case.T * case.B for dtype in DTYPES
]


def step_by_step(ops: Any, case: Case, dtype: torch.dtype, **layout: str) -> set[str]:
    """Which kinds of steps were launched, such as ForwardCell<float>."""
    ops.configure(*astuple(replace(STEPWISE, **layout)))
    call = op_parity.make(case, dtype)
    out = op_parity.forward(ops, call)
    grads = op_parity.random_gradients(call, out)
    results = [*out, *op_parity.backward(ops, call, out, grads)]
    if case.cell in OVER_SAVED:
        results += op_parity.backward_over_saved(ops, call, out, grads)
    assert all(t.isfinite().all() for t in results)  # as is no memory that nobody has written
    assert ops.watched() > 1000
    return {kind for kind, what in map(str.split, ops.sites()) if what == "launch"}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(pytest.param(*each, id="-".join(map(str, each))) for each in CHOSEN_STEPS),
        *(pytest.param(*each, marks=pytest.mark.full) for each in ALL_STEPS),
    ],
)
def test_steps_have_no_races(ops: Any, case: Case, dtype: torch.dtype) -> None:
    step_by_step(ops, case, dtype)


AROUND = {"ForwardProject", "BackwardBegin", "BackwardProject", "BackwardFinish"}
NORMED_ROWS = {"HiddenMoments", "StateMoments", "StateMeans", "HiddenMeans"}
NORMED_STEPS = {
    "NormedForwardCell", "ForwardEmit", "BackwardEmit", "NormedBackwardCell", "HandOnGates",
}  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (CHOSEN_STEPS[0], AROUND | {"ForwardCell", "BackwardCell", "BackwardBound"}),
        (CHOSEN_STEPS[-2], AROUND | NORMED_ROWS | NORMED_STEPS),
    ],
    ids=["units", "rows"],
)
def test_a_race_shows_in_every_step(
    ops: Any, chosen: tuple[Case, torch.dtype], names: set[str]
) -> None:
    """Two threads that take the same unit, or the same part of a row."""
    assert step_by_step(ops, *chosen) == {f"{name}<double>" for name in names}
    for name in names:
        with pytest.raises(RuntimeError, match=f"race in {name}<double>\n.* in no order"):
            step_by_step(ops, *chosen, twice=f"{name}<double>")


@pytest.mark.parametrize("way", ["weak", "skip"])
def test_rows_wait_for_all_of_their_parts(ops: Any, way: str) -> None:
    """Where a block does not, or orders no memory, it shows."""
    case, dtype = CHOSEN_STEPS[-1]
    step_by_step(ops, case, dtype)
    (site,) = (place for place, what in map(str.split, ops.sites()) if what == "sync_block")
    with pytest.raises(RuntimeError, match="race in HiddenMoments<rnn::BFloat16>"):
        step_by_step(ops, case, dtype, **{way: site})


# --- What orders them ---------------------------------------------------------------------------

#: Which wait until others have done something; left out, threads run on.
WAITS = ("sync_block", "sync_cluster", "await", "copies_arrive")
#: All of these order memory. It is left out by itself, too: they wait and signal as before, a flag
#: without the fence in front of it, and vectors are accesses like any others.
ORDERS = (*WAITS, "publish", "put", "look", "empty", "settle")


class Pass(NamedTuple):
    """A pass of a run by itself."""

    run: Run
    outs: list[list[Tensor]] | None  # of forward; None: this is forward

    def __call__(self, ops: Any, **options: str) -> list[list[Tensor]]:
        ops.configure(*astuple(replace(self.run.layout, **options)))
        calls = self.run.calls()
        if self.outs is None:
            return emulated.forward(ops, calls, DROPPED)
        return emulated.backward(ops, calls, self.outs, DROPPED)

    def has_race(self, ops: Any, weak: str = "", skip: str = "") -> bool:
        try:
            self(ops, weak=weak, skip=skip)
        except RuntimeError as error:
            # A thread that does not wait may do worse first, such as to send to a block that has
            # not begun.
            assert str(error).startswith("race in ") or skip, error
            return True
        return False


def passes(ops: Any, run: Run) -> Iterator[tuple[Pass, set[tuple[str, str]]]]:
    """Each with the places that it visits, and the primitives there."""
    outs = None
    for _ in range(2):
        each = Pass(run, outs)
        got = each(ops)
        sites = {(place, primitive) for place, primitive in map(str.split, ops.sites())}
        yield each, sites
        outs = got


@pytest.mark.slow
def test_each_wait_and_fence_is_needed(ops: Any) -> None:
    """Left out, or without the order that it gives, it shows as a race, in one run; the smaller
    ones are tried first."""
    needed: set[tuple[str, str]] = set()
    visited: set[tuple[str, str]] = set()
    small_first = sorted(itertools.product(CHOSEN, EXCHANGES), key=lambda each: size(each[0]))
    for run, exchange in small_first:
        if visited == needed and emulated.written_sites(ORDERS) <= names(needed):
            break
        for each, sites in passes(ops, run.on(exchange)):
            for place, primitive in sites:
                ways = ["weak", "skip"] if primitive in WAITS else ["weak"]
                for way in ways if primitive in ORDERS else []:
                    visited.add((place, way))
                    if (place, way) not in needed and each.has_race(ops, **{way: place}):
                        needed.add((place, way))
    assert not visited - needed
    assert emulated.written_sites(ORDERS) <= names(needed)


def size(run: Run) -> int:
    T, B, H, D = run.case.T, run.case.B, run.case.H, run.case.D
    return T * B * H * D * run.layout.stages


def names(sites: set[tuple[str, str]]) -> set[str]:
    return {place.split("/")[-1] for place, _ in sites}
