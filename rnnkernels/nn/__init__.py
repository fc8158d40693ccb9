"""The layers and cells as modules."""

from rnnkernels.nn.cells import GRUCell, LSTMCell, RNNCell
from rnnkernels.nn.gated import (
    CIFG,
    MGU,
    CIFGCell,
    MGUCell,
    PeepholeLSTM,
    PeepholeLSTMCell,
)
from rnnkernels.nn.layers import GRU, LSTM, RNN

__all__ = [
    "CIFG",
    "GRU",
    "LSTM",
    "MGU",
    "RNN",
    "CIFGCell",
    "GRUCell",
    "LSTMCell",
    "MGUCell",
    "PeepholeLSTM",
    "PeepholeLSTMCell",
    "RNNCell",
]
