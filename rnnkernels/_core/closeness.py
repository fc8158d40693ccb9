"""How far results are from what they should be."""

from __future__ import annotations

import math

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``max|actual - expected| / max|expected|`` in float64; 0 where both are equal, and infinite
    where ``actual`` has a NaN or infinity of its own.

    Raises:
        ValueError: the shapes differ.
    """
    differences, scale = errors(actual, expected)
    worst = float(differences.max()) if differences.numel() else 0.0
    if worst == 0.0:
        return 0.0
    return worst / scale if scale > 0 else math.inf


def errors(actual: Tensor, expected: Tensor) -> tuple[Tensor, float]:
    """The difference of each element in float64, and the greatest finite expected magnitude.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {list(actual.shape)} and {list(expected.shape)}")
    a, e = actual.detach().cpu().double(), expected.detach().cpu().double()
    same = (a == e) | (a.isnan() & e.isnan())
    found = (a - e).abs().nan_to_num(nan=math.inf).masked_fill(same, 0.0)
    magnitudes: Tensor = e[e.isfinite()].abs()
    return found, float(magnitudes.max()) if magnitudes.numel() else 0.0
