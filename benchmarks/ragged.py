"""Rows of very unequal lengths: what padding costs, in time and in memory.

Input and output are padded ``[T, B, ...]``, as data comes and losses take it. ``tail``: one row of
T steps among others of one step each. ``sentences``: rows as long as the sentences of a real text
(the topics of Python's language reference, in characters). ``equal``: no padding at all.
"""

from __future__ import annotations

import re
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import contest, providers
from benchmarks.cases import LAYERS, Case, Shape
from benchmarks.contest import Contest, Setup
from benchmarks.problem import Results, Runner, ready
from benchmarks.sequences import packed

VARIANTS = {
    "tail": Shape(10000, 256, 16, 16),
    "sentences": Shape(512, 64, 128, 128),
    "equal": Shape(128, 32, 128, 128),
}

CASES = tuple(
    Case(cell, shape, variant=variant) for cell in LAYERS for variant, shape in VARIANTS.items()
)


def sentences(most: int, count: int) -> Tensor:
    """The lengths of so many sentences of a real text, of at most so many characters each."""
    text = " ".join(topics[name] for name in sorted(topics))
    found = (len(" ".join(part.split())) for part in re.split(r"(?<=[.!?])\s", text))
    lengths = [min(n, most) for n, _ in zip(filter(None, found), range(count), strict=False)]
    return torch.tensor(lengths)


def lengths_of(case: Case) -> Tensor:
    T, B = case.shape.T, case.shape.B
    if case.variant == "tail":
        return torch.tensor([T] + [1] * (B - 1))
    return sentences(T, B) if case.variant == "sentences" else torch.full((B,), T)


def compete(case: Case, mode: str, setup: Setup) -> Contest:
    """A PackedSequence on torch.nn against one on ours, and against ``lengths``."""
    problem = ready(case)
    theirs, ours = problem.template, providers.our_module(problem, setup.backends[0])
    lengths = lengths_of(case)
    calls: dict[str, tuple[nn.Module, Any]] = {
        "torch.nn packed": (theirs, partial(packed, theirs, lengths)),
        "packed": (ours, partial(packed, ours, lengths)),
        "lengths": (ours, partial(ours, lengths=lengths)),
    }

    def right(_: str) -> Results:
        exact, gradients = problem.exact_template, mode in ("training", "memory")
        call = partial(packed, exact, lengths)
        return Runner(call, exact.parameters()).results(problem.exact_inputs, gradients)

    runners = {name: Runner(call, who.parameters()) for name, (who, call) in calls.items()}
    return contest.of_runners(problem, mode, runners, right=right)
