"""torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import checkpoint as checkpoints

from compat.registry import CELLS, LAYERS, B, I, Library, Section, T, gradients, same, total

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


@row("fullgraph, both directions, dropout between layers, batch_first", costly=True)
def _(library: Library) -> None:
    def check(model: nn.Module, compiled: Any) -> None:
        torch.manual_seed(1)
        want = model(X)
        torch.manual_seed(1)
        same(compiled(X), want)

    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "dropout": 0.5}
    whole(library, check, batch_first=True, **options)


@row("fullgraph, inference under no_grad")
def _(library: Library) -> None:
    with torch.no_grad():
        whole(library, lambda model, compiled: same(compiled(X), model(X)))


@row("dynamic sizes: few graphs for many T and B", costly=True)
def _(library: Library) -> None:
    for kind in LAYERS:
        model, counter = library.model(kind), CompileCounter()
        compiled = torch.compile(model, backend=counter, dynamic=True)
        for t, b in SIZES:
            x = torch.randn(t, b, I)
            same(compiled(x), model(x))
        assert counter.frame_count <= 4, f"{counter.frame_count} graphs"
        torch.compiler.reset()


def graphs_for(library: Library, sizes: Sequence[tuple[int, int]], most: int) -> None:
    """Right numbers at these sizes with the settings that torch.compile has by itself."""
    for kind in LAYERS:
        model, counter = library.model(kind), CompileCounter()
        compiled = torch.compile(model, backend=counter)
        for t, b in sizes:
            x = torch.randn(t, b, I)
            same(compiled(x), model(x))
        assert counter.frame_count <= most, f"{counter.frame_count} graphs"
        torch.compiler.reset()


@row("ten T and five B: one recompile at most")
def _(library: Library) -> None:
    graphs_for(library, [(t, 2 + t % 5) for t in range(2, 12)], 2)


# torch makes a graph of its own of a size of 1, and another once a size has changed.
@row("a smaller last batch; B = 1 and T = 1 in between")
def _(library: Library) -> None:
    graphs_for(library, [(T, B), (T, B), (T, 2), (T, 1), (1, B), (T + 1, B)], 5)


@row("states carried over chunks: one graph but for the first call")
def _(library: Library) -> None:
    for kind in LAYERS:
        layer, counter = library.make(kind), CompileCounter()
        compiled = torch.compile(layer, backend=counter)
        hx = None
        for _ in range(5):
            _, hx = compiled(X, hx)
            hx = tuple(t.detach() for t in hx) if isinstance(hx, tuple) else hx.detach()
        assert counter.frame_count <= 2, f"{counter.frame_count} graphs"
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


@row("cells over five B: one recompile at most")
def _(library: Library) -> None:
    for kind in CELLS:
        cell, counter = library.make(kind), CompileCounter()
        compiled = torch.compile(cell, backend=counter, fullgraph=True)
        for b in range(2, 7):
            x = torch.randn(b, I)
            same(compiled(x), cell(x))
        assert counter.frame_count <= 2, f"{counter.frame_count} graphs"
        torch.compiler.reset()


@row("a PackedSequence as input", costly=True)
def _(library: Library) -> None:
    packed = pack_padded_sequence(X, torch.tensor([T, 2, 1]))
    for kind in LAYERS:
        layer = library.make(kind)
        found, want = torch.compile(layer, backend="aot_eager")(packed)[0], layer(packed)[0]
        same(found.data, want.data)


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


@row("truncate=k and (k1, k2), grad_clip, fullgraph", ours_only=True, costly=True)
def _(library: Library) -> None:
    for option in ({"truncate": 2}, {"truncate": (2, 3)}, {"grad_clip": ("norm", 0.1)}):
        layer = library.make("GRU", **option)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(total(compiled(X)), list(layer.parameters()))
        same(found, gradients(layer, X))


@row("a step of the optimiser is compiled")
def _(library: Library) -> None:
    twins = [library.model() for _ in range(2)]
    for model, compiles in zip(twins, (False, True), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiles else optimizer.step
        for _ in range(2):
            optimizer.zero_grad()
            total(model(X)).backward()
            step()
    same(list(twins[1].parameters()), list(twins[0].parameters()))


@row("compiled autograd", costly=True)
def _(library: Library) -> None:
    for kind in LAYERS:
        model = library.model(kind)
        want = gradients(model, X)
        model.zero_grad()
        with compiled_autograd._enable(torch.compile(backend="aot_eager")):
            total(model(X)).backward()
        same([p.grad for p in model.parameters()], want)
        torch.compiler.reset()


@row("an activation checkpoint inside", costly=True)
def _(library: Library) -> None:
    for kind in LAYERS:
        model = library.model(kind)

        def run(x: torch.Tensor, model: nn.Module = model) -> Any:
            return checkpoints.checkpoint(model, x, use_reentrant=False)

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(total(compiled(X)), list(model.parameters()))
        same(found, gradients(model, X))


@row("torch.compiler.disable; set_stance('eager_on_recompile')")
def _(library: Library) -> None:
    model = library.model("GRU")
    want, wider = model(X), torch.randn(T + 2, B + 1, I)
    model.layer.forward = torch.compiler.disable(model.layer.forward)
    same(torch.compile(model, backend="aot_eager")(X), want)
    model = library.model("GRU")
    compiled = torch.compile(model, backend="aot_eager")
    same(compiled(X), want)
    with torch.compiler.set_stance("eager_on_recompile"):
        same(compiled(wider), model(wider))


@row("torch.compile of func.grad", costly=True)
def _(library: Library) -> None:
    for kind in LAYERS:
        model = library.model(kind)

        def loss(x: torch.Tensor, model: nn.Module = model) -> torch.Tensor:
            return total(model(x))

        compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
        same(compiled(X), torch.func.grad(loss)(X))


@row("torch.compile of vmap(grad)", costly=True)
def _(library: Library) -> None:
    for kind in LAYERS:
        model = library.model(kind)
        weights = {n: p.detach() for n, p in model.named_parameters()}

        def loss(p: Any, x: torch.Tensor, model: nn.Module = model) -> torch.Tensor:
            return total(functional_call(model, p, (x,)))

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
        xs = torch.stack([X, 2 * X])
        found = torch.compile(each, fullgraph=True, backend="aot_eager")(weights, xs)
        same(list(found.values()), list(each(weights, xs).values()))
