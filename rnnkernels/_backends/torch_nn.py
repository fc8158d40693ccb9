"""torch.nn's own path (oneDNN, cuDNN, native loops) behind our interface, for comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _VF, Tensor

from rnnkernels._core.call import Call, Layer, LayerResult, Result, in_turn

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "rnn_tanh": _VF.rnn_tanh,
    "rnn_relu": _VF.rnn_relu,
    "lstm": _VF.lstm,
    "gru": _VF.gru,
}


def refusal(call: Call) -> str | None:
    """None where torch.nn can run this call, else the reason why not."""
    if call.cell_name not in _FUNCTIONS:
        return f"torch.nn has no cell {call.cell_name!r}"
    if call.lengths is not None and call.starts is None:
        return "torch.nn takes no lengths but of packed rows"
    if call.reset is not None:
        return "torch.nn takes no reset"
    if call.h_mask is not None:
        return "torch.nn has no recurrent dropout"
    if call.window:
        return "torch.nn does not truncate gradients"
    if call.clip != "none":
        return "torch.nn does not bound gradients inside the sequence"
    if call.flow is not None:
        return "torch.nn does not record the norms of its gradients"
    if call.all_states and call.c0 is not None:
        return "torch.nn does not return every c"
    if call.heads > 1:
        return "torch.nn has no heads"
    biases = len(call.weights) // (call.layers * call.directions) - 2 - call.projected
    if biases == 1:
        return "torch.nn has two biases or none"
    if call.T == 0:
        return "torch.nn takes no empty sequence"
    return None


def run(call: Call) -> Result:
    """Runs the layers one after the other through torch's own function."""
    return in_turn(call, _run_layer)


def _run_layer(call: Layer) -> LayerResult:
    weights: list[Tensor] = []
    for d in range(len(call.w_hh)):
        lists = (call.w_ih, call.w_hh, call.b_ih, call.b_hh, call.w_hr)
        weights += [tensors[d] for tensors in lists if tensors]
    hx = call.h0 if call.c0 is None else (call.h0, call.c0)
    options = (
        bool(call.b_ih),
        1,  # layers
        0.0,  # dropout
        torch.is_grad_enabled(),  # cuDNN keeps what backward needs only in training mode
        len(call.w_hh) == 2,
    )
    function = _FUNCTIONS[call.cell_name]
    if call.starts is None:
        y, *states = function(call.x, hx, weights, *options, False)  # batch_first
    else:
        y, *states = function(call.x, call.starts.diff().cpu(), hx, weights, *options)
    return LayerResult(y, states[0], states[1] if len(states) > 1 else None, None)
