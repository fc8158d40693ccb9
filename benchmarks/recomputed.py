"""What it costs to compute the gates again in backward, and the memory that it saves."""

from __future__ import annotations

from functools import partial

from benchmarks import contest, providers
from benchmarks.cases import LAYERS, Case, Shape
from benchmarks.contest import Contest, Setup
from benchmarks.problem import Runner, ready

#: States are kept every so many steps.
EVERY = 16

_SHAPE = Shape(1024, 16, 256, 256)
CASES = (
    *(Case(cell, _SHAPE, window=EVERY) for cell in LAYERS),
    Case("LSTM", _SHAPE, window=64),
    Case("LSTM", _SHAPE, directions=2, window=EVERY),
    Case("LSTM", _SHAPE, layers=2, window=EVERY),
)


def compete(case: Case, mode: str, setup: Setup) -> Contest:
    """A training step that keeps everything, and one that keeps the states of some steps."""
    problem = ready(case)
    module = providers.our_module(problem, setup.backends[0])
    runners = {
        "all kept": Runner(module, module.parameters()),
        "recompute": Runner(partial(module, recompute=case.window), module.parameters()),
    }
    return contest.of_runners(problem, mode, runners)
