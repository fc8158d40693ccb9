"""torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from compat.registry import LAYERS, B, I, Library, Section, T, gradients, same, total

compiling = Section("torch.compile")
row = compiling.row
X = torch.randn(T, B, I)
SIZES = [(T, B), (T + 1, B), (2, 1), (1, B + 2), (T + 3, 1), (T, B + 5)]


def whole(library: Library, check: Callable[[nn.Module, Any], None], **options: Any) -> None:
    """Models and their compiled twins, in one graph."""
    for kind in LAYERS:
        model = library.model(kind, **options)
        check(model, torch.compile(model, fullgraph=True, backend="aot_eager"))


@row("fullgraph, forward and backward, 2 layers, both directions")
def _(library: Library) -> None:
    def check(model: nn.Module, compiled: Any) -> None:
        same(compiled(X), model(X))
        found = torch.autograd.grad(total(compiled(X)), list(model.parameters()))
        same(found, gradients(model, X))

    whole(library, check, num_layers=2, bidirectional=True)


@row("fullgraph, inference under no_grad")
def _(library: Library) -> None:
    with torch.no_grad():
        whole(library, lambda model, compiled: same(compiled(X), model(X)))


@row("dynamic sizes: few graphs for many T and B")
def _(library: Library) -> None:
    for kind in LAYERS:
        model, counter = library.model(kind), CompileCounter()
        compiled = torch.compile(model, backend=counter, dynamic=True)
        for t, b in SIZES:
            x = torch.randn(t, b, I)
            same(compiled(x), model(x))
        assert counter.frame_count <= 4, f"{counter.frame_count} graphs"
        torch.compiler.reset()


@row("a layer that is compiled inside an eager model")
def _(library: Library) -> None:
    for kind in LAYERS:
        model = library.model(kind)
        want = model(X)
        model.layer.compile(backend="aot_eager", fullgraph=True)
        same(model(X), want)


@row("cells in a loop, fullgraph")
def _(library: Library) -> None:
    cell = library.make("GRUCell")

    def loop(x: torch.Tensor) -> Any:
        h = cell(x[0])
        for step in x[1:]:
            h = cell(step, h)
        return h

    same(torch.compile(loop, fullgraph=True, backend="aot_eager")(X), loop(X))


@row("under autocast to bfloat16, fullgraph")
def _(library: Library) -> None:
    def check(model: nn.Module, compiled: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            same(compiled(X), model(X), 0.02)

    whole(library, check)


@row("lengths, reset, return_all_states, fullgraph", ours_only=True)
def _(library: Library) -> None:
    lengths, reset = torch.tensor([T, 1, 0]), torch.rand(T, B) < 0.3
    for kind in LAYERS:
        layer = library.make(kind)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        options: dict[str, Any] = {"lengths": lengths, "reset": reset, "return_all_states": True}
        same(compiled(X, **options), layer(X, **options))


@row("torch.compile of func.grad")
def _(library: Library) -> None:
    for kind in LAYERS:
        model = library.model(kind)

        def loss(x: torch.Tensor, model: nn.Module = model) -> torch.Tensor:
            return total(model(x))

        compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
        same(compiled(X), torch.func.grad(loss)(X))
