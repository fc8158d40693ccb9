"""The definition of correct: layers as a readable loop over time in torch operations.

Differentiable any number of times, on any device and in any floating dtype; slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnkernels._core import noise
from rnnkernels._core.call import Call, Clip, Layer, LayerResult, Result, in_turn
from rnnkernels.cells.normed import emitted, normed_hidden


def run(call: Call) -> Result:
    """Runs all layers of a call; shapes: :class:`rnnkernels._core.call.Call`."""
    if call.flow is None:
        return in_turn(call, run_layer)
    passes = _Passes()
    result = in_turn(call, partial(run_layer, passes=passes))
    passes.watch(result)
    return result


class _Passes:
    """Which backward is one of the results of a call. The backward of a gradient comes by the same
    h, with what is none of dL/dh_t."""

    def __init__(self) -> None:
        self.ours: int | None = None

    def watch(self, result: Result) -> None:
        outputs = [result.y, result.h_n, result.c_n, *(result.h or ()), *(result.c or ())]
        seen = [t for t in outputs if t is not None and t.requires_grad]
        torch.autograd.graph.register_multi_grad_hook(seen, self._begins, mode="any")

    def _begins(self, _: Tensor) -> None:
        self.ours = torch._C._current_graph_task_id()

    def now(self) -> bool:
        return self.ours == torch._C._current_graph_task_id()


def run_layer(call: Layer, passes: _Passes | None = None) -> LayerResult:
    """Runs one layer; see :class:`rnnkernels._core.call.Layer` for shapes and meanings.

    A row of length n takes part in steps 0 to n-1: past its end its output is zero and its state
    stands still; direction 1 starts at its own end. ``reset[t]`` zeroes the state that crosses
    the boundary between t-1 and t, in both directions; a boundary of windows stops the gradient.
    Each head of a direction runs as a direction does.
    Where steps are packed, only the rows that reach a step are there, and [N] takes the place of
    [T, B].
    """
    directions = range(len(call.w_ih) * call.heads)
    parts = [run_direction(call, d, passes) for d in directions]
    y = torch.cat([part[0] for part in parts], dim=-1)
    h_n = torch.stack([part[1] for part in parts])
    if call.c0 is None:
        return LayerResult(y, h_n, None, None)
    c = torch.stack([part[3] for part in parts], dim=-2) if call.all_states else None
    return LayerResult(y, h_n, torch.stack([part[2] for part in parts]), c)


def _record(call: Layer, d: int, t: int, passes: _Passes | None, dh: Tensor) -> None:
    """Writes down the norm of the gradient of an h."""
    assert call.flow is not None
    if passes is not None and not passes.now():
        return
    norms = torch.linalg.vector_norm(dh.detach(), dim=-1)
    _at_step(call, call.flow[..., d], t).copy_(norms)


def _at_step(call: Layer, t: Tensor, step: int) -> Tensor:
    """The rows at a step of a tensor [T, B, ...]; of a packed one, as many as reach it."""
    if call.starts is None:
        return t[step]
    first, last = call.starts[step : step + 2].tolist()
    return t[first:last]


def run_direction(
    call: Layer, d: int, passes: _Passes | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs direction d: y [T, B, R], h_n [B, R], c_n [B, C*H], c [T, B, C*H]; h's where no c is.

    Backward writes the norm of the gradient of every h into ``call.flow``, if there is one.
    """
    cell, T, packed = call.cell, call.T, call.starts is not None
    turned = d // call.heads  # whether it runs backwards, from each row's own end

    def of_head(all_heads: list[Tensor]) -> Tensor | None:
        return all_heads[turned].chunk(call.heads)[d % call.heads] if all_heads else None

    w_ih, w_hh, w_hr = of_head(call.w_ih), of_head(call.w_hh), of_head(call.w_hr)
    b_ih, b_hh = of_head(call.b_ih), of_head(call.b_hh)
    params = call.params[turned] if call.params else ()
    params = [p.chunk(call.heads)[d % call.heads] for p in params]
    h_mask = None if call.h_mask is None else call.h_mask[d]  # [B, R]
    assert w_ih is not None
    rows = w_ih.size(0)
    own = slice(d * rows, (d + 1) * rows)  # where x is the input part of the gates
    gx = F.linear(call.x, w_ih, b_ih) if not cell.normed else call.x[..., own]  # [T, B, G*H]
    if cell.normed and b_ih is not None:
        gx = gx + b_ih
    initial = [call.h0[d], *(() if call.c0 is None else call.c0[d].chunk(cell.C, -1))]
    state = [s[:0] for s in initial] if packed and turned else initial
    ended: list[list[Tensor]] = []  # states of packed rows that have no further steps
    outputs: list[list[Tensor]] = [[] for _ in range(T)]

    def step(
        gx: Tensor, prev: list[Tensor], active: Tensor | None = None, t: int = 0
    ) -> list[Tensor]:
        h = prev[0] if h_mask is None else prev[0] * h_mask[: prev[0].size(-2)]
        gh = torch.zeros_like(gx) if w_hh is None else F.linear(h, w_hh, b_hh)  # [B, G*H]
        if cell.normed:
            gh = normed_hidden(cell, gh, params)
        if active is not None:  # the zero gradient of a step that does not count meets numbers
            gx, gh = gx.masked_fill(~active, 0), gh.masked_fill(~active, 0)
        if call.clip.kind != "none":
            gx, gh = _bounded(gx, gh, call.clip)
        gates = gx.chunk(cell.G, -1)
        more = [p.expand_as(gates[0]) for p in params]
        if call.noise is not None:
            more += noise.at_step(call.noise, call.draws, t, d, gates[0])
        values, _ = cell.forward(gates, gh.chunk(cell.G, -1), [*prev, *more])
        next = list(values)
        if cell.emits:
            next[0] = emitted(values, params)
        if w_hr is not None:
            next[0] = F.linear(next[0], w_hr)
        return next

    if T == 0:  # a step over nothing: empty outputs that depend on every tensor all the same
        empty = step(gx, [s[None][:0] for s in initial])
        return empty[0], initial[0], beside_h(initial), beside_h(empty)

    for t in reversed(range(T)) if turned else range(T):
        gx_t = _at_step(call, gx, t)
        n = gx_t.size(0)  # rows that are there: all, unless steps are packed
        lengths = None if call.lengths is None else call.lengths[:n]
        active = None if lengths is None or packed else (t < lengths)[:, None]  # [B, 1]
        cut = boundary(call, turned, t)
        if n < state[0].size(0):
            ended.append([s[n:] for s in state])
            state = [s[:n] for s in state]
        elif n > state[0].size(0):
            begin = slice(state[0].size(0), n)
            state = [torch.cat([s, first[begin]]) for s, first in zip(state, initial, strict=True)]
        if active is not None:
            cut = ~active if cut is None else cut | ~active
        prev = state if cut is None else [s.masked_fill(cut, 0) for s in state]
        if call.window and starts_window(call, turned, t):
            inside = None if lengths is None else (t + turned < lengths)[:, None]
            prev = [
                s.detach() if inside is None else torch.where(inside, s.detach(), s) for s in prev
            ]
        next = step(gx_t, prev, active, t)
        if call.flow is not None and next[0].requires_grad:
            next[0].register_hook(partial(_record, call, d, t, passes))  # type: ignore[no-untyped-call]
        if active is None:
            state = outputs[t] = next
        else:
            state = [torch.where(active, n, s) for n, s in zip(next, state, strict=True)]
            outputs[t] = [n.masked_fill(~active, 0) for n in next]

    def join(slot: int) -> Tensor:
        steps = [out[slot] for out in outputs]
        return torch.cat(steps) if packed else torch.stack(steps)

    finals = [torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True)]
    every = [join(slot) for slot in range(cell.S)]
    return every[0], finals[0], beside_h(finals), beside_h(every)


