"""The suites: which cases, in which modes, and how each is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from benchmarks import (
    breakdown,
    concurrent,
    contest,
    derivatives,
    device,
    flow,
    gpu_estimates,
    memory,
    providers,
    ragged,
    recomputed,
    sequences,
    serving,
    truncated,
    written,
)
from benchmarks.cases import LAYERS, SINGLE_STEPS, SUITE, Case, Shape, shapes
from benchmarks.contest import Contest, Row, Setup
from benchmarks.problem import Runner, ready

TIMED = ("inference", "forward", "training")
ALL = (*TIMED, "memory")


@dataclass(frozen=True)
class Suite:
    """A named list of cases, and how they are measured.

    ``modes`` are measured unless others of ``possible`` are asked for. ``providers`` says whether
    others can be compared and several backends asked for; ``stacks`` whether layers and
    directions can be set; ``window`` is that of a shape which the user gives.
    """

    name: str
    about: str
    cases: Callable[[], tuple[Case, ...]]
    modes: tuple[str, ...]
    possible: tuple[str, ...] = ALL
    compete: Callable[[Case, str, Setup], Contest] | None = None
    finish: Callable[[Case, str, Row], None] | None = None
    floors: tuple[str, ...] = ()
    repeats: int = 7
    stacks: bool = False
    window: int = 0
    devices: tuple[str, ...] = tuple(device.DEVICES)

    @property
    def providers(self) -> bool:
        return self.compete is None


@lru_cache(maxsize=1)
def _runners(case: Case, setup: Setup) -> tuple[dict[str, Runner], dict[str, str]]:
    """Who takes part, and why others do not; the same for all modes of a case."""
    found, refused = {}, {}
    for name in (*setup.others, *map(providers.ours_on, setup.backends)):
        try:
            found[name] = providers.build(name, ready(case))
        except providers.Refused as reason:
            refused[name] = str(reason)
    return found, refused


def compete(suite: Suite, case: Case, mode: str, setup: Setup) -> Contest:
    """All ways through a case of a suite."""
    if suite.compete is not None:
        try:
            return suite.compete(case, mode, setup)
        except providers.Refused as reason:  # without ours there is nothing to compare with
            refused = {providers.ours_on(setup.backends[0]): str(reason)}
            return Contest({}, lambda: None, refused=refused)
    return contest.of_runners(ready(case), mode, *_runners(case, setup))


def measure(suite: Suite, case: Case, mode: str, setup: Setup) -> Row:
    """A row of the record: results compared, then times or memory."""
    torch.set_num_threads(case.threads or setup.threads)
    row: Row = {"suite": suite.name, **case.fields(), "mode": mode, "gflop": case.gflop(mode)}
    found = compete(suite, case, mode, setup)
    if mode == "memory":
        errors, wrong = contest.judge(found)
        results = {
            name: {
                **memory.in_fresh_process(_memory, suite.name, case, setup, name),
                "error": error,
            }
            for name, error in errors.items()
        }
        row |= {"results": results, "refused": found.refused, "wrong": wrong}
    else:
        row |= contest.time_all(found, case, setup.repeats or suite.repeats, suite.floors)
    if suite.finish is not None:
        suite.finish(case, mode, row)
    return row


def _memory(suite: str, case: Case, setup: Setup, way: str) -> dict[str, float]:
    """Runs in a process of its own."""
    torch.set_num_threads(case.threads or setup.threads)
    shape = replace(case.shape, T=min(2, case.shape.T))
    short = replace(case, shape=shape, window=min(1, case.window))
    runs = [compete(SUITES[suite], each, "memory", setup).ways[way].run for each in (short, case)]
    return memory.measure(runs[1], runs[0], case.device)


def _layers(listed: tuple[Shape, ...], directions: int = 1, layers: int = 1) -> tuple[Case, ...]:
    return tuple(Case(cell, shape, directions, layers) for cell in LAYERS for shape in listed)


def _off_suite() -> tuple[Case, ...]:
    """Odd sizes all over the space; a guard against tuning to the list of ``suite``."""
    plain = shapes(
        "7,3,17,100",
        "7,200,64,321",
        "100,1,321,321",
        "2000,1,40,100",
        "300,7,100,100",
        "60,7,1000,1000",
        "33,200,77,160",
        "150,24,300,384",
        "20,3,1000,321",
        "80,50,48,48",
    )
    bidirectional, stacked = shapes("128,8,100,192"), shapes("64,24,128,200")
    return (
        *_layers(plain),
        *_layers(bidirectional, directions=2),
        *_layers(stacked, layers=2),
        *_layers(shapes("50,7,64,100"), directions=2, layers=2),
    )


def _cells() -> tuple[Case, ...]:
    listed = shapes("1,1,64,64", "1,1,256,256", "1,32,256,256")
    return tuple(Case(cell, shape) for cell in SINGLE_STEPS for shape in listed)


def _peak() -> tuple[Case, ...]:
    return _layers(shapes("128,32,256,256", "64,32,512,512", "64,128,512,512", "32,64,1024,1024"))


def _half_precision() -> tuple[Case, ...]:
    listed = shapes("64,1,128,128", "64,8,64,64", "35,16,128,128", "50,32,64,200")
    listed += shapes("128,32,256,256", "128,64,128,512")
    return tuple(
        replace(case, dtype=dtype) for dtype in ("bfloat16", "float16") for case in _layers(listed)
    )


def _gpu() -> tuple[Case, ...]:
    listed = shapes("512,1,256,256", "512,16,256,256", "512,64,512,512", "512,64,1024,1024")
    listed += shapes("512,128,1024,1024")
    return tuple(
        Case(cell, shape, directions)
        for cell in ("LSTM", "GRU")
        for directions in (1, 2)
        for shape in listed
    )


def _gpu_stacks() -> tuple[Case, ...]:
    return tuple(
        Case(cell, Shape(512, B, H, H), layers=layers)
        for cell in ("LSTM", "GRU")
        for layers, B, H in gpu_estimates.STACKS
    )


def _scaling() -> tuple[Case, ...]:
    """Along one axis at a time: ``variant`` names it."""
    found: list[Case] = []
    for cell in LAYERS:
        found += [
            Case(cell, Shape(64, 16, H, H), variant="H") for H in (32, 64, 128, 256, 512, 768)
        ]
        found += [Case(cell, Shape(T, 8, 128, 128), variant="T") for T in (16, 64, 256, 1024)]
        found += [Case(cell, Shape(64, B, 256, 256), variant="B") for B in (1, 4, 16, 64)]
        cores = device.cores()
        counts = sorted({2**i for i in range(int(math.log2(cores)) + 1)} | {cores})
        found += [
            Case(cell, Shape(128, 16, 256, 256), threads=n, variant="threads") for n in counts
        ]
    return tuple(found)


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "suite",
            "the eight shapes of the targets",
            lambda: _layers(SUITE),
            ("inference", "training", "memory"),
            floors=("gemm",),
            stacks=True,
        ),
        Suite(
            "off-suite",
            "other shapes, odd sizes, two directions, two layers",
            _off_suite,
            ("inference", "training"),
            stacks=True,
        ),
        Suite("cells", "RNNCell, LSTMCell and GRUCell", _cells, TIMED),
        Suite(
            "sequences",
            "the cost of lengths and resets, and loops over episodes",
            lambda: sequences.CASES,
            ("inference", "training"),
            compete=sequences.compete,
        ),
        Suite(
            "ragged",
            "rows of very unequal lengths",
            lambda: ragged.CASES,
            ("inference", "training"),
            compete=ragged.compete,
        ),
        Suite(
            "serving",
            "inference beside onnxruntime and OpenVINO: sequences and single steps",
            lambda: serving.CASES,
            ("inference",),
            ("inference",),
            serving.compete,
            devices=("cpu",),
        ),
        Suite(
            "serving-weights",
            "inference with packed weights in bfloat16, float16 and int8",
            lambda: serving.NARROW_CASES,
            ("inference",),
            ("inference",),
            serving.compete_narrow,
            devices=("cpu",),
        ),
        Suite(
            "concurrent",
            f"{concurrent.CALLERS} Python threads that run inference at once",
            lambda: concurrent.CASES,
            ("inference",),
            ("inference",),
            concurrent.compete,
            devices=("cpu",),  # a clock of the host
        ),
        Suite(
            "bfloat16",
            "layers of bfloat16 and float16",
            _half_precision,
            ("inference", "training"),
            stacks=True,
        ),
        Suite(
            "peak",
            "wide batches and states: the share of the rate of a large matrix product",
            _peak,
            ("training",),
            floors=("gemm",),
            stacks=True,
        ),
        Suite(
            "gpu",
            "long sequences on a GPU, one and two directions",
            _gpu,
            ("inference", "training"),
            floors=("gemm",),
            stacks=True,
            devices=("cuda",),
        ),
        Suite(
            "gpu-stacks",
            "stacks of layers of one direction on a GPU",
            _gpu_stacks,
            ("inference", "training"),
            floors=("gemm",),
            stacks=True,
            devices=("cuda",),
        ),
        Suite("scaling", "along H, T, B and threads", _scaling, ("inference", "training")),
        Suite(
            "breakdown",
            "the parts of an LSTM's time, beside their floors",
            lambda: breakdown.CASES,
            ("inference", "training"),
            ("inference", "training"),
            breakdown.compete,
            breakdown.finish,
            floors=("gemm", "copy"),
            repeats=15,
        ),
        Suite(
            "truncated",
            "truncated BPTT in one call, and a loop over chunks",
            lambda: truncated.CASES,
            ("training", "memory"),
            ("training", "memory"),
            truncated.compete,
            floors=("gemm",),
            window=truncated.WINDOW,
        ),
        Suite(
            "recompute",
            "gates computed again in backward: time and memory",
            lambda: recomputed.CASES,
            ("training", "memory"),
            ("training", "memory"),
            recomputed.compete,
            stacks=True,
            window=recomputed.EVERY,
        ),
        Suite(
            "derivatives",
            "derivatives of gradients, and torch.func.grad",
            lambda: derivatives.CASES,
            ("training",),
            ("training",),
            derivatives.compete,
        ),
        Suite(
            "written",
            "written cells and regularised layers beside loops in torch",
            lambda: written.CASES,
            ("training",),
            ("training",),
            written.compete,
            written.finish,
            devices=("cpu",),
        ),
        Suite(
            "flow",
            "the cost of recording gradients through time",
            lambda: flow.CASES,
            ("training",),
            ("training",),
            flow.compete,
            flow.finish,
            repeats=41,
        ),
    )
}
