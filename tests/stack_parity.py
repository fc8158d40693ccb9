"""Holds the ops of a stack of layers against the reference, a layer at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import op_parity
import torch
from op_parity import Case
from torch import Tensor

from rnnkernels.call import Call


def make(case: Case, layers: int, dtype: torch.dtype, device: str = "cpu") -> list[Call]:
    """A call for each layer, no two of the same weights; only the x of the first is used."""
    calls = []
    for layer in range(layers):
        call = op_parity.make(replace(case, I=case.H) if layer else case, dtype, device)
        scaled = {
            name: [w * 0.8**layer for w in getattr(call, name)]
            for name in ("w_ih", "w_hh", "b_ih", "b_hh")
        }
        calls.append(call._replace(**scaled, h0=call.h0 * 0.5**layer))
    return calls


def masks(calls: list[Call], p: float) -> list[Tensor]:
    """Factors of dropout between any two layers, [T, B, H]: 0 for a share p, else 1 / (1 - p)."""
    gen = torch.Generator().manual_seed(3)
    shape = *calls[0].x.shape[:2], calls[0].h0.size(2)
    kept = [torch.rand(shape, generator=gen) >= p for _ in calls[1:]] if p else []
    return [(mask / (1 - p)).to(calls[0].x) for mask in kept]


def _lists(calls: list[Call], *names: str) -> list[list[Tensor]]:
    """The tensors of each kind, of all layers; a layer has one of a list, or none."""
    found = []
    for name in names:
        values = [getattr(call, name) for call in calls]
        flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
        found.append([v for v in flat if v is not None])
    return found


def _transposed(lists: list[list[Tensor]], layers: int) -> list[list[Tensor]]:
    """What each layer has of lists that have a tensor for each layer, or are empty."""
    return [[t[n] if t else torch.zeros(0) for t in lists] for n in range(layers)]


def forward(ops: Any, calls: list[Call], dropout: float = 0) -> list[list[Tensor]]:
    """y, h_n, c_n, c, h_raw and saved of each layer."""
    c, lists = calls[0], _lists(calls, "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0")
    y, h_n, c_n, all_c, saved = ops.stack_forward(
        c.cell_name, c.x, *lists, masks(calls, dropout), c.lengths, c.starts, c.reset, True,
        c.all_c, c.window, *c.clip,
    )  # fmt: skip
    return _transposed([y, h_n, c_n, all_c, [], saved], len(calls))


def backward(
    ops: Any,
    calls: list[Call],
    outs: list[list[Tensor]],
    grads: list[list[Tensor | None]],
    dropout: float = 0,
) -> list[list[Tensor]]:
    """dgates, dh0, dc0, dproj and flow of each layer, of what forward returned, for the gradients
    of its y, h_n, c_n and c; those of y are what reaches it from outside."""
    c = calls[0]
    w_ih, w_hh, h0, c0 = _lists(calls, "w_ih", "w_hh", "h0", "c0")
    dgates, dh0, dc0 = ops.stack_backward(
        c.cell_name, *([g[n] for g in grads] for n in range(4)), w_ih[1:], w_hh, h0, c0,
        masks(calls, dropout), [out[0] for out in outs], [out[3] for out in outs if c0],
        [out[5] for out in outs if c.cell.K], c.lengths, c.starts, c.reset, c.window, *c.clip, True,
    )  # fmt: skip
    return _transposed([dgates, dh0, dc0, [], []], len(calls))


def random_gradients(calls: list[Call], outs: list[list[Tensor]]) -> list[list[Tensor | None]]:
    """Of y, h_n, c_n and c of each layer; nothing outside of the stack depends on the y of every
    second layer from the first on, unless that is the last."""
    grads = [op_parity.random_gradients(call, out) for call, out in zip(calls, outs, strict=True)]
    for of_layer in grads[:-1:2]:
        of_layer[0] = None
    return grads


def fed(calls: list[Call], outs: list[list[Tensor]], dropout: float) -> list[Call]:
    """The calls, with what the layer below gives for x."""
    factors = masks(calls, dropout)
    below = [calls[0].x]
    for n, out in enumerate(outs[:-1]):
        below.append(out[0] * factors[n] if factors else out[0])
    return [call._replace(x=x) for call, x in zip(calls, below, strict=True)]


def forward_error(calls: list[Call], outs: list[list[Tensor]], dropout: float = 0) -> float:
    """The largest of all layers."""
    return max(map(op_parity.forward_error, fed(calls, outs, dropout), outs))


def backward_error(
    calls: list[Call],
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
