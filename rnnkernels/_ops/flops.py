"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the ops.

As for torch's own operators: two operations for each multiplication of a matrix product, none for
the gates, and padding counts, since formulas see shapes alone. A forward multiplies every weight
matrix of the module once at each of its N = T*B steps (N are the packed steps where there is no
padding)::

    2*N*(G*H*I + G*H*R)            for each layer and direction, and 2*N*R*H more with a projection

The loops of a backward multiply the same matrices, transposed, but for the first layer's W_ih. The
gradient of each weight, and that of the input, which follow, are as many again as the weight takes
in forward: of ``sequence_gradients``, which has all of them, those that are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from rnnkernels._core.late_import import when_imported
from rnnkernels._ops.schema import FIRST_WEIGHT

Shape = Sequence[int]


def register() -> None:
    """Makes the formulas known to torch, which counts nothing of an op without one; as soon as its
    counter is there, which takes some tenths of a second to import, for Triton's sake."""
    when_imported("torch.utils.flop_counter", _register)


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for library in (torch.ops.rnnkernels, torch.ops.rnnkernels_triton):
        register_flop_formula(library.sequence_forward)(_forward)
        register_flop_formula([library.sequence_backward, library.sequence_backward_])(_backward)
        register_flop_formula(library.sequence_gradients)(_gradients)
    of_tangents = torch.ops.rnnkernels
    register_flop_formula(of_tangents.forward_tangents)(_forward)
    register_flop_formula([of_tangents.backward_record, of_tangents.backward_tangents])(_backward)
    register_flop_formula(torch.ops.rnnkernels.input_gradient)(_input_gradient)
    register_flop_formula(torch.ops.rnnkernels.rows_product)(_rows_product)
    register_flop_formula(torch.ops.rnnkernels.steps_product)(_steps_product)
    if torch.ops.aten.addmm_ not in flop_registry:  # in which gradients of weights add up
        register_flop_formula(torch.ops.aten.addmm_)(_addmm_)


def _named(op: Any, values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip((a.name for a in op.default._schema.arguments), values, strict=False))


def _multiplied(weights: Sequence[Shape]) -> int:
    """How often a step multiplies: biases take no part."""
    return sum(prod(shape) for shape in weights if len(shape) == 2)


def _forward(*shapes: Any, out_shape: Any = None) -> int:
    a = _named(torch.ops.rnnkernels.sequence_forward, shapes)
    steps: int = prod(a["x"][:-1])
    return 2 * steps * _multiplied(a["weights"])


def _backward(*shapes: Any, out_shape: Any = None) -> int:
    a = _named(torch.ops.rnnkernels.sequence_backward, shapes)
    steps: int = prod(a["y"][:-1])
    return 2 * steps * (_multiplied(a["weights"]) - _multiplied(_of_input(a)))


def _of_input(a: dict[str, Any]) -> Sequence[Shape]:
    """W_ih of the first layer, in each direction."""
    each = len(a["weights"]) // (a["layers"] * a["directions"])
    found: Sequence[Shape] = a["weights"][: each * a["directions"] : each]
    return found


def _gradients(*shapes: Any, out_shape: Any = None) -> int:
    a = _named(torch.ops.rnnkernels.sequence_gradients, shapes)
    weights, of_input = a["weights"], _of_input(a)
    products = [weights[i - FIRST_WEIGHT] for i in a["wanted"] if i >= FIRST_WEIGHT]
    products += of_input if 0 in a["wanted"] else []
    steps: int = prod(a["y"][:-1])
    loops = _multiplied(weights) - _multiplied(of_input)
    return 2 * steps * (loops + _multiplied(products))


def _input_gradient(dgates: Shape, w_ih: Sequence[Shape], out_shape: Any = None) -> int:
    return 2 * prod(dgates[:-2]) * _multiplied(w_ih)


def _rows_product(a: Shape, w: Shape, out_shape: Any = None) -> int:
    return 2 * a[0] * prod(w)


def _steps_product(a: Sequence[Shape], b: Sequence[Shape], out_shape: Any = None) -> int:
    return sum(2 * prod(left) * right[1] for left, right in zip(a, b, strict=True))


def _addmm_(total: Shape, a: Shape, b: Shape, out_shape: Any = None, **factors: Any) -> int:
    return 2 * a[0] * a[1] * b[1]
