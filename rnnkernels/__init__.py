"""Fused RNN, LSTM and GRU layers for PyTorch: drop-in for torch.nn, on hand-written kernels."""

from typing import TYPE_CHECKING

from rnnkernels import functional, nn
from rnnkernels._backends import (
    batch_invariant,
    is_batch_invariant,
    set_batch_invariant,
    use_backend,
)
from rnnkernels._backends.vetting import verification
from rnnkernels._core import lazy
from rnnkernels._ops import build_info, library_path
from rnnkernels.cells import bernoulli, per_unit
from rnnkernels.functional import AllStates
from rnnkernels.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from rnnkernels.nn import tracing as _tracing
from rnnkernels.nn.defined import cell, cell_class, layer

if TYPE_CHECKING:
    from rnnkernels import diagnostics, interop, serving, streaming, torch_types
    from rnnkernels.diagnostics import explain, verify
    from rnnkernels.interop import convert, convertible, from_torch, revert, to_torch
    from rnnkernels.nn import (
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
    __getattr__, __dir__ = lazy.attributes(
        __name__,
        {
            "rnnkernels.diagnostics": (),
            "rnnkernels.interop": (),
            "rnnkernels.serving": (),
            "rnnkernels.streaming": (),
            "rnnkernels.testing": (),
            "rnnkernels.torch_types": (),
            "rnnkernels.diagnostics._choices": ("explain",),
            "rnnkernels.diagnostics._verify": ("verify",),
            "rnnkernels.interop._conversion": ("convert", "from_torch", "revert", "to_torch"),
            "rnnkernels.interop._survey": ("convertible",),
            "rnnkernels.nn.gated": nn.GATED,
        },
    )
    _tracing.to_torch = lambda module: __getattr__("to_torch")(module)

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
