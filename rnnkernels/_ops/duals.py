"""Tensors with their tangents, and sums and products of what may be zero."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

Maybe = Tensor | None


class Dual(NamedTuple):
    """A tensor and its tangent; None is zero."""

    value: Tensor
    tangent: Maybe = None


def joined(t: Dual) -> Tensor:
    """Both in one tensor of torch's forward mode."""
    if t.tangent is None:
        return t.value
    # Not forward_ad.make_dual, which first compiles what torch has for ops without a formula.
    found: Tensor = torch._VF._make_dual(t.value, t.tangent.expand_as(t.value), level=0)
    return found


def apart(t: Tensor) -> Dual:
    """The way back."""
    return Dual(*forward_ad.unpack_dual(t, level=0))  # type: ignore[no-untyped-call]


def total(*terms: Maybe) -> Maybe:
    """The sum of terms, each of which may be zero."""
    there = [t for t in terms if t is not None]
    return sum(there[1:], start=there[0]) if there else None


def product(a: Maybe, b: Maybe) -> Maybe:
    """a @ b, where either may be zero."""
    return None if a is None or b is None else a @ b


def over_steps(a: Maybe, b: Maybe) -> Maybe:
    """The sum over steps and rows of a^T b."""
    return product(
        None if a is None else a.flatten(0, 1).t(), None if b is None else b.flatten(0, 1)
    )


def or_zero(t: Maybe, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if t is None else t


def part(t: Maybe, *at: Any) -> Maybe:
    return None if t is None else t[at]
