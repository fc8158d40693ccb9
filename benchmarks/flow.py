"""What it costs to record gradients through time with ``rnnkernels.diagnostics.gradient_flow``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks import contest, providers
from benchmarks.cases import LAYERS, Case, shapes
from benchmarks.contest import Contest, Row, Setup, Way
from benchmarks.correctness import WrongResult
from benchmarks.problem import Inputs, Runner, ready
from rnnkernels.diagnostics import gradient_flow

CASES = tuple(
    Case(cell, shape) for cell in LAYERS for shape in shapes("128,32,256,256", "1024,8,256,256")
)


class Recorded(Runner):
    """A training step inside the block."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, module.parameters())
        self.module = module

    def gradients(self, inputs: Inputs) -> Sequence[Tensor]:
        with gradient_flow(self.module) as flow:
            found = super().gradients(inputs)
        assert len(flow.records) == 1
        return found


def compete(case: Case, mode: str, setup: Setup) -> Contest:
    """A training step with and without the record; gradients must stay the same to the bit."""
    problem = ready(case)
    module = providers.our_module(problem, setup.backends[0])
    plain, recorded = Runner(module, module.parameters()), Recorded(module)
    found = contest.of_runners(problem, mode, {"plain": plain, "recorded": recorded})

    def same_bits() -> float:
        a, b = (runner.results(problem.checked, grad=True) for runner in (plain, recorded))
        for name in a:
            if not torch.equal(a[name], b[name]):
                raise WrongResult(f"{name} changes where gradient_flow records it")
        return 0.0

    found.ways["recorded"] = Way(found.ways["recorded"].run, same_bits)
    return found


def finish(case: Case, mode: str, row: Row) -> None:
    """The cost is the median of the ratios of neighbours, less 1: it is far below the spread."""
    if mode == "training" and len(row["results"]) == 2:
        plain, recorded = (row["results"][name]["samples_ms"] for name in ("plain", "recorded"))
        ratios = [b / a for a, b in zip(plain, recorded, strict=True)]
        row["cost"] = statistics.median(ratios) - 1
