"""The layers and cells as modules."""

from rnnkernels.nn.cells import GRUCell, LSTMCell, RNNCell
from rnnkernels.nn.layers import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]
