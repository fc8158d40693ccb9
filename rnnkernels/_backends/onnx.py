"""Calls as operators of ONNX, for ``torch.onnx.export(..., dynamo=True)``.

While that exporter runs a model, this backend takes the place of the kernels: it puts ONNX's RNN,
GRU and LSTM into the program, one for each layer with both of its directions, through
``torch.onnx.ops``. The program then holds these operators, and no numbers.

Operators, their layouts and their order of gates:
https://onnx.ai/onnx/operators/onnx__LSTM.html, and likewise onnx__GRU and onnx__RNN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rnnkernels._core.call import Call, Layer, LayerResult, Result, in_turn


class _Operator(NamedTuple):
    """What ONNX has for a cell: its gates as indices among ours, its functions for each direction,
    other attributes."""

    name: str
    gates: tuple[int, ...]
    functions: tuple[str, ...]
    attributes: dict[str, int]


_OPERATORS = {
    "rnn_tanh": _Operator("RNN", (0,), ("Tanh",), {}),
    "rnn_relu": _Operator("RNN", (0,), ("Relu",), {}),
    "rnn_sigmoid": _Operator("RNN", (0,), ("Sigmoid",), {}),
    # i f g o becomes i o f g
    "lstm": _Operator("LSTM", (0, 3, 1, 2), ("Sigmoid", "Tanh", "Tanh"), {}),
    # r z n becomes z r n; the reset gate takes its part after the recurrent product
    "gru": _Operator("GRU", (1, 0, 2), ("Sigmoid", "Tanh"), {"linear_before_reset": 1}),
}


def refusal(call: Call) -> str | None:
    """None where ONNX can say what the call does, else what it cannot."""
    if call.cell_name not in _OPERATORS:
        return f"none of them is the cell {call.cell_name}"
    if call.reset is not None:
        return "reset: none of them sets the state back inside a sequence"
    if call.projected:
        return "proj_size: none of them has a projection"
    if call.all_states and call.c0 is not None:
        return "return_all_states: their LSTM gives the last c alone"
    return None


def run(call: Call) -> Result:
    """Writes the layers down, one after the other."""
    return in_turn(call, _layer)


def _layer(layer: Layer) -> LayerResult:
    """One layer, both directions at once. What bounds or cuts gradients leaves no trace."""
    operator, D, H = _OPERATORS[layer.cell_name], len(layer.w_hh), layer.w_hh[0].size(1)
    T, B = layer.x.shape[:2]
    initial = [layer.h0] if layer.c0 is None else [layer.h0, layer.c0]
    y, *states = torch.onnx.ops.symbolic_multi_out(
        operator.name,
        [
            layer.x,
            _ordered(layer.w_ih, operator),  # [D, G*H, I]
            _ordered(layer.w_hh, operator),  # [D, G*H, H]
            _biases(layer, operator),
            None if layer.lengths is None else layer.lengths.to(torch.int32),
            *initial,
        ],
        {
            "hidden_size": H,
            "direction": "forward" if D == 1 else "bidirectional",
            "activations": operator.functions * D,
            **operator.attributes,
        },
        dtypes=[layer.x.dtype] * (1 + len(initial)),
        shapes=[[T, D, B, H], *([D, B, H] for _ in initial)],
    )
    # torch's stand-ins for the results are on the CPU, whatever the device of the program.
    y, *states = (t.to(layer.x.device) for t in (y, *states))
    if layer.lengths is not None:  # ONNX does not say what the state of an empty row is
        empty = (layer.lengths == 0)[:, None]  # [B, 1]
        states = [torch.where(empty, *pair) for pair in zip(initial, states, strict=True)]
    return LayerResult(y.transpose(1, 2).flatten(2), states[0], (*states, None)[1], None)


def _ordered(weights: list[Tensor], operator: _Operator) -> Tensor:
    """A weight or bias [G*H, ...] of each direction as one tensor, its gates in ONNX's order."""
    stacked = torch.stack(weights)  # [D, G*H, ...]
    if len(operator.gates) == 1:
        return stacked
    H = stacked.size(1) // len(operator.gates)
    rows = torch.tensor([gate * H + unit for gate in operator.gates for unit in range(H)])
    return stacked.index_select(1, rows.to(stacked.device))


def _biases(layer: Layer, operator: _Operator) -> Tensor | None:
    """[D, 2*G*H]: of each direction those of the input, then those of the state."""
    if not layer.b_ih:
        return None
    of_state = layer.b_hh or [torch.zeros_like(b) for b in layer.b_ih]
    return torch.cat([_ordered(layer.b_ih, operator), _ordered(of_state, operator)], dim=1)
