"""What the autograd formula asks the reference for, where no kernel computes it: tangents (forward
mode), and derivatives of gradients.

All of it is torch operations, which any further transform takes. ``csrc/autograd/by_reference.h``
says what is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch.autograd import forward_ad

from rnnkernels._core import reference
from rnnkernels._core.call import Call, needs_gradient
from rnnkernels._ops import lanes, tangents
from rnnkernels._ops.schema import (
    FIRST_WEIGHT,
    INPUTS,
    OUTPUT_GRADIENTS,
    arguments,
    rows_of,
    rows_of_gradient,
    rows_of_mask,
)

Outputs = list[Tensor | None]  # y, h_n, c_n, ys, c


def forward_tangents(*values: Any) -> Outputs:
    """Those of y, h_n, c_n, and, where they are kept, of ys and c."""
    a = arguments("sequence_forward", values)
    sources = [getattr(a, name) for name in INPUTS] + list(a.weights)
    values_alone, tangents_alone = _all_parts(sources)
    if _differentiable(sources) or not tangents.takes(a, [*values_alone, *tangents_alone], False):
        return _forward_by_reference(a, values)
    changed = _from_sources(a, values_alone, INPUTS)
    named = dict(zip(INPUTS, tangents_alone, strict=False))
    found = tangents.find(changed, named, tangents_alone[len(INPUTS) :]).outputs
    return found if a.save or a.all_states else [*found[:3], None, None]


def _forward_by_reference(a: SimpleNamespace, values: Sequence[Any]) -> Outputs:
    # Bounds of gradients leave values, and with them tangents, as they are.
    found = _outputs(Call(*values)._replace(clip="none", flow=None))
    if not (a.save or a.all_states):
        found[3:] = [None, None]
    return [None if t is None else _tangent(t) for t in found]


def gradient_tangents(*values: Any) -> list[Tensor | None]:
    """Those of the gradients that are wanted."""
    a = arguments("sequence_gradients", values)
    names = (*OUTPUT_GRADIENTS, *INPUTS)
    sources = [getattr(a, name) for name in names] + list(a.weights)
    primals, of_sources = _all_parts(sources)
    if tangents.takes(a, [*primals, *of_sources], True) and not _differentiable(sources):
        named = dict(zip(names, of_sources, strict=False))
        changed = _from_sources(a, primals)
        by_number = tangents.find(changed, named, of_sources[len(names) :], a.wanted).gradients
        return [by_number[i] for i in a.wanted]
    if not a.lanes:
        return [_tangent(t) for t in _gradients(a)]
    each = [_gradients(_lane(a, i)) for i in range(a.lanes)]
    found = []
    for position, parts in zip(a.wanted, zip(*each, strict=True), strict=True):
        rows = rows_of_gradient(position, a.starts is not None)
        together = torch.stack(parts, 0 if rows is None else rows + 1)
        found.append(_tangent(together if rows is None else together.flatten(rows, rows + 1)))
    return found


def second_order(
    values: Sequence[Any], of_gradients: Sequence[Tensor | None], positions: Sequence[int]
) -> list[Tensor]:
    """The gradients at ``positions`` among dy, dh_n, dc_n, dys, dc, x, h0, c0 and the weights, from
    those of the gradients that the arguments ``values`` of ``sequence_gradients`` ask for."""
    a = arguments("sequence_gradients", values)
    sources = [getattr(a, name) for name in (*OUTPUT_GRADIENTS, *INPUTS)] + list(a.weights)
    if not torch.is_grad_enabled() and tangents.takes(a, [*sources, *of_gradients], True):
        return _second_order(a, sources, of_gradients, positions)
    if a.lanes or _transformed([*sources, *of_gradients]):
        return _second_order_by_func(a, sources, of_gradients, positions)
    with torch.enable_grad():  # nodes of their own: no path from one source to another counts
        sources = [None if t is None else t.view_as(t) for t in sources]
        found = _gradients(_from_sources(a, sources))
    pairs = zip(found, of_gradients, strict=True)
    pulling = [(t, g) for t, g in pairs if g is not None and t.requires_grad]
    return list(
        torch.autograd.grad(
            [t for t, _ in pulling],
            [sources[p] for p in positions],
            [g for _, g in pulling],
            create_graph=torch.is_grad_enabled(),
            materialize_grads=True,
        )
    )


def _second_order(
    a: SimpleNamespace,
    sources: Sequence[Any],
    of_gradients: Sequence[Tensor | None],
    positions: Sequence[int],
) -> list[Tensor]:
    """The same by tangents in the direction of the gradients' gradients."""
    n, direction = len(OUTPUT_GRADIENTS), dict(zip(a.wanted, of_gradients, strict=True))
    named = {name: direction.get(i) for i, name in enumerate(INPUTS)}
    of_weights = [direction.get(FIRST_WEIGHT + i) for i in range(len(a.weights))]
    wanted = [p - n for p in positions if p >= n]
    outputs, gradients = tangents.find(a, named, of_weights, wanted)
    found = [outputs[p] if p < n else gradients[p - n] for p in positions]
    pairs = zip(found, positions, strict=True)
    return [torch.zeros_like(sources[p]) if t is None else t for t, p in pairs]


