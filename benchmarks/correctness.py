"""Whether a result may be timed: the tolerances, in one place, and the comparison."""

from __future__ import annotations

import torch

from benchmarks.cases import Case
from benchmarks.problem import Results
from rnnkernels._backends import float32
from rnnkernels.testing import relative_error

#: Largest difference to the same in float64, relative to the greatest magnitude. Wide enough for
#: thousands of steps of anybody's arithmetic in that dtype, too narrow for a wrong formula.
TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "tf32": 5e-3, "float16": 2e-2, "bfloat16": 1e-1}


class WrongResult(Exception):
    """A result is too far from the right one to be timed."""


def arithmetic(case: Case) -> str:
    """What :data:`TOLERANCE` is chosen by: the dtype, or what a GPU may compute in its place."""
    tf32 = float32.tf32_allowed(torch.float32) or float32.tf32_in_matmul()
    return "tf32" if case.device == "cuda" and case.dtype == "float32" and tf32 else case.dtype


def largest_error(found: Results, right: Results, kind: str) -> float:
    """The largest relative error of all results in arithmetic of a ``kind``.

    Raises:
        WrongResult: it is above the tolerance, a result is missing, or has another shape.
    """
    if list(found) != list(right):
        raise WrongResult(f"expected {', '.join(right)}; got {', '.join(found)}")
    worst = 0.0
    for name, value in found.items():
        if value.shape != right[name].shape:
            raise WrongResult(
                f"{name}: expected shape {list(right[name].shape)}, got {list(value.shape)}"
            )
        error = relative_error(value, right[name])
        if not error <= TOLERANCE[kind]:
            raise WrongResult(
                f"{name} is off by {error:.1e} of its greatest magnitude, where {kind} may be "
                f"off by {TOLERANCE[kind]:.0e}"
            )
        worst = max(worst, error)
    return worst
