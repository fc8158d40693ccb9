"""The ops as tests call them: on a single layer, whose tensors have no dimension of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkernels._core.call import ARGUMENTS, Call, Layer, LayerResult

kernels = torch.ops.rnnkernels
X, LENGTHS, FLOW = (Call._fields.index(name) for name in ("x", "lengths", "flow"))


def alone(t: Tensor) -> Tensor:
    """What the only layer has of a tensor [1, ...]; an empty one was not kept."""
    return t[0] if t.dim() > 1 else t


def forward_arguments(layer: Layer, *, save: bool = True) -> list[Any]:
    """The arguments of ``sequence_forward``."""
    return list(layer.call()._replace(save=save)[:ARGUMENTS])


def forward(layer: Layer, ops: Any = kernels, *, save: bool = True) -> list[Tensor]:
    """y, h_n, c_n, c, h_raw, saved."""
    y, h_n, c_n, ys, *kept = ops.sequence_forward(*forward_arguments(layer, save=save))
    assert ys.numel() == 0  # y is that of the only layer
    return [y, h_n, c_n, *map(alone, kept)]


def run(layer: Layer, ops: Any = kernels) -> LayerResult:
    """What users see of it."""
    y, h_n, c_n, c, _, _ = forward(layer, ops, save=False)
    if layer.c0 is None:
        return LayerResult(y, h_n, None, None)
    return LayerResult(y, h_n, c_n, c if layer.all_states else None)


def backward_arguments(
    layer: Layer,
    out: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *,
    record: bool | None = None,
    initial: bool = True,
) -> list[Any]:
    """The arguments of ``sequence_backward`` for what forward returned and for the gradients of y,
    h_n, c_n and c; ``record`` is whether the layer has a flow, unless told otherwise."""
    call = layer.call()
    y, _, _, c, _, saved = (t.detach() for t in out)
    dy, dh_n, dc_n, dc = grads
    record = layer.flow is not None if record is None else record
    return [
        *call[: X], dy, dh_n, dc_n, None, None if dc is None else dc[None],
        *call[X + 1 : LENGTHS], y, y.new_empty(0), c[None], saved[None],
        *call[LENGTHS:FLOW], record, initial, False,
    ]  # fmt: skip


def backward(
    layer: Layer,
    out: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    ops: Any = kernels,
    **options: bool,
) -> list[Tensor]:
    """dgates, dh0, dc0, dproj, flow; and dunit where the cell has parameters."""
    arguments = backward_arguments(layer, out, grads, **options)
    dgates, dh0, dc0, dproj, flow, dunit = ops.sequence_backward(*arguments)
    of_parameters = [alone(dunit)] if layer.cell.P else []
    return [alone(dgates), dh0, dc0, alone(dproj), alone(flow), *of_parameters]


def backward_over_saved(
    layer: Layer, out: Sequence[Tensor], grads: Sequence[Tensor | None], ops: Any = kernels
) -> list[Tensor]:
    """The same by the op that writes dgates over what forward saved, here a copy of that."""
    saved = out[5].detach().clone()
    arguments = backward_arguments(layer, [*out[:5], saved], grads)
    dh0, dc0, dproj, flow, dunit = ops.sequence_backward_(*arguments)
    of_parameters = [alone(dunit)] if layer.cell.P else []
    return [saved, dh0, dc0, alone(dproj), alone(flow), *of_parameters]
