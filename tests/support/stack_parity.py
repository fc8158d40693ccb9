"""Holds calls of several layers against the reference, a layer at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import op_parity
import stack_calls
from op_parity import Case
from rnnkernels._core.call import Layer


def make(case: Case, layers: int, dtype: torch.dtype, device: str = "cpu") -> list[Layer]:
    """Layers, no two of the same weights and masks; only the x of the first is used."""
    calls = []
    for layer in range(layers):
        call = op_parity.make(replace(case, I=case.H) if layer else case, dtype, device)
        scaled = {
            name: [w * 0.8**layer for w in getattr(call, name)]
            for name in ("w_ih", "w_hh", "b_ih", "b_hh")
        }
        h_mask = None if call.h_mask is None else call.h_mask.roll(layer, -1)
        calls.append(call._replace(**scaled, h0=call.h0 * 0.5**layer, h_mask=h_mask))
    return calls


def masks(calls: list[Layer], p: float) -> list[Tensor]:
    """Factors of dropout between any two layers, [T, B, H]: 0 for a share p, else 1 / (1 - p)."""
    gen = torch.Generator().manual_seed(3)
    shape = *calls[0].x.shape[:2], calls[0].h0.size(2)
    kept = [torch.rand(shape, generator=gen) >= p for _ in calls[1:]] if p else []
    return [(mask / (1 - p)).to(calls[0].x) for mask in kept]


def _of_layers(t: Tensor, layers: int) -> list[Tensor]:
    """What each layer has of a tensor of all; an empty one was not kept."""
    return list(t.unbind()) if t.dim() > 1 else [t] * layers


def _states(t: Tensor, layers: int) -> list[Tensor]:
    return list(t.chunk(layers)) if t.numel() or t.dim() > 1 else [t] * layers


def forward(ops: Any, calls: list[Layer], dropout: float = 0) -> list[list[Tensor]]:
    """y, h_n, c_n, c, h_raw and saved of each layer."""
    L, between = len(calls), masks(calls, dropout)
    y, h_n, c_n, ys, *kept = ops.sequence_forward(*stack_calls.forward_arguments(calls, between))
    outputs = [*(_of_layers(ys, 0) if L > 1 else []), y]
    states = _states(h_n, L), _states(c_n, L)
    return [
        list(of) for of in zip(outputs, *states, *(_of_layers(t, L) for t in kept), strict=True)
    ]


def backward(
    ops: Any,
    calls: list[Layer],
    outs: list[list[Tensor]],
    grads: list[list[Tensor | None]],
    dropout: float = 0,
) -> list[list[Tensor]]:
    """dgates, dh0, dc0, dproj and flow of each layer, of what forward returned, for the gradients
    of its y, h_n, c_n and c; those of y are what reaches it from outside."""
    L, has_c = len(calls), calls[0].c0 is not None
    empty = outs[0][0].new_empty(0)

    def whole(place: int, joined: Any, layers: list[list[Tensor]], like: int) -> Tensor | None:
        found = [g[place] for g in grads[: len(layers)]]
        if all(g is None for g in found):
            return None
        pairs = zip(found, layers, strict=True)
        return joined([torch.zeros_like(out[like]) if g is None else g for g, out in pairs])

    def stacked(place: int) -> Tensor:
        return torch.stack([out[place] for out in outs]) if outs[0][place].numel() else empty

    douts = [
        grads[-1][0],
        whole(1, torch.cat, outs, 1),
        whole(2, torch.cat, outs, 2) if has_c else None,
        whole(0, torch.stack, outs[:-1], 0),
        whole(3, torch.stack, outs, 3) if has_c else None,
    ]
    ys = torch.stack([out[0] for out in outs[:-1]]) if L > 1 else empty
    out = [outs[-1][0], empty, empty, ys, stacked(3), empty, stacked(5)]
    between = masks(calls, dropout)
    dgates, dh0, dc0, dproj, flow, _ = ops.sequence_backward(
        *stack_calls.backward_arguments(calls, out, douts, between)
    )
    parts = [_of_layers(dgates, L), _states(dh0, L), _states(dc0, L)]
    return [list(of) for of in zip(*parts, *(_of_layers(t, L) for t in (dproj, flow)), strict=True)]


def random_gradients(calls: list[Layer], outs: list[list[Tensor]]) -> list[list[Tensor | None]]:
    """Of y, h_n, c_n and c of each layer; nothing outside of the stack depends on the y of every
    second layer from the first on, unless that is the last."""
    grads = [op_parity.random_gradients(call, out) for call, out in zip(calls, outs, strict=True)]
    for of_layer in grads[:-1:2]:
        of_layer[0] = None
    return grads


def fed(calls: list[Layer], outs: list[list[Tensor]], dropout: float) -> list[Layer]:
    """The calls, with what the layer below gives for x."""
    factors = masks(calls, dropout)
    below = [calls[0].x]
    for n, out in enumerate(outs[:-1]):
        below.append(out[0] * factors[n] if factors else out[0])
    return [call._replace(x=x) for call, x in zip(calls, below, strict=True)]


def forward_error(calls: list[Layer], outs: list[list[Tensor]], dropout: float = 0) -> float:
    """The largest of all layers."""
    return max(map(op_parity.forward_error, fed(calls, outs, dropout), outs))


def backward_error(
    calls: list[Layer],
    outs: list[list[Tensor]],
    backs: list[list[Tensor]],
    grads: list[list[Tensor | None]],
    dropout: float = 0,
) -> float:
    """The largest of all layers, of the gradients that come to each through the one above."""
    whole: list[list[Tensor | None]] = [list(of_layer) for of_layer in grads]
    factors = masks(calls, dropout)
    for n, (below, call, back) in enumerate(zip(whole, calls[1:], backs[1:], strict=False)):
        dgates, w_ih = back[0][:, :, 0].double(), call.w_ih[0].double()
        dy = dgates[..., : w_ih.size(0)] @ w_ih
        dy = dy * factors[n] if factors else dy
        below[0] = dy if below[0] is None else dy + below[0].double()
    as64 = op_parity.converted(whole, torch.float64)
    return max(map(op_parity.backward_error, fed(calls, outs, dropout), outs, backs, as64))
