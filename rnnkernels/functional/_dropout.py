"""What falls out in training: the masks of a call, drawn from torch's generator before it runs.

They are tensors of torch's own dropout, so its seed, its rule under ``torch.vmap``
(``randomness=``) and its place in a compiled graph are theirs, and every backend is given the same.
A number that stays is divided by ``1 - p``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnkernels._core.call import of_steps
from rnnkernels.functional._spec import Spec


def weights(spec: Spec, every: Sequence[Tensor]) -> Sequence[Tensor]:
    """The flat list of weights with each W_hh as weight drop leaves it (Merity et al. 2018)."""
    if not spec.drops_weights:
        return every
    each, w_hh = len(every) // (spec.num_layers * spec.D), 1  # its place in torch's order
    return [
        F.dropout(w, spec.weight_drop) if i % each == w_hh and w.is_floating_point() else w
        for i, w in enumerate(every)
    ]


def recurrent(spec: Spec, h0: Tensor) -> Tensor | None:
    """What recurrent dropout multiplies h by in front of W_hh, the same at all steps (Gal and
    Ghahramani 2016); like h0 [L*D, B, R]."""
    return F.dropout(torch.ones_like(h0), spec.recurrent_dropout) if spec.drops_states else None


def inputs(spec: Spec, x: Tensor, h0: Tensor, starts: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """x as dropout leaves it, and the masks between layers: of :func:`between`, and of variational
    dropout, whose masks of every layer's input are the same at all steps (Gal and Ghahramani 2016).
    """
    masks = between(spec, x)
    if not spec.drops_inputs:
        return x, masks
    sizes = [spec.input_size, *[spec.width] * (spec.num_layers - 1)]
    ones = (h0.new_ones(1, h0.size(1), size) for size in sizes)
    first, *upper = [F.dropout(each, spec.input_dropout) for each in ones]
    if masks:
        upper = [m * of_steps(u, starts, x.size(0)) for m, u in zip(masks, upper, strict=True)]
    return x * of_steps(first, starts, x.size(0)), upper


def between(spec: Spec, x: Tensor) -> list[Tensor]:
    """What dropout multiplies the output of each layer but the last by; none where nothing falls
    out. In the order of layers, as torch.nn's layers draw."""
    if not spec.drops:
        return []
    ones = x.new_ones(*x.shape[:-1], spec.width)
    return [F.dropout(ones, spec.dropout) for _ in range(spec.num_layers - 1)]
