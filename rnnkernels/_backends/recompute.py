"""Layers that keep their states every k steps and compute the gates again in backward.

Forward runs window after window and keeps the states that enter each. Backward takes the windows
in the opposite order: each runs once more from its states, by the same backend, and its gradients
are added to those of the windows behind it. So what one window has saved is all that is saved at a
time. Two ops hide the loops, so that compilers neither unroll them nor keep what they compute
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkernels import _backends, _ops
from rnnkernels._core.call import ARGUMENTS, Call, Layer, LayerResult, Result, in_turn, norms_dtype
from rnnkernels._core.windows import Direction, how_many, windows

_FIRST_WEIGHT = 3  # behind x, h0 and c0


def run(call: Call, backend: str) -> Result:
    """Runs a call by the backend of this name, with states kept every ``call.recompute`` steps.

    Layers of two directions run one after the other, since each needs all of the one below it; of
    every lower layer what enters the next is kept. Those of one direction run window by window
    together.
    """
    if call.directions == 1:
        return _ops.result(call, _forward_op(call, backend))

    def run_layer(layer: Layer) -> LayerResult:
        each = layer.call()._replace(recompute=call.recompute)
        y, h_n, c_n, _, c, _, _ = _forward_op(each, backend)
        has_c = each.c0 is not None
        return LayerResult(
            y, h_n, c_n if has_c else None, c[0] if has_c and call.all_states else None
        )

    return in_turn(call, run_layer)


def _forward_op(call: Call, backend: str) -> Sequence[Tensor]:
    outputs: Sequence[Tensor] = torch.ops.rnnkernels.recomputed_forward(
        backend, call.recompute, _backends.is_batch_invariant(), *call[:ARGUMENTS]
    )
    return outputs


def _forward(backend: str, every: int, invariant: bool, *values: Any) -> Sequence[Tensor]:
    """The outputs of ``sequence_forward`` but for the last two, in whose place stand the h and c
    [L*D, rows, R] that enter all windows, side by side."""
    call = Call(*values)
    spans = windows(call, every)
    outputs = _empty_outputs(call, sum(w.rows for w in spans))
    y, h_n, c_n, ys, c, *kept = outputs
    finals = [h_n] if call.c0 is None else [h_n, c_n]
    for final, initial in zip(finals, _initial(call), strict=True):
        final.copy_(initial)
    for d in range(call.directions):
        part = Direction(call, d)
        weights = call.weights[part.weights]
        states = [part.mine(final, 0) for final in finals]
        for w in part.in_turn(spans):
            entering = [s[:, : w.rows].contiguous() for s in states]
            for all_kept, s in zip(kept, entering, strict=False):
                part.mine(all_kept, 0)[:, w.states] = s
            found = _run(backend, part.part(w, part.take(call.x, w), weights, entering))
            part.put(part.mine(y, -1), w, found.y)
            for s, final in zip(states, (found.h_n, found.c_n), strict=False):
                s[:, : w.rows] = final
            if call.all_states:
                for every_h, h in zip(ys, found.h or (), strict=False):  # that of the last is y
                    part.put(every_h, w, h.flatten(-2))
                for every_c, state in zip(c, found.c or (), strict=False):
                    part.put(part.mine(every_c, -2), w, state)
    return outputs


def _empty_outputs(call: Call, rows: int | torch.SymInt) -> Sequence[Tensor]:
    """Memory for what forward returns, with so many rows of states that enter windows."""
    steps, D, L, H = call.x.shape[:-1], call.directions, call.layers, call.H
    R, has_c = call.h0.size(2), call.c0 is not None

    def empty(yes: bool, *shape: int | torch.SymInt) -> Tensor:
        found: Tensor = call.x.new_empty(shape if yes else (0,))
        return found

    return (
        empty(True, *steps, D * R),
        empty(True, L * D, call.B, R),
        empty(has_c, L * D, call.B, H),
        empty(call.all_states and L > 1, L - 1, *steps, R),
        empty(call.all_states and has_c, L, *steps, D, H),
        empty(True, L * D, rows, R),
        empty(has_c, L * D, rows, H),
    )


def _fake_forward(backend: str, every: int, invariant: bool, *values: Any) -> Sequence[Tensor]:
    call = Call(*values)
    if call.starts is not None:  # its values tell how many rows reach each window
        return _empty_outputs(call, torch.library.get_ctx().new_dynamic_size())
    return _empty_outputs(call, how_many(call.T, every, call.window) * call.B)


class _OfOutputs(NamedTuple):
    """The gradients of the outputs, or of a window's; missing where nothing depends on one."""

    y: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    h: Sequence[Tensor]  # of each layer, none where nothing depends on them
    c: Sequence[Tensor]

    def pull(self, result: Result, inputs: list[Tensor], create_graph: bool) -> Sequence[Tensor]:
        """The gradients of ``inputs``, from whom ``result`` has come."""
        outputs = [result.y, result.h_n, result.c_n]
        outputs += [*(result.h or ())[: len(self.h)], *(result.c or ())[: len(self.c)]]
        pairs = [
            (t, g)
            for t, g in zip(outputs, (*self[:3], *self.h, *self.c), strict=True)
            if t is not None and g is not None
        ]
        return torch.autograd.grad(
            [t for t, _ in pairs],
            inputs,
            [g.view(t.shape) for t, g in pairs],
            create_graph=create_graph,
            materialize_grads=True,
        )


