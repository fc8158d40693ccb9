"""Fused RNN, LSTM and GRU layers for PyTorch: drop-in for torch.nn, on hand-written kernels."""

from rnnkernels import diagnostics, functional, streaming, torch_types
from rnnkernels.backends import (
    batch_invariant,
    is_batch_invariant,
    set_batch_invariant,
    use_backend,
)
from rnnkernels.cell_modules import GRUCell, LSTMCell, RNNCell
from rnnkernels.convert import convert, from_torch, revert, to_torch
from rnnkernels.explain import explain
from rnnkernels.modules import GRU, LSTM, RNN
from rnnkernels.ops import build_info
from rnnkernels.stack import AllStates
from rnnkernels.survey import convertible

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AllStates",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "batch_invariant",
    "build_info",
    "convert",
    "convertible",
    "diagnostics",
    "explain",
    "from_torch",
    "functional",
    "is_batch_invariant",
    "revert",
    "set_batch_invariant",
    "streaming",
    "to_torch",
    "torch_types",
    "use_backend",
]
