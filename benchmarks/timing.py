"""Times several ways to do the same, fairly: in turns, medians, checked against each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.cases import Pair


@dataclass(frozen=True)
class Comparison:
    """Medians in milliseconds, and the spread of each (between the quartiles, relative)."""

    torch_ms: float
    ours_ms: float
    torch_spread: float
    ours_spread: float

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.torch_ms / self.ours_ms


def forward(module: nn.Module, pair: Pair) -> torch.Tensor:
    with torch.no_grad():
        y: torch.Tensor = module(pair.x)[0]
    return y


def forward_backward(module: nn.Module, pair: Pair, **options: Any) -> list[torch.Tensor]:
    """One pass with fresh gradients of the input and of every parameter, which it returns."""
    y = module(pair.x, **options)[0]
    return list(torch.autograd.grad(y, [pair.x, *module.parameters()], pair.dy))


def check(pair: Pair, tolerance: float) -> None:
    """Holds outputs and gradients of both against each other; see :func:`agree`."""
    theirs = [forward(pair.theirs, pair), *forward_backward(pair.theirs, pair)]
    ours = [forward(pair.ours, pair), *forward_backward(pair.ours, pair)]
    agree(ours, theirs, tolerance)


def agree(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float) -> None:
    """Holds tensors against each other.

    Raises:
        AssertionError: some differ by more than ``tolerance``, relative to the largest value.
    """
    for a, b in zip(ours, theirs, strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        if not error <= tolerance:
            raise AssertionError(f"results differ by {error:.2e}, more than {tolerance:.0e}")


def compare(run: Callable[[nn.Module, Pair], object], pair: Pair, repeats: int) -> Comparison:
    """Times ``run`` on both, taking turns."""
    runs = [partial(run, module, pair) for module in (pair.theirs, pair.ours)]
    (theirs, their_spread), (ours, our_spread) = in_turns(runs, repeats)
    return Comparison(theirs, ours, their_spread, our_spread)


def in_turns(
    runs: Sequence[Callable[[], object]], repeats: int, prepare: Callable[[], object] | None = None
) -> list[tuple[float, float]]:
    """Times ``runs`` in turns after one run of each; the :func:`summary` of each in milliseconds.

    ``prepare`` comes before each, untimed.
    """
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, taken in zip(runs, times, strict=True):
            if prepare is not None:
                prepare()
            start = time.perf_counter()
            run()
            taken.append((time.perf_counter() - start) * 1e3)
    return [summary(taken[1:]) for taken in times]


def summary(times: list[float]) -> tuple[float, float]:
    """Median, and the distance between the quartiles relative to it."""
    low, median, high = statistics.quantiles(times, n=4)
    return median, (high - low) / median
