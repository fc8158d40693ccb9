"""Fused RNN, LSTM and GRU layers for PyTorch: drop-in for torch.nn, on hand-written kernels."""

from rnnkernels import diagnostics, functional, interop, nn, serving, streaming, torch_types
from rnnkernels._backends import (
    batch_invariant,
    is_batch_invariant,
    set_batch_invariant,
    use_backend,
)
from rnnkernels._backends.vetting import verification
from rnnkernels._ops import build_info, library_path
from rnnkernels.cells import bernoulli, per_unit
from rnnkernels.diagnostics import explain, verify
from rnnkernels.functional import AllStates
from rnnkernels.interop import convert, convertible, from_torch, revert, to_torch
from rnnkernels.nn import (
    CIFG,
    GRU,
    LSTM,
    MGU,
    RNN,
    SLSTM,
    CIFGCell,
    GRUCell,
    IndRNN,
    IndRNNCell,
    LSTMCell,
    MGUCell,
    PeepholeLSTM,
    PeepholeLSTMCell,
    RNNCell,
    SLSTMCell,
)
from rnnkernels.nn.defined import cell, cell_class, layer

__version__ = "0.1.0"

__all__ = [
    "CIFG",
    "GRU",
    "LSTM",
    "MGU",
    "RNN",
    "SLSTM",
    "AllStates",
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
    "batch_invariant",
    "bernoulli",
    "build_info",
    "cell",
    "cell_class",
    "convert",
    "convertible",
    "diagnostics",
    "explain",
    "from_torch",
    "functional",
    "interop",
    "is_batch_invariant",
    "layer",
    "library_path",
    "nn",
    "per_unit",
    "revert",
    "serving",
    "set_batch_invariant",
    "streaming",
    "to_torch",
    "torch_types",
    "use_backend",
    "verification",
    "verify",
]