def _differentiable(tensors: Sequence[Tensor | None]) -> bool:
    """Whether what comes of these is to be differentiated in reverse: they themselves, or what
    torch.func.jvp has wrapped in them."""
    pairs = (_parts(t) for t in tensors if t is not None)
    return needs_gradient(t for pair in pairs for t in pair if t is not None)


def _all_parts(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Tensors without their tangents, and these."""
    pairs = [(None, None) if t is None else _parts(t) for t in tensors]
    return [p for p, _ in pairs], [t for _, t in pairs]


def _transformed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether torch.func has, or had, a part in a call, or a gradient is a batch of gradients."""
    busy = torch._C._functorch.peek_interpreter_stack() is not None
    return busy or any(tangents.transformed(t) for t in tensors if t is not None)


def _from_sources(
    a: SimpleNamespace,
    sources: Sequence[Any],
    names: Sequence[str] = (*OUTPUT_GRADIENTS, *INPUTS),
) -> SimpleNamespace:
    """The same call of other gradients of outputs, inputs and weights."""
    changed = dict(zip(names, sources, strict=False))
    return SimpleNamespace(**vars(a) | changed | {"weights": list(sources[len(names) :])})


def _second_order_by_func(
    a: SimpleNamespace,
    sources: Sequence[Any],
    of_gradients: Sequence[Tensor | None],
    positions: Sequence[int],
) -> list[Tensor]:
    """By torch.func, which goes with its other transforms, and takes longer."""

    def gradients(*chosen: Tensor) -> tuple[Tensor, ...]:
        changed = list(sources)
        for p, t in zip(positions, chosen, strict=True):
            changed[p] = t
        return _pulled(_from_sources(a, changed))

    primals = [sources[p] for p in positions]
    found, pull = torch.func.vjp(gradients, *primals)  # type: ignore[misc]  # for want of aux

    def pulled(*of_gradients: Tensor | None) -> list[Tensor]:
        given = zip(of_gradients, found, strict=True)
        return list(pull(tuple(torch.zeros_like(t) if g is None else g for g, t in given)))

    def rule(info: Any, dims: Any, *of_gradients: Tensor | None) -> tuple[list[Tensor], list[int]]:
        return torch.vmap(pulled, in_dims=tuple(dims))(*of_gradients), [0] * len(positions)

    result: list[Tensor] = lanes.of_older_vmap(rule, pulled, of_gradients)
    return result


def _pulled(a: SimpleNamespace) -> tuple[Tensor, ...]:
    """The gradients that are wanted, as torch.func differentiates them."""
    found: tuple[Tensor, ...]
    if a.lanes:
        changed, dims = _split(a)
        rows = [rows_of_gradient(i, a.starts is not None) for i in a.wanted]

        def of_lane(changed: dict[str, Any]) -> tuple[Tensor, ...]:
            return _pulled(SimpleNamespace(**vars(a) | changed))

        out_dims = tuple(0 if r is None else r + 1 for r in rows)
        found = torch.vmap(of_lane, in_dims=(dims,), out_dims=out_dims)(changed)
        pairs = zip(found, rows, strict=True)
        return tuple(t if r is None else t.flatten(r, r + 1) for t, r in pairs)
    inputs = [a.x, a.h0, a.c0, *a.weights]

    def outputs(*wanted: Tensor) -> tuple[Tensor, ...]:
        changed = list(inputs)
        for i, t in zip(a.wanted, wanted, strict=True):
            changed[i] = t
        return tuple(_depended_on(a, changed))

    primals = [inputs[i] for i in a.wanted]
    _, pull = torch.func.vjp(outputs, *primals)  # type: ignore[misc]  # for want of aux
    found = pull(tuple(_given(a)))
    return found


def _gradients(a: SimpleNamespace) -> tuple[Tensor, ...]:
    """The same by torch.autograd, which alone can be called inside of an op: torch.func is busy."""
    inputs = [a.x, a.h0, a.c0, *a.weights]
    with torch.enable_grad():
        for i, t in enumerate(inputs):
            if i in a.wanted and not t.requires_grad:
                inputs[i] = _leaf(t)
            elif t is not None:  # a node of its own: no path from one input to another counts
                inputs[i] = t.view_as(t)
        outputs = _depended_on(a, inputs)
    return torch.autograd.grad(
        outputs,
        [inputs[i] for i in a.wanted],
        _given(a),
        create_graph=torch.is_grad_enabled(),
        materialize_grads=True,
    )


def _given(a: SimpleNamespace) -> list[Tensor]:
    """The gradients of outputs, of those that have one."""
    every = (getattr(a, name) for name in OUTPUT_GRADIENTS)
    return [g for g in every if g is not None]


def _depended_on(a: SimpleNamespace, inputs: Sequence[Any]) -> list[Tensor]:
    """These outputs, for x, h0, c0 and the weights."""
    x, h0, c0, *weights = inputs
    options = {name: getattr(a, name) for name in Call._fields if hasattr(a, name)}
    call = Call(a.cell, **options | {"x": x, "h0": h0, "c0": c0, "weights": weights})
    pairs = zip(_outputs(call), OUTPUT_GRADIENTS, strict=True)
    return [t for t, name in pairs if t is not None and getattr(a, name) is not None]


def _outputs(call: Call) -> Outputs:
    out = reference.run(call._replace(all_states=True))
    every = out.h or []
    inner = every if call.merged else every[:-1]  # whose last is y
    ys = torch.stack([t.flatten(-2) for t in inner]) if inner else None
    return [out.y, out.h_n, out.c_n, ys, None if out.c is None else torch.stack(out.c)]


def _parts(t: Tensor) -> tuple[Tensor, Tensor | None]:
    """A tensor without its tangent, and that."""
    found = forward_ad.unpack_dual(t, level=0)  # type: ignore[no-untyped-call]
    return found.primal, found.tangent


def _tangent(t: Tensor) -> Tensor | None:
    return _parts(t)[1]


def _leaf(t: Tensor) -> Tensor:
    """A tensor with the same tangent that gradients are asked for in."""
    primal, tangent = _parts(t)
    with enable_inplace_requires_grad(True):
        leaf: Tensor = primal.detach().requires_grad_()
    if tangent is not None:
        leaf = forward_ad.make_dual(leaf, tangent, level=0)  # type: ignore[no-untyped-call]
    return leaf


def _split(a: SimpleNamespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments whose rows are those of lanes with a dimension of these, and which one it is."""
    n, packed = a.lanes, a.starts is not None
    changed: dict[str, Any] = dict.fromkeys(("y", "ys", "c", "h_raw", "saved"))
    changed["lanes"] = 0
    if packed:  # the same steps in every lane
        changed |= {"starts": a.starts // n, "lengths": a.lengths[::n]}
    dims: dict[str, Any] = dict.fromkeys(changed)
    for name, value in vars(a).items():
        rows = rows_of(name, packed)
        if name in changed or value is None or rows is None:
            continue
        if isinstance(value, (list, tuple)):
            every = [rows_of_mask(t.dim()) for t in value]
            changed[name] = [lanes.unfold(t, r, n) for t, r in zip(value, every, strict=True)]
            dims[name] = [r + 1 for r in every]
        else:
            changed[name], dims[name] = lanes.unfold(value, rows, n), rows + 1
    return changed, dims


def _lane(a: SimpleNamespace, i: int) -> SimpleNamespace:
    """The arguments of one lane."""
    changed, dims = _split(a)
    for name, dim in dims.items():
        if isinstance(dim, list):
            changed[name] = [t.select(d, i) for t, d in zip(changed[name], dim, strict=True)]
        elif dim is not None:
            changed[name] = changed[name].select(dim, i)
    return SimpleNamespace(**vars(a) | changed)
