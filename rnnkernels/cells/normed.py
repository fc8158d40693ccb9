"""Cells whose products are normalised (layer normalisation, Ba et al. 2016), as
``csrc/common/normed.h`` has them.

``W_ih x`` is normalised before such a cell runs: its x is the input part of the gates but for
``b_ih``, and its ``W_ih`` has no columns. Whoever runs a step normalises ``W_hh h``, hands it
on as ``gh``, and, where the cell emits, makes h of what it returns. A norm runs over all gates and
units, but for gates whose hidden part is kept apart, as n of a GRU, which have one for themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnkernels.cells.contract import Cell, Values
from rnnkernels.cells.gru import GRU
from rnnkernels.cells.lstm import LSTM

#: What is added to a variance, as in :class:`torch.nn.LayerNorm`.
EPSILON = 1e-5


def _forward_lstm(gx: Values, gh: Values, prev: Values) -> tuple[Values, Values]:
    (_, c), saved = LSTM.forward(gx, gh, prev)
    return [saved[3], c], saved


def _not_alone(*values: Values) -> tuple[Values, Values, Values]:
    raise NotImplementedError("a cell whose products are normalised has no backward of one unit")


def _no_tangents(*values: Values) -> Values:
    raise NotImplementedError("tangents of a cell whose products are normalised are autograd's")


def _normed(own: Cell, emits: bool) -> Cell:
    split = own.gates[own.G - own.A :]
    names = [f"scale_{g}" for g in own.gates] + [f"shift_{g}" for g in split]
    return Cell(
        f"layer_norm_{own.name}",
        own.gates,
        S=own.S,
        K=own.K - own.A + own.G,
        A=own.G,
        reads_h=own.reads_h,
        forward=_forward_lstm if emits else own.forward,
        backward=_not_alone,
        tangents=_no_tangents,
        alone=own.A,
        params=(*names, *(("scale_c", "shift_c") if emits else ())),
        normed=True,
        emits=emits,
    )


#: By name, in the order of ``NormedCells`` in ``csrc/common/cell_list.h``.
NORMED: dict[str, Cell] = {
    cell.name: cell for cell in (_normed(LSTM, emits=True), _normed(GRU, emits=False))
}


def normed_hidden(cell: Cell, product: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The hidden part of the gates from W_hh h [.., G*H]."""
    shifts = params[cell.G : cell.P - 2 * cell.emits]
    normed = torch.cat(
        [standardized(p) for p in torch.split(product, cell.groups(product.size(-1)), -1)], -1
    )
    gh = normed * torch.cat(list(params[: cell.G]))
    if not shifts:
        return gh
    shift = torch.cat(list(shifts))
    return gh + F.pad(shift, (gh.size(-1) - shift.size(0), 0))


def standardized(x: Tensor) -> Tensor:
    """With mean 0 and variance 1 along the last dimension."""
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


def emitted(values: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """h of what a cell that emits has returned."""
    slot, c = values
    weight, bias = params[-2:]
    return slot * torch.tanh(F.layer_norm(c, c.shape[-1:], weight, bias, EPSILON))
