"""Ways out of Python."""

from __future__ import annotations

import importlib
import io
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from compat.processes import run
from compat.registry import LAYERS, B, I, Library, Section, T, gradients, same, tensors, total

export = Section("Export")
row = export.row
X = torch.randn(T, B, I)
LONGER = torch.randn(T + 4, B + 2, I)


def program(model: nn.Module, dynamic: bool = True, strict: bool = False) -> Any:
    shapes = {"x": {0: Dim("T"), 1: Dim("B")}} if dynamic else None
    return torch.export.export(model, (X,), dynamic_shapes=shapes, strict=strict)


def each(library: Library, check: Callable[[nn.Module], None], **options: Any) -> None:
    for kind in LAYERS:
        check(library.model(kind, **options).eval())


@row("torch.export, T and B dynamic")
def _(library: Library) -> None:
    each(library, lambda m: same(program(m).module()(LONGER), m(LONGER)))


@row("torch.export, strict, static sizes")
def _(library: Library) -> None:
    each(library, lambda m: same(program(m, dynamic=False, strict=True).module()(X), m(X)))


@row("torch.export, then run_decompositions")
def _(library: Library) -> None:
    each(library, lambda m: same(program(m, False).run_decompositions().module()(X), m(X)))


@row("an exported program trains")
def _(library: Library) -> None:
    model = library.model()
    same(gradients(program(model, dynamic=False).module(), X), gradients(model, X))


class Mapped(nn.Module):
    """Lanes [T, lanes, B, I] of a GRU, whose weights the vmap is given."""

    def __init__(self, library: Library) -> None:
        super().__init__()
        self.library, self.layer = library, library.make("GRU")

    def forward(self, x: Tensor) -> Any:
        def lane(x: Tensor, *weights: Tensor) -> Any:
            if self.library.ours:
                return self.library.module.functional.gru(x, None, [weights])[0]
            h = x.new_zeros(1, x.size(1), weights[1].size(1))
            return torch.gru(x, h, weights, True, 1, 0.0, False, False, False)[0]

        weights = [p.detach() for p in self.layer.parameters()]
        return torch.vmap(lane, (1, *[None] * len(weights)), 1)(x, *weights)


def maps(library: Library, strict: bool) -> None:
    model, x = Mapped(library), torch.randn(T, 2, B, I)
    found = torch.export.export(model, (x,), strict=strict).run_decompositions()
    same(found.module()(x), model(x))


@row("torch.export, strict, of a vmap over inputs that is given the weights")
def _(library: Library) -> None:
    maps(library, strict=True)


@row(
    "torch.export of a vmap over inputs",
    exception="torch 2.13 exports none unless it is `strict`, whatever it maps, `x * 2` as well.",
)
def _(library: Library) -> None:
    maps(library, strict=False)


def loads(library: Library, imports: str) -> None:
    """A saved program in a process of its own."""
    model = library.model().eval()
    with tempfile.TemporaryDirectory() as folder:
        path, data = Path(folder, "program.pt2"), Path(folder, "data.pt")
        torch.export.save(program(model, dynamic=False), path)
        torch.save([X, model(X)], data)
        code = (
            f"import torch{imports}; x, y = torch.load({str(data)!r});"
            f"torch.testing.assert_close(torch.export.load({str(path)!r}).module()(x), y)"
        )
        run(code)


@row("export.save, load in a new process that imports the library", costly=True)
def _(library: Library) -> None:
    loads(library, ", rnnkernels")


@row(
    "export.save, load in a process that imports torch alone",
    costly=True,
    exception="torch looks ops up by name while it reads the file, and calls nobody who could "
    "say more than its own error: `import rnnkernels` first.",
)
def _(library: Library) -> None:
    loads(library, "")


@row("the library of the ops alone, without the Python package", ours_only=True, costly=True)
def _(library: Library) -> None:
    path = str(library.module.library_path())
    found = run(
        f"import sys, torch; torch.ops.load_library({path!r});"
        "torch.ops.rnnkernels.sequence_forward.default._schema;"
        "print('rnnkernels' in sys.modules)"
    )
    assert found.strip() == "False"


