"""Calls small enough for a test whose layouts have what the exchange between blocks consists of:
several blocks that share weights, and several tiles of rows that take turns.

The plan alone would give calls of this size to one block. `tests/backends/test_cuda_plan.py` holds,
without a GPU, that they have what they are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from op_parity import ALL, CELLS, CLIPS, Case


@dataclass(frozen=True)
class Laid:
    """A call, and the layout that it is given."""

    case: Case
    units: int  # of a block
    tiles: int  # of a group of blocks
    batch: int = 1  # eights of rows in a tile
    layers: int = 1  # of a stack that runs at a time

    def __str__(self) -> str:
        layers = f"-{self.layers}layers" * (self.layers > 1)
        return f"{self.case}-u{self.units}t{self.tiles}b{self.batch}{layers}"


#: Numbers of blocks are powers of two, since clusters are; the last block lacks some units, and the
#: last tile some rows.
LAID = [
    *(Laid(Case(cell, 2, T=7, B=20, H=30, lengths=True, reset=True), 16, 2) for cell in CELLS),
    *(Laid(Case(cell, 1, T=9, B=45, H=61, I=20), 8, 3) for cell in ("lstm", "gru")),
    *(Laid(Case("lstm", 2, T=7, B=20, H=60, window=3, clip=clip, **ALL), 16, 2) for clip in CLIPS),
    *(Laid(Case("gru", 1, T=6, B=20, H=60, window=2, clip=clip), 16, 3, 2) for clip in CLIPS),
    Laid(Case("gru", 2, T=6, B=18, H=30, reset=True, packed=True, drop=True), 16, 2),
    Laid(Case("lstm", 1, T=200, B=33, H=122), 8, 2, 2),  # a cluster of 16, if there is one
]
STACKS = [
    *(Laid(Case(cell, T=9, B=20, H=30, lengths=True, reset=True), 16, 2, 1, 3) for cell in CELLS),
    Laid(Case("lstm", T=9, B=40, H=60, window=4, clip=CLIPS[1], drop=True), 16, 2, 2, 3),
]


@contextmanager
def laid_out(laid: Laid) -> Iterator[None]:
    """Within, plans have this layout."""
    from rnnkernels import _C

    _C.force_cuda_layout(laid.units, laid.tiles, laid.batch)
    try:
        yield
    finally:
        _C.force_cuda_layout(0, 0, 0)
