"""In which order other frameworks keep the gates of a cell."""

from __future__ import annotations

from rnnkernels.cells import find

#: Gates by our names (:attr:`rnnkernels.cells.Cell.gates`), in the order of each framework. The g
#: of an LSTM is called c in ONNX and Keras, the n of a GRU h. A cell of one gate has one order.
#:
#: * onnx: https://onnx.ai/onnx/operators/onnx__LSTM.html (iofc), onnx__GRU.html (zrh)
#: * keras: https://keras.io/api/layers/recurrent_layers/ (``LSTMCell.call``, ``GRUCell.call``)
#: * flax: https://flax.readthedocs.io, ``flax.nnx.OptimizedLSTMCell`` and ``flax.nnx.GRUCell``
ORDERS: dict[str, dict[str, str]] = {
    "onnx": {"lstm": "iofg", "gru": "zrn"},
    "keras": {"lstm": "ifgo", "gru": "zrn"},
    "flax": {"lstm": "ifgo", "gru": "rzn"},
}


def places(cell: str, framework: str) -> tuple[int, ...]:
    """For each gate in the framework's order, its place among ours."""
    ours = find(cell).gates
    return tuple(ours.index(gate) for gate in ORDERS[framework].get(cell, ours))
