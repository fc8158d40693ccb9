"""The functions that cells of users are made of, in the compiled kernels: over all of float32, and
in float64; NaN and infinity as torch has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

import rnnkernels
from rnnkernels.cells import DefinedCell

pytest.importorskip("rnnkernels._C", reason="needs the compiled extension")


@rnnkernels.cell
def first(a: Any, b: Any, *, h: Any, c: Any) -> Any:
    return torch.exp(a), torch.log(b) + 0 * c


@rnnkernels.cell
def second(a: Any, b: Any, *, h: Any, c: Any) -> Any:
    return softplus(a), torch.sqrt(b) + 0 * c


@rnnkernels.cell
def third(a: Any, b: Any, *, h: Any, c: Any) -> Any:
    return torch.minimum(a, b), torch.maximum(a, b) + 0 * c


@rnnkernels.cell
def fourth(a: Any, b: Any, *, h: Any, c: Any) -> Any:
    return abs(a), torch.relu(b) + 0 * c


@rnnkernels.cell
def fifth(a: Any, b: Any, *, h: Any, c: Any) -> Any:
    return torch.where(a < b, 1.0, 2.0), torch.where(a == b, 1.0, torch.where(a >= b, 2.0, c))


def values(dtype: torch.dtype) -> Tensor:
    """Numbers of every size and sign, with what is special."""
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, 88.7, 88.73, -87.3, -103.9, -104.1]
    special += [20.0, 20.000002, 1e-45, 1.1754942e-38, 3.4028235e38, 709.9, -745.2]
    gen = torch.Generator().manual_seed(0)
    every = torch.randint(-(2**31), 2**31, (60_000,), generator=gen).to(torch.int32)
    usual = torch.randn(60_000, generator=gen, dtype=torch.float64) * 20
    found = torch.cat([torch.tensor(special, dtype=torch.float64), usual])
    return torch.cat([found.to(dtype), every.view(torch.float32).to(dtype)])


def by_rows(cell: DefinedCell, gate: int, values: Tensor) -> Tensor:
    """The state of a number that follows from the gate of that number, whose pre-activations these
    are: inputs of rows of one unit."""
    x = torch.zeros(1, len(values), 2, dtype=values.dtype)
    x[0, :, gate] = values
    weights = [[torch.eye(2, dtype=values.dtype), values.new_zeros(2, 1)]]
    _, states = rnnkernels.functional.layers(cell, x, None, weights, backend="cpu")
    return states[gate][0, :, 0]


def by_units(cell: DefinedCell, state: int, a: Tensor, b: Tensor) -> Tensor:
    """The same where both gates count: biases of the units of one row."""
    n = len(a)
    weights = [[a.new_zeros(2 * n, 1), a.new_zeros(2 * n, n), torch.cat([a, b])]]
    x = a.new_zeros(1, 1, 1)
    _, states = rnnkernels.functional.layers(cell, x, None, weights, backend="cpu")
    return states[state][0, 0]


def units_in_last_place(got: Tensor, want: Tensor) -> float:
    """The largest error, of those that are finite; others have to be the same."""
    want = want.to(torch.float64)
    rounded = want.to(got.dtype)
    finite = rounded.isfinite() & got.isfinite()
    torch.testing.assert_close(got[~finite], rounded[~finite], rtol=0, atol=0, equal_nan=True)
    size = torch.nextafter(rounded[finite].abs(), torch.tensor(torch.inf, dtype=got.dtype))
    unit = (size - rounded[finite].abs()).double()
    return float(((got[finite].double() - want[finite]) / unit).abs().max())


CASES: list[tuple[DefinedCell, int, Callable[[Tensor, Tensor], Tensor], float]] = [
    (first, 0, lambda a, b: torch.exp(a), 2),
    (first, 1, lambda a, b: torch.log(b), 2),
    (second, 0, lambda a, b: softplus(a), 3),
    (second, 1, lambda a, b: torch.sqrt(b), 0.5),
    (third, 0, torch.minimum, 0),
    (third, 1, torch.maximum, 0),
    (fourth, 0, lambda a, b: a.abs(), 0),
    (fourth, 1, lambda a, b: torch.relu(b), 0),
    (fifth, 0, lambda a, b: torch.where(a < b, 1.0, 2.0), 0),
    (fifth, 1, lambda a, b: torch.where(a == b, 1.0, torch.where(a >= b, 2.0, 0.0)), 0),
]
NAMES = ["exp", "log", "softplus", "sqrt", "minimum", "maximum", "abs", "relu", "less", "equal"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("cell", "state", "function", "most"), CASES, ids=NAMES)
def test_accuracy(
    cell: DefinedCell,
    state: int,
    function: Callable[[Tensor, Tensor], Tensor],
    most: float,
    dtype: torch.dtype,
) -> None:
    if cell in (third, fifth):
        a = values(dtype)[:240].repeat_interleave(2)
        b = values(dtype)[:240].flip(0).repeat_interleave(2).roll(1)
        got = by_units(cell, state, a, b)
    else:
        a = b = values(dtype)
        got = by_rows(cell, state, a)
    error = units_in_last_place(got, function(a.double(), b.double()))
    assert error <= (most if dtype == torch.float32 else max(most, 1))
