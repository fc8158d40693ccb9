"""Tensors with their tangents, and sums and products of what may be zero."""

from __future__ import annotations

from collections.abc import Sequence
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
    # A tangent that does not lie as its tensor is copied, into zeros as large as all the memory
    # that the tensor is a part of: so both get memory of their own.
    value, tangent = _alone(t.value), _alone(t.tangent.expand_as(t.value))
    # Not forward_ad.make_dual, which first compiles what torch has for ops without a formula.
    found: Tensor = torch._VF._make_dual(value, tangent, level=0)
    return found


def _alone(t: Tensor) -> Tensor:
    """The same in memory that holds nothing else; what torch.func.jvp wraps has none."""
    if torch._C._functorch.is_functorch_wrapped_tensor(t):
        return t
    whole = t.untyped_storage().nbytes() == t.numel() * t.element_size()
    return t if whole and t.is_contiguous() else t.clone(memory_format=torch.contiguous_format)


def filled(t: Dual) -> Dual:
    """The same with zeros for a tangent that is zero."""
    return t if t.tangent is not None else Dual(t.value, torch.zeros_like(t.value))


def apart(t: Tensor) -> Dual:
    """The way back."""
    return Dual(*forward_ad.unpack_dual(t, level=0))  # type: ignore[no-untyped-call]


def total(*terms: Maybe) -> Maybe:
    """The sum of terms, each of which may be zero."""
    there = [t for t in terms if t is not None]
    return sum(there[1:], start=there[0]) if there else None


def product(a: Maybe, w: Maybe) -> Maybe:
    """a [.., K] times w [K, N], where either may be zero."""
    if a is None or w is None:
        return None
    if not _takes_ours(a, w):
        return a @ w
    found: Tensor = torch.ops.rnnkernels.rows_product(a.flatten(0, -2), w)
    return found.view(*a.shape[:-1], w.size(1))


def over_steps(*pairs: tuple[Maybe, Maybe]) -> Maybe:
    """The sum over steps and rows, and pairs, of a^T b, of a [T, B, M] and b [T, B, N]."""
    there = [
        (a.flatten(0, 1), b.flatten(0, 1)) for a, b in pairs if a is not None and b is not None
    ]
    if not there:
        return None
    if not all(_takes_ours(*pair) for pair in there):
        return total(*(a.t() @ b for a, b in there))
    found: Tensor = torch.ops.rnnkernels.steps_product(*map(list, zip(*there, strict=True)))
    return found


def _takes_ours(*factors: Tensor) -> bool:
    """Whether products of this project take these; what torch.func.jvp wraps goes to torch's."""
    return all(
        t.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        for t in factors
    )


def beside(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Tensors side by side in a new dimension; one alone as it lies."""
    return torch.stack(list(parts), dim) if len(parts) > 1 else parts[0].unsqueeze(dim)


def or_zero(t: Maybe, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if t is None else t


def part(t: Maybe, *at: Any) -> Maybe:
    return None if t is None else t[at]
