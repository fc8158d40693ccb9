"""Cells of operations that are drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch.nn import functional as F

import rnnkernels
from rnnkernels.cells import DefinedCell

ONE: dict[str, Callable[[Any], Any]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": lambda x: torch.exp(torch.clamp(x, max=3)),
    "log": lambda x: torch.log(1 + x * x),
    "sqrt": lambda x: torch.sqrt(0.5 + torch.square(x)),
    "relu": torch.relu,
    "abs": abs,
    "softplus": F.softplus,
    "power": lambda x: (1.5 + torch.sigmoid(x)) ** 2.3,
    "inverse": lambda x: 1 / (2 + abs(x)),
    "cube": lambda x: torch.tanh(x) ** 3,
    "neg": lambda x: -x,
    "scale": lambda x: 0.7 * x - 0.2,
    "above": lambda x: torch.clamp(x, min=-0.3),
}
TWO: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / (1.5 + torch.sigmoid(b)),
    "min": torch.minimum,
    "max": torch.maximum,
    "where": lambda a, b: torch.where(a > b, a * b, 0.3 * b),
    "step": lambda a, b: torch.where(a <= 0.1, 1.0, 0.25) * b,
    "same": lambda a, b: torch.where(a == b, a, a + b),
}
#: Operations on the values so far: which, and of which of them.
Plan = list[tuple[str, int, int]]


def run_plan(plan: Plan, values: list[Any]) -> list[Any]:
    for name, i, j in plan:
        a, b = values[-1 - i % len(values)], values[-1 - j % len(values)]
        values.append(ONE[name](a) if name in ONE else TWO[name](a, b))
    return values


def cell_of(plan: Plan, gates: int, states: int, split: bool) -> DefinedCell:
    """A cell of random operations, which uses every gate and state."""

    def combine(given: list[Any], prev: list[Any]) -> Any:
        last = given[-1]
        parts = [last.x * torch.sigmoid(last.h)] if split else []
        values = run_plan(plan, [*prev, *given, *parts])
        total = sum(0.1 * v for v in [*given, *prev[1:]])
        results = [torch.tanh(values[-1]) + total]
        results += [values[-1 - len(plan) // (k + 2)] + total for k in range(states - 1)]
        return tuple(results) if states > 1 else results[0]

    scope: dict[str, Any] = {"combine": combine}
    names = [f"g{i}" for i in range(gates)]
    of_states = ["h", "c", "n", "m"][:states]
    exec(
        f"def drawn({', '.join(names)}, *, {', '.join(of_states)}):\n"
        f"    return combine([{', '.join(names)}], [{', '.join(of_states)}])",
        scope,
    )
    return rnnkernels.cell(scope["drawn"])


def of_seed(seed: int) -> DefinedCell:
    """Twelve operations."""
    draw = Random(seed)
    names = [*ONE, *TWO]
    plan = [(draw.choice(names), draw.randrange(1000), draw.randrange(1000)) for _ in range(12)]
    return cell_of(plan, draw.randint(2, 8), draw.randint(1, 4), draw.random() < 0.5)
