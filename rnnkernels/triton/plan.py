"""How a layer is laid out over the programs of a Triton kernel: a pure function of its sizes."""

from __future__ import annotations

from dataclasses import dataclass

#: Registers of 4 bytes that a thread may spend on weights; of 255, the rest is for a step's values.
HELD_REGISTERS = 96
#: Rows, and units, of a program; what a warp of an m16n8 product takes.
ROWS = (16, 32, 64, 128)
ROWS_OF_WARP, UNITS_OF_WARP = 16, 8


@dataclass(frozen=True)
class Layout:
    """Of one pass over a layer.

    Attributes:
        kind: ``resident``: a program has all units of its rows; ``grid``: the programs of a block
            of rows wait for each other at every step; ``step``: one launch for every step.
        block_b, block_h, block_k: rows and units of a block, and units in one piece of a product.
        parts: programs for a block of rows.
        tiles: blocks of units of a program.
        held: the weights stay in registers; else they are read at every step.
        warps: of a program.
        row_blocks: blocks of rows of one launch; a layer takes as many launches as it needs.
    """

    kind: str
    block_b: int
    block_h: int
    block_k: int
    parts: int
    held: bool
    warps: int
    row_blocks: int

    def __str__(self) -> str:
        programs = f"{self.parts} program{'s' * (self.parts > 1)} per {self.block_b} rows"
        weights = "in registers" if self.held else "read at every step"
        return f"{self.kind}: {programs}, {self.warps} warps each, weights {weights}"


def choose(
    *, G: int, H: int, rows: int, D: int, itemsize: int, norm: bool, processors: int
) -> Layout:
    """The layout of a pass of G gates, `rows` rows in D directions, over so many multiprocessors.

    ``norm``: gradients are bounded by the norm of their row, which a resident program does not do.
    """
    block_h = 16 if H <= 16 else 32
    warps = max(2, block_h // UNITS_OF_WARP)

    def blocks(size: int, block: int) -> int:
        return -(-size // block)

    def held(units: int) -> bool:
        of_thread = G * blocks(H, block_h) * block_h * units * itemsize // (4 * 32 * warps)
        return of_thread <= HELD_REGISTERS

    tiles = blocks(H, block_h)
    if not norm and held(tiles * block_h):
        return Layout(
            "resident", ROWS[0], block_h, block_h, 1, tiles, True, warps, blocks(rows, ROWS[0])
        )
    block_k = 32 if held(block_h) else 64
    for block_b in ROWS[:-1]:
        groups = blocks(rows, block_b)
        if groups * tiles * D <= processors:
            return Layout(
                "grid", block_b, block_h, block_k, tiles, 1,
                held(block_h) and block_b == ROWS[0],  # more rows would multiply the registers
                warps * (1 if block_b == ROWS[0] else 2), groups,
            )  # fmt: skip
    together = processors // (tiles * D)
    block_b = ROWS[2]
    if together > 0:
        return Layout("grid", block_b, block_h, block_k, tiles, 1, False, 2 * warps, together)
    return Layout(
        "step", block_b, block_h, block_k, tiles, 1, False, 2 * warps, blocks(rows, block_b)
    )
