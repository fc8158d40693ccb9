"""The arguments of the ops by name, and which dimension of them has the rows of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch


def arguments(op: str, values: Sequence[Any]) -> SimpleNamespace:
    """The arguments of an op by the names that its schema has for them."""
    return SimpleNamespace(**dict(zip(_names(op), values, strict=True)))


@cache
def _names(op: str) -> list[str]:
    return [a.name for a in getattr(torch.ops.rnnkernels, op).default._schema.arguments]


#: Where an argument or result [T, B, ...] has its rows; packed, [N] takes the place of [T, B].
OF_STEPS = {
    "x": 1, "y": 1, "dy": 1, "masks": 1, "reset": 1,
    "ys": 2, "dys": 2, "c": 2, "dc": 2, "h_raw": 2, "saved": 2,
}  # fmt: skip
#: The same of what has rows and no steps.
OF_ROWS = {
    "h0": 1, "c0": 1, "h_mask": 1, "h_n": 1, "c_n": 1, "dh_n": 1, "dc_n": 1, "lengths": 0,
    "draws": 0,
}  # fmt: skip
#: What gradients are asked for by number; the weights follow.
INPUTS = ("x", "h0", "c0")
FIRST_WEIGHT = len(INPUTS)
#: What gradients depend on besides, in the order of a further derivative, in front of those.
OUTPUT_GRADIENTS = ("dy", "dh_n", "dc_n", "dys", "dc")


def rows_of(name: str, packed: bool) -> int | None:
    """The dimension of the rows; None for what has none: weights, settings, starts."""
    if name in OF_STEPS:
        return OF_STEPS[name] - packed
    return OF_ROWS.get(name)


def rows_of_mask(dimensions: int) -> int:
    """The same of a mask between layers: [T, B, ...], packed [N, ...], or [1, B, ...]."""
    return dimensions - 2


def rows_of_gradient(position: int, packed: bool) -> int | None:
    """The same of the gradient with this number; None for that of a weight."""
    return rows_of(INPUTS[position], packed) if position < FIRST_WEIGHT else None
