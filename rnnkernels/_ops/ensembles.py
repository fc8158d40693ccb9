"""Lanes of ``torch.vmap`` with weights of their own, as heads of one layer.

Models that read the same input are what a layer of as many heads is: their states stand side by
side, and the weights of a direction have the rows of one behind those of another. So a dimension
that has what each direction has, [D*heads, ..], is [D*lanes*heads, ..] in the call of all lanes;
to weights, and to outputs in which directions are merged, that is as if D were 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rnnkernels._ops import freed
from rnnkernels._ops.schema import FIRST_WEIGHT, INPUTS
from rnnkernels.cells import find

#: The dimension that has what each direction has; from the end, as packed steps leave out one.
OF_DIRECTIONS = {
    "h0": -3, "c0": -3, "h_mask": -3, "h_n": -3, "c_n": -3, "dh_n": -3, "dc_n": -3,
    "c": -2, "dc": -2, "saved": -2,
    "y": -1, "dy": -1, "ys": -1, "dys": -1,
}  # fmt: skip
#: What heads have in common.
SHARED = ("x", "lengths", "starts", "reset")


def are_heads(a: SimpleNamespace, dims: SimpleNamespace) -> bool:
    """Whether lanes are heads of one layer: of an only layer that reads the same in all of them.
    Not on GPUs, whose kernels for all steps of a layer take no heads."""
    # An exported graph has the call of a lane, and none of the views that a rule takes.
    if torch.compiler.is_exporting():
        return False
    fits = a.layers == 1 and not a.projected and a.noise is None and not find(a.cell).normed
    # The gradient of x would be a sum over heads, where each lane has its own.
    fits = fits and INPUTS.index("x") not in getattr(a, "wanted", ())
    return fits and a.x.device.type == "cpu" and all(getattr(dims, s) is None for s in SHARED)


def as_heads(a: SimpleNamespace, dims: SimpleNamespace, n: int) -> Iterator[Any]:
    """The arguments of one call of all lanes."""
    for name, value in vars(a).items():
        dim = getattr(dims, name)
        if name == "heads":
            yield value * n
        elif name == "weights":
            pairs = zip(value, dim, strict=True)
            yield [_together(w, d, 0, 1, n) for w, d in pairs]
        elif name in OF_DIRECTIONS and value is not None:
            dims_of_lane = value.dim() - (dim is not None)
            if dims_of_lane == 1:  # it was not kept
                yield value if dim is None else value.select(dim, 0)
            else:
                place = OF_DIRECTIONS[name] + dims_of_lane
                yield _together(value, dim, place, _directions(name, a), n)
        else:
            yield value


def of_lanes(name: str, t: Tensor, a: SimpleNamespace, n: int) -> tuple[Tensor, int | None]:
    """A result of that call with the lanes in a dimension of their own, and which it is."""
    if t.dim() == 1:  # it was not kept
        return t, None
    return _apart(t, OF_DIRECTIONS[name] + t.dim(), _directions(name, a), n)


def gradient_of_lanes(
    position: int, t: Tensor, a: SimpleNamespace, n: int, inner: bool
) -> tuple[Tensor, int]:
    """The same of the gradient with this number; that of a weight may have lanes of an inner vmap
    in front."""
    of_state = position < FIRST_WEIGHT
    return _apart(t, 0, a.directions, n) if of_state else _apart(t, int(inner), 1, n)


def show_freed(results: Sequence[Tensor]) -> None:
    """Of all lanes these are freed together, with what a loss and its gradients take."""
    if all(type(t) is Tensor for t in results):  # a graph is to have no part of it
        freed.show(4 * sum(t.nbytes for t in results))


def _directions(name: str, a: SimpleNamespace) -> int:
    """How many a dimension has: y is that of both where they are merged."""
    merged = name in ("y", "dy") and a.merge_mode != "concat"
    return 1 if merged else int(a.directions)


def _together(t: Tensor, dim: int | None, place: int, directions: int, n: int) -> Tensor:
    """[.., D*m, ..] of lanes in dimension ``dim`` (None: all have the same) as [.., D*n*m, ..];
    ``place`` counts the dimensions of a lane."""
    if dim is None:
        t, dim = t.expand(n, *t.shape), 0
    at = place + (dim <= place)
    m = t.size(at) // directions
    if directions > 1:
        t = t.reshape(*t.shape[:at], directions, m, *t.shape[at + 1 :])
        dim += dim > at
        at += 1
    to = at - (dim < at)
    if dim != to:
        t = t.movedim(dim, to)
    first = to - (directions > 1)
    return t.reshape(*t.shape[:first], directions * n * m, *t.shape[to + 2 :])


def _apart(t: Tensor, place: int, directions: int, n: int) -> tuple[Tensor, int]:
    """[.., D*n*m, ..] as [.., D*m, ..] of each lane, and the dimension of the lanes."""
    before, after = t.shape[:place], t.shape[place + 1 :]
    m = t.size(place) // (directions * n)
    if directions == 1:
        return t.reshape(*before, n, m, *after), place
    parts = t.reshape(*before, directions, n, m, *after).movedim(place + 1, 0)
    return parts.reshape(n, *before, directions * m, *after), 0
