"""The layers and cells as modules."""

from typing import TYPE_CHECKING

from rnnkernels._core import lazy
from rnnkernels.nn.cells import GRUCell, LSTMCell, RNNCell
from rnnkernels.nn.layers import GRU, LSTM, RNN

#: Of cells that are derived from their formulas as those of users are, once somebody wants one.
GATED = (
    "CIFG", "CIFGCell", "IndRNN", "IndRNNCell", "MGU", "MGUCell", "PeepholeLSTM",
    "PeepholeLSTMCell", "SLSTM", "SLSTMCell",
)  # fmt: skip

if TYPE_CHECKING:
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
else:
    __getattr__, __dir__ = lazy.attributes(__name__, {"rnnkernels.nn.gated": GATED})

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