class Varying(nn.Module):
    """A layer of rows of unequal lengths."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y: Tensor = self.layer(x, lengths=lengths)[0]
        return y


@row("torch.export with states as input and output, B dynamic")
def _(library: Library) -> None:
    class Stream(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, h: Tensor) -> Any:
            return self.layer(x, h)

    rows = Dim("B")
    for kind in ("RNN", "GRU"):
        model = Stream(library.make(kind)).eval()
        exported = torch.export.export(
            model, (X, torch.randn(1, B, 6)), dynamic_shapes={"x": {1: rows}, "h": {1: rows}}
        )
        x, h = torch.randn(T, B + 2, I), torch.randn(1, B + 2, 6)
        same(exported.module()(x, h), model(x, h))


@row(
    "jit.script of a layer by itself, called",
    exception="TorchScript names no method `forward` where there are several, as of torch.nn's "
    "layers, which it compiles in place of ours. A model that holds a layer works.",
)
def _(library: Library) -> None:
    for kind in LAYERS:
        layer = library.make(kind)
        same(torch.jit.script(layer)(X), layer(X))


@row("jit.script of a model that holds a layer")
def _(library: Library) -> None:
    def check(model: nn.Module) -> None:
        want = model(X)
        same(torch.jit.script(model)(X), want)

    each(library, check)


@row("jit.trace, saved, loaded, frozen, run at other sizes")
def _(library: Library) -> None:
    def check(model: nn.Module) -> None:
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, (X,), check_trace=False), file)
        file.seek(0)
        same(torch.jit.freeze(torch.jit.load(file))(LONGER), model(LONGER))

    each(library, check)


@row("jit.trace with its check, run at other sizes")
def _(library: Library) -> None:
    each(library, lambda m: same(torch.jit.trace(m, (X,))(LONGER), m(LONGER)))


@row("jit.trace with its check, lengths as an input", ours_only=True)
def _(library: Library) -> None:
    lengths, others = torch.tensor([T, *[T - 2] * (B - 1)]), torch.tensor([1, *[T + 1] * (B + 1)])

    def check(model: Any) -> None:
        layer = model.layer
        traced = torch.jit.trace(Varying(layer), (X, lengths))
        same(traced(LONGER, others), layer(LONGER, lengths=others)[0])

    each(library, check)


@row("jit.trace: gradients through the traced module; optimize_for_inference")
def _(library: Library) -> None:
    def check(model: nn.Module) -> None:
        traced = torch.jit.trace(model, (X,), check_trace=False)
        found = torch.autograd.grad(total(traced(LONGER)), list(model.parameters()))
        same(found, gradients(model, LONGER))
        same(torch.jit.optimize_for_inference(torch.jit.freeze(traced))(LONGER), model(LONGER))

    each(library, check)


@row("fx.symbolic_trace of a model that holds a layer")
def _(library: Library) -> None:
    each(library, lambda m: same(fx.symbolic_trace(m)(LONGER), m(LONGER)))


@row("make_fx, symbolic sizes")
def _(library: Library) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def traced(model: nn.Module) -> Any:
        return make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(X)

    each(library, lambda m: same(traced(m)(X), m(X)))


def onnx(model: nn.Module, args: Sequence[Tensor], sizes: Any = None, **options: Any) -> Any:
    """A session of onnxruntime with the model."""
    runtime = importlib.import_module("onnxruntime")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    file: Any = io.BytesIO()
    names = [f"in{i}" for i in range(len(args))]
    torch.onnx.export(model, tuple(args), file, input_names=names, verbose=False, **options)
    session = runtime.InferenceSession(file.getvalue())
    return lambda *given: [
        torch.from_numpy(t)
        for t in session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})
    ]


RUNTIME = ("onnx", "onnxscript", "onnxruntime")
DYNAMIC = {"dynamo": True, "dynamic_shapes": {"x": {0: Dim("T"), 1: Dim("B")}}}
STACK = {"num_layers": 2, "bidirectional": True}


@row("onnx.export dynamo=True, static sizes, in onnxruntime", needs=RUNTIME)
def _(library: Library) -> None:
    each(library, lambda m: same(onnx(m, [X], dynamo=True)(X), [m(X)]))


@row("onnx.export dynamo=True, T and B dynamic", needs=RUNTIME)
def _(library: Library) -> None:
    each(library, lambda m: same(onnx(m, [X], **DYNAMIC)(LONGER), [m(LONGER)]))


@row("onnx.export dynamo=True, 2 layers, both directions", needs=RUNTIME)
def _(library: Library) -> None:
    each(library, lambda m: same(onnx(m, [X], **DYNAMIC)(LONGER), [m(LONGER)]), **STACK)


@row("onnx.export dynamo=True, lengths as an input", ours_only=True, needs=RUNTIME)
def _(library: Library) -> None:
    class Padded(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            return self.layer(x, lengths=lengths)

    lengths = torch.tensor([T, 0, 2])
    for kind in LAYERS:
        model = Padded(library.make(kind)).eval()
        same(onnx(model, [X, lengths], dynamo=True)(X, lengths), tensors(model(X, lengths)))


@row("onnx.export dynamo=False, static sizes", needs=RUNTIME)
def _(library: Library) -> None:
    each(library, lambda m: same(onnx(m, [X], dynamo=False)(X), [m(X)]))


@row("onnx.export dynamo=False, T and B dynamic", needs=RUNTIME)
def _(library: Library) -> None:
    axes = {"dynamo": False, "dynamic_axes": {"in0": {0: "T", 1: "B"}}}
    each(library, lambda m: same(onnx(m, [X], **axes)(LONGER), [m(LONGER)]), **STACK)


@row("onnx.export of a model after rnnkernels.revert", ours_only=True, needs=RUNTIME)
def _(library: Library) -> None:
    axes = {"dynamo": False, "dynamic_axes": {"in0": {0: "T", 1: "B"}}}
    for kind in LAYERS:
        model = library.model(kind).eval()
        want = model(LONGER)
        library.module.revert(model)
        same(onnx(model, [X], **axes)(LONGER), [want])
        same(onnx(model, [X], dynamo=True)(X), [model(X)])