def beside_h(states: Sequence[Tensor]) -> Tensor:
    """All states but h, one behind the other; h where there is no other."""
    return torch.cat(list(states[1:]), -1) if len(states) > 2 else states[-1]


def starts_window(call: Layer, d: int, t: int) -> bool:
    """Whether direction d enters another window with its step at t."""
    first = t if d == 0 else t + 1  # of the later window
    return first % call.window == 0 and 0 < first < call.T


def _bound(grads: Sequence[Tensor], clip: Clip) -> tuple[Tensor, Tensor]:
    """The gradients of gx and gh within their bounds."""
    kind, bound = clip
    if kind == "value":
        dgx, dgh = (g.clamp(-bound, bound) for g in grads)
    elif kind == "tanh":
        dgx, dgh = (bound * torch.tanh(g / bound) for g in grads)
    else:
        # In float64, where the squares of all that float32 holds are numbers.
        norm = torch.linalg.vector_norm(grads[0], dim=-1, keepdim=True, dtype=torch.float64)
        factor = (bound / norm.clamp(min=bound)).to(grads[0].dtype)
        dgx, dgh = (g * factor for g in grads)
    return dgx, dgh


def _bounded(gx: Tensor, gh: Tensor, clip: Clip) -> tuple[Tensor, ...]:
    kind = _Bound  # torch.compile takes no function that has a jvp
    if not torch.compiler.is_compiling():
        if _inside_of_an_op():  # where torch.func takes no function of ours
            both = torch.stack([gx, gh])
            both.register_hook(  # type: ignore[no-untyped-call]
                lambda grads: torch.stack(_bound(grads.unbind(), clip))
            )
            return both.unbind()
        kind = _BoundWithTangent
    found: tuple[Tensor, Tensor] = kind.apply(gx, gh, clip)  # type: ignore[no-untyped-call]
    return found


def _inside_of_an_op() -> bool:
    """Whether torch.func is at work on an op that what runs now is a part of."""
    front = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode
    return torch._C._dispatch_tls_is_dispatch_key_excluded(front)


class _Bound(torch.autograd.Function):
    """gx and gh as they are, with gradients bounded as :class:`rnnkernels._core.call.Clip` says."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gx: Tensor, gh: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
        return gx.view_as(gx), gh.view_as(gh)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.clip = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_bound(grads, ctx.clip), None


class _BoundWithTangent(_Bound):
    @staticmethod
    def jvp(ctx: Any, gx: Tensor, gh: Tensor, _: None) -> tuple[Tensor, Tensor]:
        return gx.view_as(gx), gh.view_as(gh)


def boundary(call: Layer, d: int, t: int) -> Tensor | None:
    """Which rows have the state that enters position t zeroed: [B, 1], or None for no row."""
    if call.reset is None:
        return None
    if d == 0:
        return _at_step(call, call.reset, t)[:, None]
    if t + 1 == call.T:
        return None
    cut = _at_step(call, call.reset, t + 1)
    if call.starts is not None:  # rows that end at t have no boundary behind it
        first, last = call.starts[t : t + 2].tolist()
        return F.pad(cut, (0, last - first - cut.size(0)))[:, None]
    if call.lengths is not None:
        cut = cut & (t + 1 < call.lengths)  # a reset in the padding is no boundary of the row
    return cut[:, None]
