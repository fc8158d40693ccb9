"""Weights of ONNX's operators RNN, LSTM and GRU, and ours.

Layouts, formulas and attributes: https://onnx.ai/onnx/operators/onnx__LSTM.html, and likewise
onnx__GRU and onnx__RNN. What our layers become when torch.onnx.export runs a model stands in
:mod:`rnnkernels._backends.onnx`, whose table of operators is used here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rnnkernels._backends.onnx import OPERATORS, Operator
from rnnkernels.cells import find
from rnnkernels.interop._layers import Reversed
from rnnkernels.interop._weights import (
    RESET_BEFORE,
    Array,
    Weights,
    array,
    from_order,
    gates_of,
    module_of,
    pair,
    to_order,
    weights_of,
)

#: Inputs by their place.
_INPUTS = {
    "RNN": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
    "GRU": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
    "LSTM": ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"),
}
#: Of attributes, in which field of a message the value stands.
_FIELDS = {
    "activations": "strings",
    "clip": "f",
    "direction": "s",
    "hidden_size": "i",
    "input_forget": "i",
    "layout": "i",
    "linear_before_reset": "i",
}
#: Without meaning for tanh, sigmoid and relu, or for what a node computes.
_IGNORED = ("activation_alpha", "activation_beta", "output_sequence")
_DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}
_CELLS: dict[str, Operator] = {
    **OPERATORS,
    RESET_BEFORE: OPERATORS["gru"]._replace(attributes={"linear_before_reset": 0}),
}


@dataclass(frozen=True)
class OnnxLayer:
    """What :func:`from_onnx` made of a node; call ``found.module(x, found.hx,
    lengths=found.lengths)``.

    Attributes:
        module: a layer of ours; a :class:`Reversed` for ``direction="reverse"``.
        hx: the initial states that the model holds, as ``module`` takes them; None for zeros.
        lengths: the lengths ``[B]`` that the model holds; None for none.
        dynamic: which of ``sequence_lens``, ``initial_h`` and ``initial_c`` are values of the graph
            instead, by name; whoever calls ``module`` passes them on.
    """

    module: nn.Module
    hx: Tensor | tuple[Tensor, Tensor] | None = None
    lengths: Tensor | None = None
    dynamic: dict[str, str] = field(default_factory=dict)


class OnnxWeights(NamedTuple):
    """A layer of ours as ONNX has it, for ``onnx.helper.make_node(op_type, ["X", "W", "R", "B"],
    outputs, **attributes)``.

    Attributes:
        op_type: ``'RNN'``, ``'GRU'`` or ``'LSTM'``.
        W: ``[D, G*H, I]``.
        R: ``[D, G*H, H]``.
        B: ``[D, 2*G*H]``, biases of the input, then those of the state; None without biases.
        attributes: ``hidden_size``, ``direction``, ``activations``, ``linear_before_reset``.
    """

    op_type: str
    W: Array
    R: Array
    B: Array | None
    attributes: dict[str, Any]


def from_onnx(
    source: Any, initializers: Mapping[str, Any] | None = None, *, name: str | None = None
) -> OnnxLayer:
    """A layer of ours with the weights of a node RNN, GRU or LSTM of ONNX.

    Args:
        source: an ``onnx.NodeProto``; or an ``onnx.ModelProto``, in which the node is looked up.
        initializers: for a node: the arrays that its inputs name, by name: W ``[D, G*H, I]``,
            R ``[D, G*H, H]``, B ``[D, 2*G*H]``, gates in ONNX's order, i o f c or z r h; and where
            there are any sequence_lens ``[B]``, initial_h and initial_c ``[D, B, H]``
            (``[B, D, H]`` with ``layout=1``), P ``[D, 3H]`` of zeros.
        name: for a model: the name of the node, or of one of its outputs; None where the model has
            a single one.

    Returns:
        An :class:`OnnxLayer`. Its module is batch_first with ``layout=1``. ONNX's Y
        ``[T, D, B, H]`` is ``y.unflatten(-1, (D, H)).movedim(-2, 1)`` of our output
        ``[T, B, D*H]``.

    Raises:
        TypeError: ``source`` is something else, or ``initializers`` do not go with it; arrays that
            are not floating point, or of several dtypes.
        ValueError: another operator; an attribute that computes something else, such as ``clip``,
            ``input_forget`` or ``activations``; peepholes P that are not zero; W, R or B that are
            no constants; arrays of a wrong shape; an unknown or ambiguous ``name``.

    Example::

        found = rnnkernels.interop.from_onnx(onnx.load("model.onnx"), name="/encoder/LSTM")
        y, (h_n, c_n) = found.module(x, found.hx, lengths=found.lengths)
    """
    if hasattr(source, "graph"):
        if initializers is not None:
            raise TypeError("initializers: expected None beside a model, which brings its own")
        source, initializers = _node_of(source.graph, name)
    elif not hasattr(source, "op_type"):
        raise TypeError(
            "source: expected an onnx.NodeProto or onnx.ModelProto, got "
            f"{type(source).__name__}. Load a file with onnx.load"
        )
    elif name is not None:
        raise TypeError(f"name: expected None beside a node, got {name!r}; it goes with a model")
    if initializers is None:
        raise TypeError("initializers: expected the arrays by name beside a node, got None")
    if source.op_type not in _INPUTS:
        known = ", ".join(_INPUTS)
        raise ValueError(f"source: expected one of the operators {known}, got {source.op_type}")
    attributes = _attributes(source)
    cell = _cell(source.op_type, attributes)
    inputs = dict(zip(_INPUTS[source.op_type], source.input, strict=False))
    named = {role: value for role, value in inputs.items() if value}
    return _layer(cell, attributes, named, initializers)


def to_onnx_weights(module: nn.Module, layer: int | None = None) -> OnnxWeights:
    """One of our layers as ONNX has it.

    ``torch.onnx.export`` writes whole models; this is for graphs that are built by hand.

    Args:
        module: an RNN, LSTM or GRU, layer or cell, a :class:`GRUResetBefore` or a
            :class:`Reversed`.
        layer: which layer of a stack, from 0; None where there is one.

    Raises:
        TypeError: ``module`` is something else.
        ValueError: a stack without ``layer``; ``proj_size``; another cell than these.

    Example::

        w = rnnkernels.interop.to_onnx_weights(rnnkernels.GRU(8, 16))
        node = onnx.helper.make_node(w.op_type, ["X", "W", "R", "B"], ["Y"], **w.attributes)
    """
    cell, directions = weights_of(module, layer)
    operator, D = _CELLS[cell], len(directions)
    direction = "bidirectional" if D == 2 else "forward"
    B = None
    if directions[0].b_ih is not None:
        B = np.stack(
            [np.concatenate([to_order(b, cell, "onnx") for b in pair(w)]) for w in directions]
        )
    return OnnxWeights(
        operator.name,
        np.stack([to_order(w.w_ih, cell, "onnx") for w in directions]),
        np.stack([to_order(w.w_hh, cell, "onnx") for w in directions]),
        B,
        {
            "hidden_size": directions[0].w_hh.shape[1],
            "direction": "reverse" if isinstance(module, Reversed) else direction,
            "activations": list(operator.functions * D),
            **operator.attributes,
        },
    )


def _node_of(graph: Any, name: str | None) -> tuple[Any, dict[str, Any]]:
    """A node of a graph, and those of its inputs that are constants, by name."""
    from onnx import numpy_helper

    nodes = [node for node in graph.node if node.op_type in _INPUTS]
    found = [n for n in nodes if name is None or name == n.name or name in n.output]
    if len(found) != 1:
        known = ", ".join(f"{n.op_type} {n.name or n.output[0]!r}" for n in nodes) or "none"
        raise ValueError(
            f"name: expected that of one of the model's nodes RNN, GRU and LSTM ({known}), got "
            f"{name!r}, which is that of {len(found)}"
        )
    constants = {t.name: t for t in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                constants[node.output[0]] = attribute.t
    used = {value for value in found[0].input if value in constants}
    return found[0], {value: numpy_helper.to_array(constants[value]) for value in used}


def _attributes(node: Any) -> dict[str, Any]:
    found = {}
    for attribute in node.attribute:
        if attribute.name in _IGNORED:
            continue
        if attribute.name not in _FIELDS:
            known = ", ".join(_FIELDS)
            raise ValueError(
                f"source: expected a node with attributes among {known}, got {attribute.name}"
            )
        value = getattr(attribute, _FIELDS[attribute.name])
        if attribute.name == "activations":
            value = [text.decode() for text in value]
        found[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return found


def _cell(op_type: str, attributes: dict[str, Any]) -> str:
    """The cell that a node computes; an error where that is none of ours."""
    direction = attributes.setdefault("direction", "forward")
    if direction not in _DIRECTIONS:
        known = ", ".join(map(repr, _DIRECTIONS))
        raise ValueError(f"direction: expected one of {known}, got {direction!r}")
    if "clip" in attributes:
        raise ValueError(
            f"clip: expected a node without, got {attributes['clip']:g}: it bounds the sums of "
            "every gate, which the kernels do not. Take the attribute off where nothing reaches "
            "the bound"
        )
    if attributes.get("input_forget"):
        raise ValueError(
            "input_forget: expected 0, got 1, coupled input and forget gates (CIFG), which are "
            "another cell than rnnkernels.LSTM"
        )
    D = _DIRECTIONS[direction]
    after = int(attributes.get("linear_before_reset", 0) != 0)
    cells = {
        cell: operator
        for cell, operator in _CELLS.items()
        if operator.name == op_type
        and operator.attributes.get("linear_before_reset", after) == after
    }
    given = tuple(f.capitalize() for f in attributes.get("activations", ()))
    for cell, operator in cells.items():
        if given in ((), operator.functions * D):
            return cell  # the first is the operator's default
    known = " or ".join(str(list(operator.functions * D)) for operator in cells.values())
    raise ValueError(
        f"activations: expected {known} for {op_type}, got {attributes['activations']}, which the "
        "kernels have not. A cell of your own may have them: rnnkernels.cell"
    )


def _layer(
    cell: str, attributes: dict[str, Any], named: dict[str, str], arrays: Mapping[str, Any]
) -> OnnxLayer:
    D, G = _DIRECTIONS[attributes["direction"]], find(gates_of(cell)).G
    first = bool(attributes.get("layout", 0))

    def constant(role: str, *shape: int | None) -> Array | None:
        if role not in named:
            return None
        if named[role] not in arrays:
            raise ValueError(
                f"{role}: expected an initializer, got the value {named[role]!r}, which is none of "
                f"them ({', '.join(sorted(map(str, arrays))) or 'there are none'}). Where the "
                "graph computes it, have an optimizer of ONNX fold its constants first"
            )
        return array(role, arrays[named[role]], shape)

    R = constant("R", D, None, None)
    if R is None or "W" not in named:
        raise ValueError(f"source: expected a node with inputs X, W and R, got {list(named)}")
    H = attributes.get("hidden_size") or R.shape[2]
    constant("R", D, G * H, H)
    W, B = constant("W", D, G * H, None), constant("B", D, 2 * G * H)
    P = constant("P", D, 3 * H)
    if P is not None and P.any():
        raise ValueError(
            "P: expected peepholes that are all zero, got others, which are another cell than "
            "rnnkernels.LSTM"
        )
    assert W is not None
    directions = []
    for d in range(D):
        biases = () if B is None else np.split(B[d], 2)
        parts = (W[d], R[d], *biases)
        directions.append(Weights(*(from_order(a, cell, "onnx") for a in parts)))
    module = module_of(cell, directions, batch_first=first)
    if attributes["direction"] == "reverse":
        module = Reversed(module)

    roles = ("sequence_lens", "initial_h", "initial_c")
    dynamic = {r: named[r] for r in roles if r in named and named[r] not in arrays}
    states = {}
    for role in roles[1:]:
        if role in named and role not in dynamic:
            shape = (None, D, H) if first else (D, None, H)
            value = array(role, arrays[named[role]], shape)
            states[role] = torch.from_numpy(value.swapaxes(0, 1).copy() if first else value.copy())
    lengths = None
    if "sequence_lens" in named and "sequence_lens" not in dynamic:
        lengths = _lengths(arrays[named["sequence_lens"]])
    return OnnxLayer(module, _hx(cell, states, dynamic), lengths, dynamic)


def _lengths(value: Any) -> Tensor:
    found = np.asarray(value)
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise ValueError(
            f"sequence_lens: expected integers [B], got {found.dtype.name} {list(found.shape)}"
        )
    return torch.from_numpy(found.astype(np.int64))


def _hx(
    cell: str, states: dict[str, Tensor], dynamic: dict[str, str]
) -> Tensor | tuple[Tensor, Tensor] | None:
    """The states [D, B, H] that a node starts with; a missing one of two is zero."""
    if not states:
        return None
    if cell != "lstm":
        return states["initial_h"]
    missing = {"initial_h", "initial_c"} & dynamic.keys()
    if missing:
        raise ValueError(
            f"{missing.pop()}: expected a constant, since {next(iter(states))} is one, got a value "
            "of the graph. Make both the one or the other"
        )
    zeros = torch.zeros_like(next(iter(states.values())))
    return states.get("initial_h", zeros), states.get("initial_c", zeros)
