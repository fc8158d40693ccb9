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
from rnnkernels.cells.orders import places


class Operator(NamedTuple):
    """What ONNX has for a cell: its functions for each direction, other attributes."""

    name: str
    functions: tuple[str, ...]
    attributes: dict[str, int]


OPERATORS = {
    "rnn_tanh": Operator("RNN", ("Tanh",), {}),
    "rnn_relu": Operator("RNN", ("Relu",), {}),
    "rnn_sigmoid": Operator("RNN", ("Sigmoid",), {}),
    "lstm": Operator("LSTM", ("Sigmoid", "Tanh", "Tanh"), {}),
    # The reset gate takes its part after the recurrent product.
    "gru": Operator("GRU", ("Sigmoid", "Tanh"), {"linear_before_reset": 1}),
}


def refusal(call: Call) -> str | None:
    """None where ONNX can say what the call does, else what it cannot."""
    if call.cell_name not in OPERATORS:
        return f"none of them is the cell {call.cell_name}"
    if call.heads > 1:
        return "heads: none of them has recurrent weights in blocks"
    if call.reset is not None:
        return "reset: none of them sets the state back inside a sequence"
    if call.h_mask is not None:
        return "recurrent_dropout: none of them has it; export in eval mode"
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
    operator, D, H = OPERATORS[layer.cell_name], len(layer.w_hh), layer.w_hh[0].size(1)
    T, B = layer.x.shape[:2]
    gates = places(layer.cell_name, "onnx")
    initial = [layer.h0] if layer.c0 is None else [layer.h0, layer.c0]
    y, *states = torch.onnx.ops.symbolic_multi_out(
        operator.name,
        [
            layer.x,
            _ordered(layer.w_ih, gates),  # [D, G*H, I]
            _ordered(layer.w_hh, gates),  # [D, G*H, H]
            _biases(layer, gates),
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


def _ordered(weights: list[Tensor], gates: tuple[int, ...]) -> Tensor:
    """A weight or bias [G*H, ...] of each direction as one tensor, its gates in ONNX's order."""
    stacked = torch.stack(weights)  # [D, G*H, ...]
    if len(gates) == 1:
        return stacked
    H = stacked.size(1) // len(gates)
    rows = torch.tensor([gate * H + unit for gate in gates for unit in range(H)])
    return stacked.index_select(1, rows.to(stacked.device))


def _biases(layer: Layer, gates: tuple[int, ...]) -> Tensor | None:
    """[D, 2*G*H]: of each direction those of the input, then those of the state."""
    if not layer.b_ih:
        return None
    of_state = layer.b_hh or [torch.zeros_like(b) for b in layer.b_ih]
    return torch.cat([_ordered(layer.b_ih, gates), _ordered(of_state, gates)], dim=1)
