"""The noise of a call: of cells that draw, and of zoneout, which makes any cell one that does."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkernels import _ops, cells
from rnnkernels._core.compiling import constant_result
from rnnkernels._core.noise import new_draws
from rnnkernels.cells import CELLS, DefinedCell, find, stated, zoned_out


class Noise(NamedTuple):
    """What a call is told of it."""

    own: tuple[float, ...] = ()  # the probabilities of the cell itself
    zoneout: tuple[float, ...] = ()  # of each state; () is none
    training: bool = False  # else nothing is drawn

    @property
    def probabilities(self) -> tuple[float, ...]:
        return self.own + tuple(p for p in self.zoneout if p)

    @property
    def drawn(self) -> bool:
        return self.training and any(self.probabilities)

    def of_call(
        self, like: Tensor, B: int, rows: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The fields ``noise`` and ``draws`` of a call of B rows, whose numbers in the batch as the
        user has it are ``rows`` [B], or else as they come."""
        if not self.probabilities:
            return None, None
        noise = torch.tensor(self.probabilities, dtype=torch.float64, device=like.device)
        return noise, new_draws(B, like.device, rows) if self.drawn else None


NO_NOISE = Noise()


def known(cell: DefinedCell) -> DefinedCell:
    """The same cell, known by its name to all that runs calls."""
    cells.add(cell)
    _ops.register_cell(cell)
    return cell


@constant_result
def cell_of(name: str, zoned: tuple[bool, ...]) -> str:
    """The name of a cell with zoneout of these states."""
    return _cell_of(name, zoned) if any(zoned) else name


@cache
def _cell_of(name: str, zoned: tuple[bool, ...]) -> str:
    cell = stated(name) if name in CELLS else find(name)
    assert isinstance(cell, DefinedCell)
    return known(zoned_out(cell, zoned)).name