def _backward(
    backend: str,
    every: int,
    invariant: bool,
    wanted: Sequence[int],
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dys: Tensor | None,
    dc: Tensor | None,
    h_kept: Tensor,
    c_kept: Tensor,
    *values: Any,
) -> tuple[list[Tensor], Tensor]:
    """The gradients at the positions ``wanted`` among x, h0, c0 and the weights, and the norms of
    those of all h [L, T, B, D] if ``flow`` is there."""
    call = Call(*values)
    x, flow = call.x, call.x.new_empty(0) if call.flow is None else torch.empty_like(call.flow)
    dx = torch.empty_like(x) if 0 in wanted else None
    kept = [h_kept] if call.c0 is None else [h_kept, c_kept]
    dstates = [
        torch.zeros_like(initial) if given is None else given.clone()
        for initial, given in zip(_initial(call), (dh_n, dc_n), strict=False)
    ]
    # Those of 16 bits add up in float32.
    dweights = {
        i: torch.zeros_like(w, dtype=norms_dtype(w.dtype))
        for i, w in enumerate(call.weights, _FIRST_WEIGHT)
        if i in wanted
    }
    for d in range(call.directions):
        part = Direction(call, d)
        own = range(_FIRST_WEIGHT, _FIRST_WEIGHT + len(call.weights))[part.weights]
        weights = [
            w.detach().requires_grad_(i in dweights)
            for i, w in zip(own, call.weights[part.weights], strict=True)
        ]
        carried = [part.mine(s, 0) for s in dstates]
        for w in reversed(part.in_turn(windows(call, every))):
            of_x = part.take(x, w).detach().requires_grad_(dx is not None)
            entering = [part.mine(s, 0)[:, w.states].contiguous().requires_grad_() for s in kept]
            again = part.part(w, of_x, weights, entering)._replace(
                all_states=dys is not None or dc is not None,
                flow=None if call.flow is None else flow.new_zeros(call.layers, *of_x.shape[:-1], 1),
            )
            of_outputs = _OfOutputs(
                None if dy is None else part.take(part.mine(dy, -1), w),
                *[s[:, : w.rows] for s in carried],
                *[None] * (2 - len(carried)),
                () if dys is None else [part.take(t, w) for t in dys],
                () if dc is None else [part.take(part.mine(t, -2), w) for t in dc],
            )
            with torch.enable_grad():
                found = _run(backend, again)
            asked = [t for t in (*entering, of_x, *weights) if t.requires_grad]
            gradients = iter(of_outputs.pull(found, asked, create_graph=False))
            for s in carried:
                s[:, : w.rows] = next(gradients)
            part.cut(w, carried)
            if dx is not None:
                part.put(dx, w, next(gradients), add=d > 0)
            for i in own:
                if i in dweights:
                    dweights[i].add_(next(gradients))
            if again.flow is not None:
                for whole, norms in zip(flow, again.flow, strict=True):
                    part.put(part.mine(whole, -1), w, norms)
    everything = {0: dx, **dict(enumerate(dstates, 1)), **dweights}
    return [everything[i].to(x.dtype) for i in wanted], flow


def _run(backend: str, call: Call) -> Result:
    return _backends.BACKENDS[backend].run(call)


def _initial(call: Call) -> list[Tensor]:
    return [call.h0] if call.c0 is None else [call.h0, call.c0]


