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

from rnnkernels.functional._spec import Spec


def weights(spec: Spec, every: Sequence[Tensor]) -> Sequence[Tensor]:
    """The flat list of weights with each W_hh as weight drop leaves it (Merity et al. 2018)."""
    if not spec.drops_weights:
        return every
    each, w_hh = len(every) // (spec.num_layers * spec.D), 1  # its place in torch's order
    return [F.dropout(w, spec.weight_drop) if i % each == w_hh else w for i, w in enumerate(every)]


def recurrent(spec: Spec, h0: Tensor) -> Tensor | None:
    """What recurrent dropout multiplies h by in front of W_hh, the same at all steps (Gal and
    Ghahramani 2016); like h0 [L*D, B, R]."""
    return F.dropout(torch.ones_like(h0), spec.recurrent_dropout) if spec.drops_states else None


def between(spec: Spec, x: Tensor) -> list[Tensor]:
    """What dropout multiplies the output of each layer but the last by; none where nothing falls
    out. In the order of layers, as torch.nn's layers draw."""
    if not spec.drops:
        return []
    ones = x.new_ones(*x.shape[:-1], spec.width)
    return [F.dropout(ones, spec.dropout) for _ in range(spec.num_layers - 1)]
