"""The layers and cells as modules."""

from rnnkernels.nn.cells import GRUCell, LSTMCell, RNNCell
from rnnkernels.nn.gated import (
    CIFG,
    MGU,
    SLSTM,
    CIFGCell,
    IndRNN,
    IndRNNCell,
    MGUCell,
    PeepholeLSTM,
    PeepholeLSTMCell,
    SLSTMCell,
)
from rnnkernels.nn.layers import GRU, LSTM, RNN

__all__ = [
    "CIFG",
    "GRU",
    "LSTM",
    "MGU",
    "RNN",
    "SLSTM",
    "CIFGCell",
    "GRUCell",
    "IndRNN",
    "IndRNNCell",
    "LSTMCell",
    "MGUCell",
    "PeepholeLSTM",
    "PeepholeLSTMCell",
    "RNNCell",
    "SLSTMCell",
]
