"""How a layer is laid out over the programs of a Triton kernel: a pure function of its sizes.

What a program takes was found by compiling every kernel for the GPUs named here and keeping what
leaves all values in registers; which of that runs fastest has not been measured.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """What one program takes: units, units in one piece of a product, warps."""

    units: int
    piece: int
    warps: int


@dataclass(frozen=True)
class Table:
    """For one kind of GPU and of products."""

    resident: dict[int, int]  # warps of a program that has all units of its rows, by their number
    held: int  # programs of 16 rows keep their weights in registers up to this hidden size,
    tile: Tile  # in this tile
    tiles: dict[int, Tile]  # of programs that read weights at every step, by their number of rows
    stages: int  # how far ahead a loop over weights reads
    # Programs may wait for each other. What Triton makes of a barrier for AMD does not keep the
    # stores of one wave before a signal that another gives.
    waits: bool = True


@dataclass(frozen=True)
class Layout:
    """Of one pass over a layer.

    A ``resident`` program has all units of its rows, or units that have nothing of each other; in
    a ``grid``, the programs of a block of rows wait for each other at every step; ``step`` is one
    launch for every step.
    """

    kind: str
    block_b: int  # rows of a program
    block_h: int  # units of a program
    block_k: int  # units in a piece of a product
    parts: int  # programs for a block of rows
    held: bool  # the weights stay in registers; else they are read at every step
    warps: int
    row_blocks: int  # of one launch; a layer takes as many launches as it needs
    stages: int = 2

    def __str__(self) -> str:
        programs = f"{self.parts} program{'s' * (self.parts > 1)} per {self.block_b} rows"
        weights = "in registers" if self.held else "read at every step"
        return f"{self.kind}: {programs}, {self.warps} warps each, weights {weights}"


@dataclass(frozen=True)
class Rows:
    """Of a step of a cell whose products are normalised: a program has all units of its rows, one
    block of them after the other."""

    block_b: int  # rows of a program
    block_h: int  # units in a block
    warps: int

    def programs(self, rows: int) -> int:
        return -(-rows // self.block_b)

    def __str__(self) -> str:
        rows = f"{self.block_b} row{'s' * (self.block_b > 1)}"
        return f"a program per {rows}, {self.warps} warps each"


def rows_of(H: int) -> Rows:
    """The layout of such steps for H units: two numbers of each kind to a thread."""
    block_h = min(256, 1 << (H - 1).bit_length())
    return Rows(min(16, 256 // block_h), block_h, 4)


ROWS = 16  # of a resident program
_HALF = Table({16: 4, 32: 4, 64: 8}, 128, Tile(32, 64, 4),
              {16: Tile(32, 64, 4), 32: Tile(16, 32, 4), 64: Tile(16, 32, 8)}, 3)  # fmt: skip
_TF32 = Table({16: 4, 32: 4, 64: 8}, 0, Tile(32, 32, 4),
              {16: Tile(32, 32, 4), 32: Tile(16, 32, 4), 64: Tile(16, 32, 8)}, 2)  # fmt: skip
_TF32X3 = Table({32: 8}, 0, Tile(32, 32, 4),
                {16: Tile(32, 32, 4), 32: Tile(16, 16, 4), 64: Tile(16, 16, 8)}, 2)  # fmt: skip
_IEEE = Table({16: 4}, 0, Tile(16, 16, 4),
              {16: Tile(16, 32, 4), 32: Tile(16, 16, 8), 64: Tile(16, 16, 8)}, 1)  # fmt: skip
_AMD = Table({16: 4}, 0, Tile(16, 32, 4), {rows: Tile(16, 32, 4) for rows in (16, 32, 64)}, 1,
             waits=False)  # fmt: skip
_CDNA_HALF = replace(_AMD, resident={16: 4, 32: 4})
_RDNA = replace(_AMD, tiles={16: Tile(16, 32, 4)})

#: By kind of GPU (NVIDIA, AMD's CDNA and RDNA) and of products: 16 bits, or how float32 is taken.
TABLES: dict[tuple[str, str], Table] = {
    ("cuda", "half"): _HALF,
    ("cuda", "tf32"): _TF32,
    ("cuda", "tf32x3"): _TF32X3,
    ("cuda", "ieee"): _IEEE,
    ("cdna", "half"): _CDNA_HALF,
    ("cdna", "tf32"): _AMD,
    ("cdna", "ieee"): _AMD,
    ("rdna", "half"): _AMD,
    ("rdna", "ieee"): _RDNA,
}
_RDNA_CROWDED = Table({}, 0, Tile(16, 16, 4), {16: Tile(16, 16, 4)}, 1, waits=False)
#: In their place where a program keeps, or reads at each step, more than an LSTM's has to.
CROWDED: dict[tuple[str, str], Table] = {
    ("cuda", "tf32x3"): replace(_TF32X3, tiles=_TF32X3.tiles | {16: Tile(32, 16, 4)}),
    ("rdna", "half"): _RDNA_CROWDED,
    ("rdna", "ieee"): _RDNA_CROWDED,
}


def choose(
    *,
    gpu: str,
    numbers: str,
    H: int,
    rows: int,
    D: int,
    norm: bool,
    processors: int,
    without: Collection[str] = (),
    recurrent: bool = True,
    crowded: bool = False,
) -> Layout:
    """The layout of one pass over `rows` rows in D directions, for H units.

    Args:
        gpu, numbers: a key of :data:`TABLES`.
        norm: gradients are bounded by the norm of their row, which a resident program does not do.
        processors: multiprocessors (compute units) of the device. Programs that wait for each
            other must all be there at once: one to each of these.
        without: kinds of layouts that are not to be taken; ``step`` is there for what no other
            takes.
        recurrent: the cell has recurrent weights; else no unit waits for others, but for a norm.
        crowded: the cell has more than two states, parameters of its own or noise, or there are
            factors of h.
    """
    table = TABLES[gpu, numbers]
    if crowded:
        table = CROWDED.get((gpu, numbers), table)
    block_h = next((units for units in sorted(table.resident) if units >= H), 0)
    if not recurrent:
        block_h = block_h or max(table.resident, default=16)
        if not norm and "resident" not in without:
            return Layout("resident", ROWS, block_h, block_h, -(-H // block_h), False,
                          table.resident.get(block_h, 4), -(-rows // ROWS),
                          table.stages)  # fmt: skip
    elif block_h and not norm and "resident" not in without:
        return Layout("resident", ROWS, block_h, block_h, 1, True, table.resident[block_h],
                      -(-rows // ROWS), table.stages)  # fmt: skip
    waits = table.waits and "grid" not in without
    for block_b in table.tiles:
        groups = -(-rows // block_b)
        held = block_b == ROWS and table.held >= H and not norm
        tile = table.tile if held else table.tiles[block_b]
        parts = -(-H // tile.units)
        together = processors // (parts * D) if waits else 0
        if together >= groups or (groups == 1 and not waits):
            break
    kind = "grid" if together else "step"
    return Layout(kind, block_b, tile.units, tile.piece, parts, held, tile.warps,
                  min(together, groups) or groups, table.stages)  # fmt: skip
