"""Layers whose products are normalised (layer normalisation), above every backend.

What is known of all steps at once is done for all of them at once, in torch operations: ``W_ih x``
and its norm. A backend is then asked for one layer at a time, of a cell that normalises what is
left (:mod:`rnnkernels.cells.normed`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnkernels._core import checks
from rnnkernels._core.call import Call, LayerWeights, Result, of_steps
from rnnkernels.cells import find
from rnnkernels.cells.normed import NORMED
from rnnkernels.functional._normed_input import input_part


def parameters(cell: str, hidden_size: int) -> dict[str, tuple[int]]:
    """The shapes of the parameters of the norms of a layer and direction, in the order in which
    they stand behind its weights."""
    own = find(cell)
    sizes = {"ih": own.G * hidden_size, "hh": own.G * hidden_size}
    if NORMED[_name(cell)].emits:
        sizes["c"] = hidden_size
    return {
        f"{kind}_norm_{place}": (size,)
        for place, size in sizes.items()
        for kind in ("weight", "bias")
    }


def fill(name: str, parameter: Tensor) -> None:
    """Sets the initial numbers of one, as :class:`torch.nn.LayerNorm` does."""
    with torch.no_grad():
        parameter.fill_(float(name.startswith("weight")))


def takes(cell: str) -> bool:
    """Whether there is a cell like this whose products are normalised."""
    return _name(cell) in NORMED


def _name(cell: str) -> str:
    return f"layer_norm_{cell}"


class Norms(NamedTuple):
    """The parameters of the norms of one layer and direction: weight and bias of each."""

    ih: Sequence[Tensor]  # [G*H] each
    hh: Sequence[Tensor]  # [G*H] each
    c: Sequence[Tensor]  # [H] each, where c is normalised

    @classmethod
    def of(cls, call: Call, own: Sequence[Tensor], number: int, d: int) -> Norms:
        """From the last of a layer's weights, which have been checked then."""
        shapes = parameters(call.cell_name, call.H)
        norms = own[len(own) - len(shapes) :]
        for (name, shape), t in zip(shapes.items(), norms, strict=True):
            checks.parameter(checks.parameter_name(name, number, d), t, shape, call.x)
        return cls(norms[:2], norms[2:4], norms[4:])


def run(call: Call, run_layer: Callable[[Call], Result]) -> Result:
    """Runs a call of a cell as it is without norms, whose weights have those of the norms behind
    each layer and direction; ``run_layer`` runs a call of one layer."""
    D, x = call.directions, call.x
    results: list[Result] = []
    for index in range(call.layers):
        groups = [_group(call, x, index, d) for d in range(D)]
        states = slice(index * D, (index + 1) * D)
        gx = [g for g, _ in groups]
        results.append(
            run_layer(
                call._replace(
                    cell_name=_name(call.cell_name),
                    layers=1,
                    first=index,
                    x=gx[0] if D == 1 else torch.cat(gx, -1),
                    weights=[w for _, own in groups for w in own],
                    h0=call.h0[states],
                    c0=None if call.c0 is None else call.c0[states],
                    h_mask=None if call.h_mask is None else call.h_mask[states],
                    masks=None,
                )
            )
        )
        x = results[-1].y
        if call.masks and index + 1 < call.layers:
            x = x * of_steps(call.masks[index], call.starts, x.size(0))
    if len(results) == 1:
        return results[0]

    def each(name: str) -> list[Tensor] | None:
        lists = [getattr(r, name) for r in results]
        return None if lists[0] is None else [t for some in lists for t in some]

    h_n = torch.cat([r.h_n for r in results])
    c_n = [r.c_n for r in results if r.c_n is not None]
    return Result(x, h_n, torch.cat(c_n) if c_n else None, each("h"), each("c"))


def _group(call: Call, x: Tensor, index: int, d: int) -> tuple[Tensor, list[Tensor]]:
    """The input part of the gates of one layer and direction [.., G*H], and what the normed cell
    takes as its weights."""
    cell, each = call.cell, len(call.weights) // (call.layers * call.directions)
    own = call.weights[(index * call.directions + d) * each :][:each]
    number = -1 if call.step else index
    norms = Norms.of(call, own, number, d)
    w = LayerWeights.from_list(own[: len(own) - sum(map(len, norms))], call.projected)
    rows, split = cell.G * call.H, cell.A * call.H
    R = call.h0.size(2)
    shapes = (rows, x.size(-1)), (rows, R), (rows,), (rows,), (R, call.H)
    for name, shape, t in zip(checks.WEIGHT_NAMES, shapes, w[:5], strict=True):
        if t is not None:
            checks.parameter(checks.parameter_name(name, number, d), t, shape, call.x)
    # What is added to the hidden part of a gate that is not split may be added to its input part.
    shift = norms.hh[1] if w.b_hh is None else norms.hh[1] + w.b_hh
    bias = norms.ih[1] if w.b_ih is None else norms.ih[1] + w.b_ih
    bias = bias + (F.pad(shift[: rows - split], (0, split)) if split else shift)
    normed = find(_name(call.cell_name))
    gx = input_part(x, w.w_ih, norms.ih[0], normed.groups(rows))
    scales = norms.hh[0].chunk(cell.G)
    shifts = shift[rows - split :].chunk(cell.A) if split else ()
    nothing = w.w_ih.new_empty(rows, 0)
    assert w.w_hh is not None
    projection = () if w.w_hr is None else (w.w_hr,)
    return gx, [nothing, w.w_hh, bias, *projection, *scales, *shifts, *norms.c]
