"""The calls of a stack of layers, the layers one after the other, and the arguments of its ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from cases import make_call, random_like
from torch import Tensor

from rnnkernels import ops
from rnnkernels.call import Call, Result


def make_calls(cell: str = "lstm", layers: int = 3, H: int = 5, **options: Any) -> list[Call]:
    """The calls of a stack, which share what is not a layer's own."""
    changes = {k: options.pop(k) for k in ("window", "clip") if k in options}
    first = make_call(cell, H=H, **options)._replace(layer=0, **changes)
    seed = 100 * options.get("seed", 0)
    upper = [
        make_call(cell, H=H, **options | {"inputs": H, "seed": seed + i}) for i in range(1, layers)
    ]
    shared = {"lengths": first.lengths, "reset": first.reset, **changes}
    return [first, *(call._replace(layer=i, **shared) for i, call in enumerate(upper, 1))]


def one_by_one(calls: Sequence[Call], masks: Sequence[Tensor] = ()) -> list[Result]:
    results: list[Result] = []
    for n, call in enumerate(calls):
        if n > 0:
            below = results[-1].y
            call = call._replace(x=below * masks[n - 1] if masks else below)
        results.append(ops.run(call))
    return results


def inputs_of(calls: Sequence[Call]) -> list[Tensor]:
    """Every tensor that may get a gradient; x of upper layers is none."""
    return [*calls[0].tensors, *(t for call in calls[1:] for t in call.tensors[1:])]


def loss_of(results: Sequence[Result], used: Sequence[int] = ()) -> Tensor:
    """A fixed random loss on the results of these numbers, or on all."""
    out = [t for result in results for t in result if t is not None]
    terms = [(t * g).sum() for t, g in zip(out, random_like(out), strict=True)]
    return torch.stack([terms[i] for i in used] if used else terms).sum()


def forward_arguments(
    calls: Sequence[Call], masks: Sequence[Tensor] = (), *, save: bool = True
) -> list[Any]:
    """The arguments of ``torch.ops.rnnkernels.stack_forward``."""
    first = calls[0]
    lists = [[w for c in calls for w in getattr(c, k)] for k in ("w_ih", "w_hh", "b_ih", "b_hh")]
    c0 = [c.c0 for c in calls if c.c0 is not None]
    options = save, first.all_c, first.window, *first.clip
    rows = first.lengths, first.starts, first.reset
    h0 = [c.h0 for c in calls]
    return [first.cell_name, first.x, *lists, h0, c0, list(masks), *rows, *options]


def backward_arguments(
    calls: Sequence[Call], out: Any, douts: list[list[Any]], masks: Sequence[Tensor] = ()
) -> list[Any]:
    """The arguments of ``stack_backward`` for what forward returned."""
    cell, _, w_ih, w_hh, _, _, h0, c0, between, *rows, _, _, window, clip, bound = (
        forward_arguments(calls, masks)
    )
    y, _, _, c, saved = out
    kept = w_ih[1:], w_hh, h0, c0, between, y, c, saved
    return [cell, *douts, *kept, *rows, window, clip, bound, True]
