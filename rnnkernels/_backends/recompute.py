"""Layers that keep their states every k steps and compute the gates again in backward.

Forward runs window after window and keeps the states that enter each. Backward takes the windows
in the opposite order: each runs once more from its states, by the same backend, and its gradients
are added to those of the windows behind it. So what one window has saved is all that is saved at a
time. Two ops hide the loops, so that compilers neither unroll them nor keep what they compute
again.

What runs a window again is autograd around the backend, or for the CPU kernels one op, which adds
gradients of weights to the sums themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rnnkernels import _backends, _ops
from rnnkernels._core.call import ARGUMENTS, Call, Layer, LayerResult, Result, in_turn, norms_dtype
from rnnkernels._core.windows import Direction, how_many, windows


def run(call: Call, backend: str) -> Result:
    """Runs a call by the backend of this name, with states kept every ``call.recompute`` steps.

    Layers of two directions run one after the other, since each needs all of the one below it; of
    every lower layer what enters the next is kept. Those of one direction run window by window
    together.
    """
    if _lacks_values(call):
        return _backends.BACKENDS[backend].run(call)  # which names what lacks them
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


def _lacks_values(call: Call) -> bool:
    """Whether a tensor is on the meta device and the input is not. Of such a call torch runs what
    stands in for the ops without values, and its outputs would be memory as it is."""
    given = [v for v in call if isinstance(v, Tensor)]
    given += [t for v in (call.weights, call.masks) for t in v or ()]
    return not call.x.is_meta and any(t.is_meta for t in given)


def _forward_op(call: Call, backend: str) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = torch.ops.rnnkernels.recomputed_forward(
        backend, call.recompute, _backends.is_batch_invariant(), *call[:ARGUMENTS]
    )
    return outputs


def _forward(backend: str, every: int, invariant: bool, *values: Any) -> tuple[Tensor, ...]:
    """The outputs of ``sequence_forward`` but for the last two, in whose place stand the h and c
    [L*D, rows, R] that enter all windows, side by side."""
    call = Call(*values)
    if call.starts is None:
        # First the memory: more steps than fit are refused here, before there is a list of them.
        outputs = _empty_outputs(call, how_many(call.T, every, call.window) * call.B)
        spans = windows(call, every)
    else:
        spans = windows(call, every)
        outputs = _empty_outputs(call, sum(w.rows for w in spans))
    y, h_n, c_n, ys, c, *kept = outputs
    finals = [h_n] if call.c0 is None else [h_n, c_n]
    for final, initial in zip(finals, _initial(call), strict=True):
        final.copy_(initial)
    # Several windows to a call, which packs the weights once; all of their states live meanwhile.
    several = 1 + math.isqrt(len(spans))
    if _backends.BACKENDS[backend].refuses(call._replace(all_states=True)) is not None:
        several = 1
    for d in range(call.directions):
        part = Direction(call, d)
        weights = call.weights[part.weights]
        states = [part.mine(final, 0) for final in finals]
        order = part.in_turn(spans)
        for some in (order[i : i + several] for i in range(0, len(order), several)):
            w = part.together(some)
            entering = [s[:, : w.rows].contiguous() for s in states]
            run = part.part(w, part.take(part.input(call.x), w), weights, entering)
            found = _run(backend, run._replace(all_states=call.all_states or len(some) > 1))
            part.put(part.mine(y, -1), w, found.y)
            for all_kept, s, layers in zip(kept, entering, (found.h, found.c), strict=False):
                mine = part.mine(all_kept, 0)
                mine[:, some[0].states] = s[:, : some[0].rows]
                for i, every_one in enumerate(_each_head(layers or ())):
                    all_steps = part.in_place(every_one, w)
                    for inner in some[1:]:
                        mine[i, inner.states] = part.entering(inner, w, all_steps, s[i])
            for s, last in zip(states, (found.h_n, found.c_n), strict=False):
                if last is not None:
                    s[:, : w.rows] = last
            if call.all_states:
                for every_h, h in zip(ys, found.h or (), strict=False):  # that of the last is y
                    part.put(every_h, w, h.flatten(-2))
                for every_c, state in zip(c, found.c or (), strict=False):
                    part.put(part.mine(every_c, -2), w, state)
    return outputs


def _empty_outputs(call: Call, rows: int | torch.SymInt) -> tuple[Tensor, ...]:
    """Memory for what forward returns, with so many rows of states that enter windows."""
    steps, D, L = call.x.shape[:-1], call.directions * call.heads, call.layers
    R, has_c, width = call.h0.size(2), call.c0 is not None, call.cell.C * call.H

    def empty(yes: bool, *shape: int | torch.SymInt) -> Tensor:
        found: Tensor = call.x.new_empty(shape if yes else (0,))
        return found

    return (
        empty(True, *steps, D * R),
        empty(True, L * D, call.B, R),
        empty(has_c, L * D, call.B, width),
        empty(call.all_states and L > 1, L - 1, *steps, call.heads * R),
        empty(call.all_states and has_c, L, *steps, D, width),
        empty(True, L * D, rows, R),
        empty(has_c, L * D, rows, width),
    )


def _each_head(layers: Sequence[Tensor]) -> list[Tensor]:
    """Of states [T, B, heads, R] of each layer those of each head, [T, B, R]."""
    return [of_head for layer in layers for of_head in layer.unbind(-2)]


def _fake_forward(backend: str, every: int, invariant: bool, *values: Any) -> tuple[Tensor, ...]:
    call = Call(*values)
    if call.starts is not None:  # its values tell how many rows reach each window
        return _empty_outputs(call, torch.library.get_ctx().new_dynamic_size())
    return _empty_outputs(call, how_many(call.T, every, call.window) * call.B)


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
    spans = windows(call, every)
    kept = [h_kept] if call.c0 is None else [h_kept, c_kept]
    dx = torch.empty_like(call.x) if 0 in wanted else None
    dstates = [
        torch.zeros_like(initial) if given is None else given.clone()
        for initial, given in zip(_initial(call), (dh_n, dc_n), strict=False)
    ]
    dweights = {  # those of 16 bits add up in float32
        i: weight.new_zeros(weight.shape, dtype=norms_dtype(weight.dtype))
        for i, weight in enumerate(call.weights, _WEIGHTS)
        if i in wanted
    }
    flow = call.x.new_empty(0) if call.flow is None else torch.empty_like(call.flow)
    with _as_forward_ran(call, invariant), torch.no_grad():
        for d in range(call.directions):
            part = Direction(call, d)
            weights = dict(list(enumerate(call.weights, _WEIGHTS))[part.weights])
            run_again = _run_by_op if backend == "cpu" else _run_by_autograd
            carried = [part.mine(s, 0) for s in dstates]
            for w in reversed(part.in_turn(spans)):
                x = part.take(part.input(call.x), w)
                states = [part.mine(s, 0)[:, w.states].contiguous() for s in kept]
                again = part.part(w, x, list(weights.values()), states)
                again = again._replace(all_states=dys is not None or dc is not None)
                if call.flow is not None:
                    again = again._replace(
                        flow=flow.new_zeros(call.layers, *x.shape[:-1], call.heads)
                    )
                of_states, of_x, norms = run_again(
                    again,
                    dx is not None,
                    [dweights.get(i) for i in weights],
                    [
                        None if dy is None else part.take(part.mine(dy, -1), w),
                        *(s[:, : w.rows] for s in carried),
                    ],
                    [] if dys is None else [part.take(t, w) for t in dys],
                    [] if dc is None else [part.take(part.mine(t, -2), w) for t in dc],
                    backend,
                )
                for s, gradient in zip(carried, of_states, strict=True):
                    s[:, : w.rows] = gradient
                part.cut(w, carried)
                if dx is not None and of_x is not None:
                    apart = call.cell.normed  # directions do not share it
                    part.put(part.input(dx), w, of_x, add=d > 0 and not apart)
                if norms is not None:
                    for whole, of_layer in zip(flow, norms, strict=True):
                        part.put(part.mine(whole, -1), w, of_layer)
                del of_x  # before the next window takes as much
    everything = {0: dx, **dict(enumerate(dstates, 1)), **dweights}
    return [g.to(call.x.dtype) for g in map(everything.get, wanted) if g is not None], flow


#: The gradients of the states that enter a window and of x, if asked for, and the norms for
#: ``flow``, where it has one.
_Found = tuple[Sequence[Tensor], Tensor | None, Tensor | None]


def _run_by_autograd(
    call: Call,
    wants_dx: bool,
    sums: Sequence[Tensor | None],
    of_outputs: Sequence[Tensor | None],
    of_h: Sequence[Tensor],
    of_c: Sequence[Tensor],
    backend: str,
) -> _Found:
    """A window forward and backward, from the gradients of its outputs, and of the h and c of its
    layers. Gradients of weights are added to ``sums``, but for those that nobody wants, None."""
    x = call.x.detach().requires_grad_(wants_dx)
    states = [s.detach().requires_grad_() for s in _initial(call)]
    pairs = zip(call.weights, sums, strict=True)
    weights = [w.detach().requires_grad_(s is not None) for w, s in pairs]
    again = call._replace(
        x=x, weights=weights, h0=states[0], c0=states[1] if len(states) > 1 else None
    )
    with torch.enable_grad():
        found = _run(backend, again)
    inputs = [t for t in (*states, x, *weights) if t.requires_grad]
    gradients = _pulled(found, inputs, of_outputs, of_h, of_c)
    of_states = [next(gradients) for _ in states]
    of_x = next(gradients) if wants_dx else None
    for s in sums:
        if s is not None:
            s.add_(next(gradients))
    return of_states, of_x, call.flow


def _run_by_op(
    call: Call,
    wants_dx: bool,
    sums: Sequence[Tensor | None],
    of_outputs: Sequence[Tensor | None],
    of_h: Sequence[Tensor],
    of_c: Sequence[Tensor],
    backend: str,
) -> _Found:
    """The same by the kernels for the CPU."""
    dy, dh_n, *dc_n = of_outputs
    has = [wants_dx, True, call.c0 is not None, *(s is not None for s in sums)]
    found, norms = torch.ops.rnnkernels.window_gradients(
        *call[:ARGUMENTS],
        dy,
        dh_n,
        dc_n[0] if dc_n else None,
        torch.stack([*of_h]) if of_h else None,
        torch.stack([*of_c]) if of_c else None,
        [i for i, yes in enumerate(has) if yes],
        [s for s in sums if s is not None],
        _backends.is_batch_invariant(),
    )
    of_x = found.pop(0) if wants_dx else None
    return found, of_x, None if call.flow is None else norms


def _fake_backward(*values: Any) -> tuple[list[Tensor], Tensor]:
    wanted, call = values[_SETTINGS], Call(*values[_BACKWARD:])
    inputs = [call.x, call.h0, call.c0, *call.weights]
    flow = call.x.new_empty(0) if call.flow is None else torch.empty_like(call.flow)
    return [torch.empty_like(inputs[i]) for i in wanted], flow


def _run(backend: str, call: Call) -> Result:
    return _backends.BACKENDS[backend].run(call)


def _initial(call: Call) -> list[Tensor]:
    return [call.h0] if call.c0 is None else [call.h0, call.c0]


@contextmanager
def _as_forward_ran(call: Call, invariant: bool) -> Iterator[None]:
    """As it was for forward, whatever surrounds backward: what autocast casts has been cast. And
    with autograd for what runs again, though backward may be below it, as in a dispatch mode."""
    same = invariant == _backends.is_batch_invariant()  # a switch of the whole process
    keys, shown = torch._C.DispatchKey, torch._C._SetExcludeDispatchKeyGuard
    with (
        shown(keys.AutogradFunctionality, False),
        shown(keys.ADInplaceOrView, False),
        torch.autocast(call.x.device.type, enabled=False),
        nullcontext() if same else _backends.batch_invariant(invariant),
    ):
        yield


def _pulled(
    result: Result,
    inputs: list[Tensor],
    of_outputs: Sequence[Tensor | None],
    of_h: Sequence[Tensor],
    of_c: Sequence[Tensor],
    create_graph: bool = False,
) -> Iterator[Tensor]:
    """The gradients of ``inputs``, from those of y, h_n and c_n, and of the h and c of layers."""
    pairs = [*zip((result.y, result.h_n, result.c_n), of_outputs, strict=False)]
    pairs += [*zip(result.h or (), of_h, strict=False), *zip(result.c or (), of_c, strict=False)]
    pairs = [(t, g) for t, g in pairs if t is not None and g is not None]
    return iter(
        torch.autograd.grad(
            [t for t, _ in pairs if t is not None],
            inputs,
            [g.view(t.shape) for t, g in pairs if t is not None and g is not None],
            create_graph=create_graph,
            materialize_grads=True,
        )
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    """What backward has to know of a call of ``recomputed_forward``."""
    call = Call(*inputs[_SETTINGS:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[-2:])
    ctx.settings, ctx.flow, ctx.masks = inputs[:_SETTINGS], call.flow, len(call.masks or ())
    tensors = {name: getattr(call, name) for name in _TENSORS}
    ctx.save_for_backward(*tensors.values(), *output[-2:], *(call.masks or ()), *call.weights)
    empty: dict[str, Any] = dict.fromkeys((*_TENSORS, "weights", "masks", "flow"))
    ctx.call = call._replace(**empty)


def _formula(ctx: Any, *of_outputs: Tensor | None) -> tuple[Any, ...]:
    """The gradients of all that ``recomputed_forward`` takes."""
    saved = ctx.saved_tensors  # once: torch.utils.checkpoint hands them out once
    kept, lists = saved[: len(_TENSORS) + 2], saved[len(_TENSORS) + 2 :]
    call = ctx.call._replace(
        **dict(zip(_TENSORS, kept[:-2], strict=True)),
        masks=list(lists[: ctx.masks]) or None,
        weights=list(lists[ctx.masks :]),
        flow=ctx.flow,
    )
    # Under names of the call: what asks for a gradient, and then those.
    of: dict[str, Any] = dict(zip(Call._fields, ctx.needs_input_grad[_SETTINGS:], strict=False))
    needed = [of["x"], of["h0"], of["c0"], *of["weights"]]
    wanted = [i for i, needs in enumerate(needed) if needs]
    backward = (
        _in_one_piece if torch.is_grad_enabled() else torch.ops.rnnkernels.recomputed_backward
    )
    found, norms = backward(*ctx.settings, wanted, *of_outputs[:-2], *kept[-2:], *call[:ARGUMENTS])
    if ctx.flow is not None:
        with torch.no_grad():
            ctx.flow.copy_(norms)
    gradients: list[Tensor | None] = [None] * len(needed)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    of = dict.fromkeys(of)
    of["x"], of["h0"], of["c0"], *of["weights"] = gradients
    of["masks"] = [None] * ctx.masks or None
    return (*[None] * _SETTINGS, *of.values())


def _in_one_piece(*values: Any) -> tuple[list[Tensor], Tensor]:
    """What ``recomputed_backward`` gives, as functions of all inputs where gradients are enabled:
    through the call without windows, and the history that its backend gives it."""
    backend, _, invariant, wanted, dy, dh_n, dc_n, dys, dc = values[: _BACKWARD - 2]
    call, create_graph = Call(*values[_BACKWARD:]), torch.is_grad_enabled()
    norms = None if call.flow is None else torch.zeros_like(call.flow)
    inputs: list[Any] = [call.x, call.h0, call.c0, *call.weights]
    with torch.enable_grad():
        for i, t in enumerate(inputs):
            if t is not None:  # a node of its own: no path from one input to another counts
                inputs[i] = t.view_as(t) if t.requires_grad else t.detach()
        x, h0, c0, *weights = inputs
        whole = call._replace(x=x, h0=h0, c0=c0, weights=weights, flow=norms, all_states=True)
        with _as_forward_ran(call, invariant):
            result = _run(backend, whole)
    found = _pulled(
        result,
        [inputs[i] for i in wanted],
        (dy, dh_n, dc_n),
        () if dys is None else dys,
        () if dc is None else dc,
        create_graph,
    )
    # A backward through this graph fills the norms once more, with what is none of dL/dh_t.
    return list(found), call.x.new_empty(0) if norms is None else norms.clone()


_TENSORS = ("x", "h0", "c0", "h_mask", "lengths", "starts", "reset", "noise", "draws")
#: Where the weights begin among what has gradients.
_WEIGHTS = 3
#: How many arguments stand before those of the call, in forward and in backward.
_SETTINGS, _BACKWARD = 3, 11
#: The arguments of ``sequence_forward``.
_CALL = (
    "str cell, int layers, int directions, int heads, bool projected, str merge_mode, int window, "
    "str clip, float bound, Tensor x, Tensor[] weights, Tensor h0, Tensor? c0, Tensor[]? masks, "
    "Tensor? h_mask, Tensor? lengths, Tensor? starts, Tensor? reset, Tensor? noise, "
    "Tensor? draws, Tensor? flow, bool save, bool all_states, bool step"
)

torch.library.define(
    "rnnkernels::recomputed_forward",
    f"(str backend, int every, bool invariant, {_CALL}) -> "
    "(Tensor y, Tensor h_n, Tensor c_n, Tensor ys, Tensor c, Tensor h_kept, Tensor c_kept)",
)
torch.library.define(
    "rnnkernels::recomputed_backward",
    "(str backend, int every, bool invariant, int[] wanted, Tensor? dy, Tensor? dh_n, "
    "Tensor? dc_n, Tensor? dys, Tensor? dc, Tensor h_kept, Tensor c_kept, "
    f"{_CALL}) -> (Tensor[] gradients, Tensor flow)",
)
for _name, _body, _fake in (
    ("rnnkernels::recomputed_forward", _forward, _fake_forward),
    ("rnnkernels::recomputed_backward", _backward, _fake_backward),
):
    torch.library.impl(_name, "CompositeExplicitAutograd")(_ops.same_weights_again()(_body))
    torch.library.register_fake(_name, _fake)
for _key in ("Batched", "FuncTorchBatched"):  # gradients of many at once: kernels take none
    torch.library.impl("rnnkernels::recomputed_backward", _key)(_in_one_piece)
torch.library.register_autograd("rnnkernels::recomputed_forward", _formula, setup_context=_keep)
