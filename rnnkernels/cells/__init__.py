"""The cells, a file for each family; ``contract`` says what one is."""

from rnnkernels.cells.contract import Cell, Values
from rnnkernels.cells.elman import RNN_RELU, RNN_SIGMOID, RNN_TANH
from rnnkernels.cells.gru import GRU
from rnnkernels.cells.lstm import LSTM

#: Every cell, by name, in the order of ``AllCells`` in ``csrc/common/cells.h``.
CELLS: dict[str, Cell] = {cell.name: cell for cell in (RNN_TANH, RNN_RELU, RNN_SIGMOID, LSTM, GRU)}

__all__ = ["CELLS", "Cell", "Values"]
