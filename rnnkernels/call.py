"""What one layer is asked to do: the arguments that every backend takes, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkernels.cells import CELLS, Cell


class Clip(NamedTuple):
    """How backward bounds the gradients of the gates' pre-activations at every step.

    The gradients g of ``gx`` and of ``gh``, ``[G*H]`` for each row, are bounded in the same way:

    ========= ==================================================================================
    kind      what becomes of g
    ========= ==================================================================================
    ``none``  ``g``
    ``value`` ``max(-bound, min(bound, g))``, elementwise (Graves 2013, section 2.1)
    ``norm``  ``g * min(1, bound / |dgx|)``, the norm over all gates of a row (Pascanu et al. 2013)
    ``tanh``  ``bound * tanh(g / bound)``, elementwise: smooth, and the identity for small g
    ========= ==================================================================================
    """

    kind: str = "none"
    bound: float = 1.0


NO_CLIP = Clip()


class Call(NamedTuple):
    """One layer over one sequence, both directions at once. Lists hold one tensor per direction."""

    cell_name: str
    x: Tensor  # [T, B, I]; packed: [N, I]
    w_ih: list[Tensor]  # [G*H, I] each
    w_hh: list[Tensor]  # [G*H, R] each
    b_ih: list[Tensor]  # [G*H] each; empty: no bias
    b_hh: list[Tensor]  # [G*H] each; empty: no bias
    w_hr: list[Tensor]  # [R, H] each; empty: no projection, R = H
    h0: Tensor  # [D, B, R]
    c0: Tensor | None  # [D, B, H] where the cell has a c
    lengths: Tensor | None  # [B] int64
    reset: Tensor | None  # [T, B] bool; packed: [N]
    all_c: bool = False  # return every c
    layer: int = -1  # for the names of parameters in errors; -1: a single cell
    window: int = 0  # no gradient crosses a boundary of windows of so many steps; 0: no windows
    clip: Clip = NO_CLIP
    flow: Callable[[Tensor], None] | None = None  # takes |dL/dh_t| [T, B, D] when backward has run
    stack: int = 1  # layers of its stack, if a backend may run all of them at once
    #: Of packed steps, without padding: rows stand longest first and none is empty, and of each
    #: step t only those that reach it, from place ``starts[t]`` on. [T + 1] int64.
    starts: Tensor | None = None
    #: Packed steps [N, ...] as [T, B, ...], with zeros for padding: for who looks on.
    padded: Callable[[Tensor], Tensor] | None = None

    @property
    def cell(self) -> Cell:
        return CELLS[self.cell_name]

    @property
    def T(self) -> int:
        return self.x.size(0) if self.starts is None else self.starts.size(0) - 1

    @property
    def B(self) -> int:
        return self.h0.size(1)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that a gradient may be asked for."""
        return [
            self.x,
            *self.w_ih,
            *self.w_hh,
            *self.b_ih,
            *self.b_hh,
            *self.w_hr,
            self.h0,
            *([] if self.c0 is None else [self.c0]),
        ]


def needs_gradient(tensors: Iterable[Tensor]) -> bool:
    """Whether a backward through these can come."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class Result(NamedTuple):
    """What a layer returns; packed, [N] takes the place of [T, B]."""

    y: Tensor  # [T, B, D*R]; zero past the end of a row
    h_n: Tensor  # [D, B, R]: the state at each row's own end
    c_n: Tensor | None  # [D, B, H]
    c: Tensor | None  # [T, B, D, H]: every c, if asked for
