"""The cells, a file for each family; ``contract`` says what one is."""

import importlib

from rnnkernels.cells.contract import Cell, Values
from rnnkernels.cells.definition import DefinedCell, define, zoned_out
from rnnkernels.cells.elman import RNN_RELU, RNN_SIGMOID, RNN_TANH
from rnnkernels.cells.gru import GRU
from rnnkernels.cells.lstm import LSTM
from rnnkernels.cells.noise import bernoulli
from rnnkernels.cells.normed import NORMED
from rnnkernels.cells.parameters import per_unit
from rnnkernels.cells.statements import stated

#: Every cell there is, by name, in the order of ``AllCells`` in ``csrc/common/cell_list.h``.
CELLS: dict[str, Cell] = {cell.name: cell for cell in (RNN_TANH, RNN_RELU, RNN_SIGMOID, LSTM, GRU)}

_written: dict[str, DefinedCell] = {}


def find(name: str) -> Cell:
    """The cell of this name: one of :data:`CELLS` or :data:`NORMED`, or one that a user wrote.

    Raises:
        ValueError: there is none.
    """
    found = CELLS.get(name) or _written.get(name) or NORMED.get(name)
    if found is None and "-" in name:
        make_own_known()
        found = _written.get(name)
    if found is None:
        written = "It was written with rnnkernels.cell: import the module that defines it first"
        known = f"Expected one of {', '.join(CELLS)}"
        raise ValueError(
            f"cell: {name!r} is not known in this process. {written if '-' in name else known}"
        )
    return found


def make_own_known() -> None:
    """Derives the cells of this package that are written as users write theirs: importing it leaves
    that to whoever first uses one, by its class or, in a program that was exported, by its name."""
    importlib.import_module("rnnkernels.nn.gated")


def add(cell: DefinedCell) -> None:
    """Makes a cell known by its name, which says what it computes.

    Raises:
        ValueError: another one has the name.
    """
    if _written.setdefault(cell.name, cell).cpp != cell.cpp:
        raise ValueError(f"cell: {cell.name!r} is another cell already. Rename the function")


__all__ = [
    "CELLS",
    "NORMED",
    "Cell",
    "DefinedCell",
    "Values",
    "add",
    "bernoulli",
    "define",
    "find",
    "make_own_known",
    "per_unit",
    "stated",
    "zoned_out",
]
