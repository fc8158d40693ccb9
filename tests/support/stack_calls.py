"""Calls of several layers: from layers to one call, its results by layer, and the layers one after
the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cases import make_call, random_like
from op_calls import FLOW, LENGTHS, X, run
from rnnkernels import _ops
from rnnkernels._core.call import ARGUMENTS, Call, Layer, LayerResult

kernels = torch.ops.rnnkernels


def make_calls(cell: str = "lstm", layers: int = 3, H: int = 5, **options: Any) -> list[Layer]:
    """The layers of a call, which share what is not a layer's own."""
    changes = {k: options.pop(k) for k in ("window", "clip") if k in options}
    first = make_call(cell, H=H, **options)._replace(number=0, **changes)
    seed = 100 * options.get("seed", 0)
    inputs = first.w_hh[0].size(1) * len(first.w_hh)
    upper = [
        make_call(cell, H=H, **options | {"inputs": inputs, "seed": seed + i})
        for i in range(1, layers)
    ]
    shared = {"lengths": first.lengths, "reset": first.reset, **changes}
    return [first, *(call._replace(number=i, **shared) for i, call in enumerate(upper, 1))]


def _of_all(tensors: Iterable[Tensor | None]) -> Tensor | None:
    """One behind the other, what each layer has of it; None where they have none."""
    return torch.cat(found) if (found := [t for t in tensors if t is not None]) else None


def joined(layers: Sequence[Layer], masks: Sequence[Tensor] = ()) -> Call:
    """The call of these layers."""
    calls = [layer.call() for layer in layers]
    return calls[0]._replace(
        layers=len(layers),
        weights=[w for call in calls for w in call.weights],
        h0=torch.cat([call.h0 for call in calls]),
        c0=_of_all(call.c0 for call in calls),
        masks=list(masks) or None,
        h_mask=_of_all(call.h_mask for call in calls),
        step=False,
    )


def leaves(layers: Sequence[Layer], masks: Sequence[Tensor] = ()) -> Call:
    """The call of these layers, whose states are leaves of their own."""
    call = joined(layers, masks)

    def leaf(t: Tensor | None) -> Any:
        return None if t is None else t.detach().requires_grad_(t.requires_grad)

    return call._replace(h0=leaf(call.h0), c0=leaf(call.c0))


def together(layers: Sequence[Layer], masks: Sequence[Tensor] = ()) -> list[LayerResult]:
    """What each layer of a call returns."""
    call = joined(layers, masks)._replace(all_states=True)
    result = _ops.run(call)
    assert result.h is not None
    found, D = [], call.directions
    for i, h in enumerate(result.h):
        rows = slice(i * D, (i + 1) * D)
        c_n = None if result.c_n is None else result.c_n[rows]
        c = result.c[i] if result.c is not None and layers[0].all_states else None
        y = result.y if i + 1 == call.layers else h.flatten(-2)
        found.append(LayerResult(y, result.h_n[rows], c_n, c))
    return found


def one_by_one(layers: Sequence[Layer], masks: Sequence[Tensor] = ()) -> list[LayerResult]:
    results: list[LayerResult] = []
    for n, layer in enumerate(layers):
        if n > 0:
            below = results[-1].y
            layer = layer._replace(x=below * masks[n - 1] if masks else below)
        results.append(run(layer))
    return results


def inputs_of(layers: Sequence[Layer]) -> list[Tensor]:
    """Every tensor that may get a gradient; x of upper layers is none."""
    return [*layers[0].tensors, *(t for layer in layers[1:] for t in layer.tensors[1:])]


def loss_of(results: Sequence[LayerResult], used: Sequence[int] = ()) -> Tensor:
    """A fixed random loss on the results of these numbers, or on all."""
    out = [t for result in results for t in result if t is not None]
    terms = [(t * g).sum() for t, g in zip(out, random_like(out), strict=True)]
    return torch.stack([terms[i] for i in used] if used else terms).sum()


def forward_arguments(
    layers: Sequence[Layer], masks: Sequence[Tensor] = (), *, save: bool = True
) -> list[Any]:
    """The arguments of ``sequence_forward``."""
    return list(joined(layers, masks)._replace(save=save)[:ARGUMENTS])


def backward_arguments(
    layers: Sequence[Layer],
    out: Sequence[Tensor],
    douts: Sequence[Tensor | None],
    masks: Sequence[Tensor] = (),
    *,
    record: bool = False,
) -> list[Any]:
    """The arguments of ``sequence_backward`` for what forward returned, and for the gradients of
    y, h_n, c_n, ys and c."""
    call = joined(layers, masks)
    y, _, _, ys, c, _, saved = (t.detach() for t in out)
    model = [w.detach() if isinstance(w, Tensor) else w for w in call[X + 1 : LENGTHS]]
    rows = call[LENGTHS:FLOW]
    return [*call[:X], *douts, *model, y, ys, c, saved, *rows, record, True, False]
