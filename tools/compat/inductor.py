"""torch.compile with Inductor, and AOTInductor: what compiles C++."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor import config
from torch.export import Dim

from compat.processes import run
from compat.registry import LAYERS, B, I, Library, Section, T, gradients, same, total

inductor = Section("Inductor and AOTInductor")
X, LONGER = torch.randn(T, B, I), torch.randn(T + 3, B + 2, I)


def row(title: str) -> Callable[[Callable[[Library], None]], Callable[[Library], None]]:
    return inductor.row(title, costly=True)


def trains(library: Library, **options: Any) -> None:
    for kind in LAYERS:
        model = library.model(kind, num_layers=2)
        compiled = torch.compile(model, fullgraph=True, **options)
        found = torch.autograd.grad(total(compiled(X)), list(model.parameters()))
        same(found, gradients(model, X), 1e-4)
        torch.compiler.reset()


@row("fullgraph, forward and backward, 2 layers")
def _(library: Library) -> None:
    trains(library)


@row("mode='reduce-overhead'")
def _(library: Library) -> None:
    trains(library, mode="reduce-overhead")


@row("mode='max-autotune'")
def _(library: Library) -> None:
    trains(library, mode="max-autotune")


@row("freezing, inference")
def _(library: Library) -> None:
    with config.patch(freezing=True), torch.no_grad():
        for kind in LAYERS:
            model = library.model(kind).eval()
            same(torch.compile(model, fullgraph=True)(X), model(X))
            torch.compiler.reset()


@row("a training loop: losses as without")
def _(library: Library) -> None:
    losses: list[list[float]] = []
    for compiles in (False, True):
        model = library.model("GRU")
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        forward: Any = torch.compile(model, fullgraph=True) if compiles else model
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = total(forward(X))
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    same(torch.tensor(losses[1]), torch.tensor(losses[0]))


@row("a second process starts from the first one's cache of graphs")
def _(library: Library) -> None:
    code = f"""
import torch
from {library.module.__name__} import LSTM
from torch._dynamo.utils import counters
torch.manual_seed(0)
layer = LSTM({I}, 6)
torch.compile(layer, fullgraph=True)(torch.ones({T}, {B}, {I}))[0].sum().backward()
print(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])
"""
    with tempfile.TemporaryDirectory() as folder:
        hits = [int(run(code, TORCHINDUCTOR_CACHE_DIR=folder)) for _ in range(2)]
    assert hits[0] == 0 < hits[1], f"hits of the cache: {hits}"


def package(model: nn.Module, path: Path, dynamic: bool = False) -> str:
    shapes = {"x": {0: Dim("T", min=2, max=64), 1: Dim("B", min=2, max=64)}} if dynamic else None
    with torch.no_grad():
        program = torch.export.export(model, (X,), dynamic_shapes=shapes)
        found: str = torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return found


def packages(library: Library, dynamic: bool) -> None:
    x = LONGER if dynamic else X
    with tempfile.TemporaryDirectory() as folder:
        for kind in LAYERS:
            model = library.model(kind).eval()
            path = package(model, Path(folder, f"{kind}.pt2"), dynamic)
            same(torch._inductor.aoti_load_package(path)(x), model(x))


@row("AOTInductor: aoti_compile_and_package, static sizes")
def _(library: Library) -> None:
    packages(library, False)


@row("AOTInductor: dynamic sizes, run at others")
def _(library: Library) -> None:
    packages(library, True)


@row("AOTInductor: a package in a new process that imports the library")
def _(library: Library) -> None:
    model = library.model().eval()
    with tempfile.TemporaryDirectory() as folder:
        path = package(model, Path(folder, "model.pt2"))
        data = os.path.join(folder, "data.pt")
        torch.save([X, model(X)], data)
        run(
            f"import torch, {library.module.__name__}; x, y = torch.load({data!r});"
            f"found = torch._inductor.aoti_load_package({path!r})(x);"
            "torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-5)"
        )
