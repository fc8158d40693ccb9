"""Tensors of other kinds as inputs and parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing._internal.two_tensor import TwoTensor

from compat.registry import CELLS, LAYERS, B, I, Library, Section, T, same, tensors, total

subclasses = Section("Tensors of other kinds")
row = subclasses.row
LENGTHS = (T, 1, 3)


def jagged(*lengths: int) -> Any:
    torch.manual_seed(1)
    rows: Any = [torch.randn(n, I) for n in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)


@row("a jagged nested tensor as input: output and gradient are jagged")
def _(library: Library) -> None:
    for kind in LAYERS:
        layer, x = library.make(kind, batch_first=True), jagged(*LENGTHS)
        y, states = layer(x)
        assert y.is_nested and y.size(1) == x.size(1)
        each = [layer(one[None].detach()) for one in x.unbind()]
        same(list(y.unbind()), [one[0][0] for one in each])
        for i, state in enumerate(tensors(states)):
            same(state, torch.cat([tensors(one)[1 + i] for one in each], 1))
        (slope,) = torch.autograd.grad(y.values().square().sum(), x)
        assert slope.is_nested and slope.values().isfinite().all()


@row("a jagged nested tensor by to_padded_tensor and lengths, and back", ours_only=True)
def _(library: Library) -> None:
    for kind in LAYERS:
        layer, x = library.make(kind, batch_first=True), jagged(*LENGTHS)
        lengths = x.offsets().diff()
        y = layer(x.to_padded_tensor(0.0), lengths=lengths)[0].contiguous()
        back = torch.nested.narrow(
            y, 1, torch.zeros(3, dtype=torch.int64), lengths, layout=torch.jagged
        )
        for found, one in zip(back.unbind(), x.unbind(), strict=True):
            same(found, layer(one[None])[0][0])


def twin(t: Tensor) -> Any:
    return TwoTensor(t.detach().clone(), t.detach() * 2)


@row("a wrapper subclass (TwoTensor) as input")
def _(library: Library) -> None:
    for kind in (*LAYERS, *CELLS):
        module = library.make(kind)
        x = torch.randn(*((B, I) if kind in CELLS else (T, B, I)))
        for found, a, b in zip(*(tensors(module(t)) for t in (twin(x), x, 2 * x)), strict=True):
            assert isinstance(found, TwoTensor)
            same([found.a, found.b], [a, b])


@row("a wrapper subclass (TwoTensor) as parameters, backward")
def _(library: Library) -> None:
    for kind in (*LAYERS, *CELLS):
        module = library.make(kind)
        weights: dict[str, Any] = {
            n: twin(p).requires_grad_() for n, p in module.named_parameters()
        }
        x = twin(torch.randn(*((B, I) if kind in CELLS else (T, B, I))))
        out = tensors(functional_call(module, weights, (x,)))
        loss = torch.stack([t.square().sum() for t in out]).sum()
        found: Any = torch.autograd.grad(loss, list(weights.values()))
        assert all(isinstance(g, TwoTensor) for g in found)
        for second in (False, True):
            parts = {
                n: (w.b if second else w.a).clone().requires_grad_() for n, w in weights.items()
            }
            one = functional_call(module, parts, (x.b if second else x.a,))
            want = torch.autograd.grad(total(one), list(parts.values()))
            same([g.b if second else g.a for g in found], list(want))


class Named(torch.Tensor):
    """A subclass that torch's own __torch_function__ keeps."""


@row("a subclass by __torch_function__ as input: kept as torch.nn keeps it")
def _(library: Library) -> None:
    for kind in (*LAYERS, *CELLS):
        x = torch.randn(*((B, I) if kind in CELLS else (T, B, I)))
        found = tensors(library.make(kind)(x.as_subclass(Named)))
        want = tensors(Library("torch.nn", nn).make(kind)(x.as_subclass(Named)))
        assert [type(t) for t in found] == [type(t) for t in want], kind
        same([t.as_subclass(Tensor) for t in found], [t.as_subclass(Tensor) for t in want])


@row("an override by __torch_function__ sees the call")
def _(library: Library) -> None:
    seen: list[Any] = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    for kind in (*LAYERS, *CELLS):
        x = torch.randn(*((B, I) if kind in CELLS else (T, B, I)))
        seen.clear()
        library.make(kind)(x.as_subclass(Watched))
        assert seen, kind
