"""How results are compared: one measure of error and one table of tolerances, for the tests of
this package and for users who check their own device or build.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkernels._core.closeness import errors as _differences
from rnnkernels._core.closeness import relative_error

__all__ = ["RTOL", "TERMS", "assert_close", "relative_error", "rounded", "tolerance"]

#: Number of terms that the longest sum behind a compared number may have under :data:`RTOL`.
#: Rounding errors of a sum grow with the square root of its terms, and so do tolerances above it.
TERMS = 4096

#: Tolerances relative to the greatest magnitude in the expected tensor, for sums of TERMS terms.
RTOL: dict[torch.dtype, float] = {
    # 2^-53 * sqrt(4096) = 7e-15; a hundred times as much for the growth of errors over many steps,
    # in which both sides take part: the reference is of this precision too.
    torch.float64: 1e-12,
    # 2^-24 * sqrt(4096) = 3.8e-6, plus a few 2^-24 for exp and tanh.
    torch.float32: 5e-6,
    # The kernels add up in float32 and round what they store, once per step: some roundings of
    # 2^-11 and 2^-8, whatever the number of terms.
    torch.float16: 8 * 2**-11,
    torch.bfloat16: 8 * 2**-8,
}


def tolerance(dtype: torch.dtype, terms: int = TERMS) -> float:
    """The relative tolerance for results of this dtype behind which sums of ``terms`` terms stand.

    Raises:
        KeyError: a dtype that is not in :data:`RTOL`.
    """
    return RTOL[dtype] * math.sqrt(max(1.0, terms / TERMS))


def assert_close(
    actual: Any,
    expected: Any,
    *,
    name: str = "result",
    rtol: float | None = None,
    terms: int = TERMS,
) -> float:
    """Asserts that ``actual`` is within the tolerance of its dtype around ``expected``.

    Args:
        actual: a tensor; None; or a sequence of such, nested at will.
        expected: the same from a reference, best in float64.
        name: of the compared thing, for the message.
        rtol: overrides :func:`tolerance` of the dtype of ``actual`` and ``terms``.
        terms: number of terms of the longest sum behind each number.

    Returns:
        The greatest share of the tolerance that was used up, from 0 to 1.

    Raises:
        AssertionError: naming tensor, worst index, both values and the share of the tolerance
            that the difference uses up.

    Example::

        assert_close(lstm(x), reference(x.double()), name="lstm")
    """
    if isinstance(actual, (tuple, list)) and isinstance(expected, Sequence):
        assert len(actual) == len(expected), f"{name}: {len(actual)} parts, not {len(expected)}"
        pairs = enumerate(zip(actual, expected, strict=True))
        shares = [
            assert_close(a, e, name=f"{name}[{i}]", rtol=rtol, terms=terms) for i, (a, e) in pairs
        ]
        return max(shares, default=0.0)
    if actual is None or expected is None:
        assert actual is expected, f"{name}: {_kind(actual)} where {_kind(expected)} is expected"
        return 0.0
    assert actual.shape == expected.shape, (
        f"{name}: shape {list(actual.shape)} where {list(expected.shape)} is expected"
    )
    budget = tolerance(actual.dtype, terms) if rtol is None else rtol
    error = relative_error(actual, expected)
    share = error / budget if budget > 0 else (0.0 if error == 0 else math.inf)
    if share <= 1:
        return share
    errors, scale = _differences(actual, expected)
    index = tuple(int(i) for i in torch.unravel_index(errors.argmax(), errors.shape))
    raise AssertionError(
        f"{name}{list(index)}: {actual[index].item()!r} where {expected[index].item()!r} is "
        f"expected; off by {error:.3g} of the greatest magnitude {scale:.3g}, "
        f"{share:.3g} times the tolerance {budget:.3g} for {actual.dtype}; "
        f"{int((errors > budget * scale).sum())} of {errors.numel()} elements are outside"
    )


def _kind(value: object) -> str:
    return "None" if value is None else "a tensor"


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What a weight [rows, columns] is once ``rnnkernels.serving.prepack(weight_dtype=dtype)`` has
    packed it, in its own dtype.

    In int8, each row is multiples of the 127th part of its greatest magnitude, to nearest, ties to
    even; a row with a value that is not finite is NaN.
    """
    if dtype is not torch.int8:
        return weight.to(dtype).to(weight.dtype)
    greatest = weight.abs().amax(1, keepdim=True)
    scale = (greatest / 127).clamp_min(torch.finfo(weight.dtype).tiny)
    scale = scale.masked_fill(~greatest.isfinite(), torch.nan)
    return (weight / scale).round() * scale