def _fake_backward(*values: Any) -> tuple[list[Tensor], Tensor]:
    wanted, call = values[3], Call(*values[_BACKWARD:])
    inputs = [call.x, call.h0, call.c0, *call.weights]
    flow = call.x.new_empty(0) if call.flow is None else torch.empty_like(call.flow)
    return [torch.empty_like(inputs[i]) for i in wanted], flow


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    """What autograd has to know between forward and backward."""
    call = Call(*inputs[_SETTINGS:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[5:])
    ctx.settings = inputs[:_SETTINGS]
    ctx.flow = call.flow
    ctx.call = call._replace(flow=None, **dict.fromkeys(_TENSORS), weights=(), masks=None)
    ctx.masks = len(call.masks or ())
    tensors = [getattr(call, name) for name in _TENSORS]
    ctx.save_for_backward(*tensors, *output[5:], *(call.masks or ()), *call.weights)


def _formula(ctx: Any, *of_outputs: Tensor | None) -> tuple[Any, ...]:
    """The gradients of what the op has taken."""
    saved = ctx.saved_tensors
    *tensors, h_kept, c_kept = saved[: len(_TENSORS) + 2]
    rest = saved[len(_TENSORS) + 2 :]
    call = ctx.call._replace(
        **dict(zip(_TENSORS, tensors, strict=True)),
        masks=list(rest[: ctx.masks]) or None,
        weights=list(rest[ctx.masks :]),
        flow=ctx.flow,
    )
    place = {name: _SETTINGS + i for i, name in enumerate(Call._fields[:ARGUMENTS])}
    needs = ctx.needs_input_grad
    asked = [*(needs[place[name]] for name in ("x", "h0", "c0")), *needs[place["weights"]]]
    wanted = [i for i, yes in enumerate(asked) if yes]
    if torch.is_grad_enabled() or any(map(_is_batched, of_outputs)):
        found, norms = _differentiable(ctx.settings, wanted, of_outputs[:5], call)
    else:
        found, norms = torch.ops.rnnkernels.recomputed_backward(
            *ctx.settings, wanted, *of_outputs[:5], h_kept, c_kept, *call[:ARGUMENTS]
        )
    if ctx.flow is not None:
        ctx.flow.copy_(norms)
    gradients = dict(zip(wanted, found, strict=True))
    result: list[Any] = [None] * len(needs)
    for i, name in enumerate(("x", "h0", "c0")):
        result[place[name]] = gradients.get(i)
    result[place["weights"]] = [gradients.get(i) for i in range(3, len(asked))]
    if call.masks is not None:
        result[place["masks"]] = [None] * len(call.masks)
    return tuple(result)


def _differentiable(
    settings: tuple[Any, ...], wanted: Sequence[int], of_outputs: Sequence[Any], call: Call
) -> tuple[Sequence[Tensor], Tensor | None]:
    """The gradients as functions of all inputs: those of the call without windows."""
    backend, _, invariant = settings
    with torch.enable_grad():  # nodes of their own: no path from one input to another counts
        x, h0, *rest = [
            None if t is None else t.view_as(t) for t in (call.x, call.h0, call.c0, *call.weights)
        ]
    dy, dh_n, dc_n, dys, dc = of_outputs
    whole = call._replace(
        x=x, h0=h0, c0=rest[0], weights=rest[1:], all_states=dys is not None or dc is not None
    )
    norms = None if call.flow is None else torch.zeros_like(call.flow)
    with torch.enable_grad(), _backends.batch_invariant(invariant):
        found = _run(backend, whole._replace(flow=norms))
    inputs = [x, h0, *rest]
    of = _OfOutputs(dy, dh_n, dc_n, () if dys is None else dys, () if dc is None else dc)
    gradients = of.pull(found, [inputs[i] for i in wanted], create_graph=torch.is_grad_enabled())
    return gradients, None if norms is None else norms.clone()


def _is_batched(t: Tensor | None) -> bool:
    return t is not None and torch._C._functorch.is_batchedtensor(t)


_TENSORS = ("x", "h0", "c0", "lengths", "starts", "reset")

#: The arguments of ``sequence_forward``.
_CALL = (
    "str cell, int layers, int directions, bool projected, str merge_mode, int window, str clip, "
    "float bound, Tensor x, Tensor[] weights, Tensor h0, Tensor? c0, Tensor[]? masks, "
    "Tensor? lengths, Tensor? starts, Tensor? reset, Tensor? flow, bool save, bool all_states, "
    "bool step"
)
_SETTINGS = 3
_BACKWARD = 11

_library = torch.library.Library("rnnkernels", "FRAGMENT")
_library.define(
    f"recomputed_forward(str backend, int every, bool invariant, {_CALL}) -> "
    "(Tensor y, Tensor h_n, Tensor c_n, Tensor ys, Tensor c, Tensor h_kept, Tensor c_kept)"
)
_library.define(
    "recomputed_backward(str backend, int every, bool invariant, int[] wanted, Tensor? dy, "
    "Tensor? dh_n, Tensor? dc_n, Tensor? dys, Tensor? dc, Tensor h_kept, Tensor c_kept, "
    f"{_CALL}) -> (Tensor[] gradients, Tensor flow)"
)
for _name, _body, _fake in (
    ("recomputed_forward", _forward, _fake_forward),
    ("recomputed_backward", _backward, _fake_backward),
):
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rnnkernels::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "rnnkernels::recomputed_forward", _formula, setup_context=_keep, lib=_library
)
