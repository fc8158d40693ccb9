"""torch.onnx.export: layers and cells become ONNX's operators, which agree in onnxruntime."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_sequence
from torch.onnx._internal.exporter import _flags

import rnnkernels
from helpers import tensors
from rnnkernels._backends import onnx

I, H = 3, 4
X = torch.randn(5, 2, I, generator=torch.Generator().manual_seed(3))
KINDS = ("RNN", "GRU", "LSTM")

#: Of every kind: options of a layer, and which arguments its call has besides the input.
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "one layer": ({}, ()),
    "two layers": ({"num_layers": 2}, ()),
    "bidirectional": ({"bidirectional": True}, ()),
    "batch_first": ({"batch_first": True}, ()),
    "lengths": ({"num_layers": 2, "bidirectional": True}, ("hx", "lengths")),
    "hx": ({"num_layers": 2, "bidirectional": True}, ("hx",)),
}
#: Of one kind each.
MORE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "GRU no bias": ({"bias": False}, ("hx",)),
    "GRU single bias": ({"bias_mode": "single"}, ()),
    "GRU sum": ({"bidirectional": True, "num_layers": 2, "merge_mode": "sum"}, ()),
    "LSTM mean": ({"bidirectional": True, "merge_mode": "mean"}, ("lengths",)),
    "RNN mul": ({"bidirectional": True, "merge_mode": "mul"}, ("hx",)),
    "RNN relu": ({"nonlinearity": "relu"}, ()),
    "RNN sigmoid": ({"nonlinearity": "sigmoid", "bidirectional": True}, ()),
    "LSTM training only": ({"truncate": 2, "grad_clip": 0.1}, ()),
}
ALL = {f"{kind} {case}": how for kind in KINDS for case, how in CASES.items()} | MORE
#: Sizes to run at: T, B and lengths. The first are those of the export.
SIZES = {"exported": (6, 3, [6, 1, 0]), "longer": (9, 5, [1, 9, 0, 4, 9]), "a step": (1, 1, [1])}


class Everything(nn.Module):
    """One layer of each kind for every case, and the cells: one export for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for name, (options, _) in ALL.items():
            self.layers[name] = getattr(rnnkernels, name.split()[0])(I, H, **options)
        self.cells = nn.ModuleDict(
            {kind: getattr(rnnkernels, kind + "Cell")(I, H) for kind in KINDS}
        )

    def forward(self, x: Tensor, h: Tensor, lengths: Tensor) -> list[Tensor]:
        return [t for found in self.results(x, h, lengths).values() for t in found]

    def results(self, x: Tensor, h: Tensor, lengths: Tensor) -> dict[str, list[Tensor]]:
        """All outputs by case. Layers with fewer than four states take the first ones of h."""
        found = {}
        for name, layer in self.layers.items():
            given, hx = ALL[name][1], h[: layer.num_layers * (2 if layer.bidirectional else 1)]
            options: dict[str, Any] = {"lengths": lengths} if "lengths" in given else {}
            if "hx" in given:
                options["hx"] = (hx, -hx) if name.startswith("LSTM") else hx
            input = x.transpose(0, 1) if layer.batch_first else x
            found[name] = tensors(layer(input, **options))
        for name, cell in self.cells.items():
            first = cell(x[0])
            found[f"{name} cell"] = tensors([first, cell(x[0], first)])
        every_h = self.layers["GRU two layers"](x, return_all_states=True)
        return found | {"GRU return_all_states": tensors(every_h)}


def arguments(size: str) -> tuple[Tensor, Tensor, Tensor]:
    T, B, lengths = SIZES[size]
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(T, B, I, generator=generator)
    return x, torch.randn(4, B, H, generator=generator), torch.tensor(lengths)


NAMES = [*ALL, *(f"{kind} cell" for kind in KINDS), "GRU return_all_states"]


@pytest.fixture(scope="session")
def exported() -> Iterator[tuple[Everything, Any]]:
    """The model and a session of onnxruntime with its export, whose T and B are dynamic. Without
    the optimizer, which takes far longer than all the rest."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, T, B = Everything().eval(), Dim("T"), Dim("B")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it has no torchvision to say of
    shapes = ({0: T, 1: B}, {1: B}, {0: B})
    options = {"dynamo": True, "dynamic_shapes": shapes, "verbose": False, "optimize": False}
    with torch.no_grad():
        program = torch.onnx.export(model, arguments("exported"), **options)
    assert program is not None
    operators = {node.op_type for node in program.model.graph}
    assert {"RNN", "GRU", "LSTM"} <= operators and "Loop" not in operators
    yield model, runtime.InferenceSession(program.model_proto.SerializeToString())


@pytest.fixture(scope="session")
def runs(exported: Any) -> dict[str, tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]]:
    """What onnxruntime and the layers themselves return, by size and case."""
    model, session = exported
    found = {}
    for size in SIZES:
        args = arguments(size)
        with torch.no_grad():
            want = model.results(*args)
        names = [i.name for i in session.get_inputs()]
        values = session.run(None, dict(zip(names, (t.numpy() for t in args), strict=True)))
        rest = iter(values)
        got = {name: [torch.from_numpy(next(rest)) for _ in some] for name, some in want.items()}
        assert next(rest, None) is None
        found[size] = got, want
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter's own
@pytest.mark.parametrize("name", NAMES)
def test_agrees_in_onnxruntime(name: str, runs: Any) -> None:
    """At the sizes of the export and at others; rows of length 0 keep their states."""
    for size, (got, want) in runs.items():
        for i, pair in enumerate(zip(got[name], want[name], strict=True)):
            message = f"output {i} at {size}: {{}}".format
            torch.testing.assert_close(*pair, rtol=0, atol=1e-5, msg=message)


def test_every_case_is_compared() -> None:
    assert set(NAMES) == set(Everything().results(*arguments("exported")))


@pytest.fixture
def exporting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.onnx.export(dynamo=True) sets while it has torch.export run the model."""
    monkeypatch.setattr(_flags, "_is_onnx_exporting", True)


def called(module: nn.Module, *args: Any) -> list[str]:
    """The ONNX operators of a program that torch.export records."""
    program = torch.export.export(module, args, strict=False)
    return [
        node.args[1] for node in program.graph.nodes if "symbolic_multi_out" in str(node.target)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_one_operator_for_a_layer_with_both_directions(kind: str, exporting: None) -> None:
    """Also where kernels were asked for by name; without the exporter the op stays what it is."""
    layer = getattr(rnnkernels, kind)(I, H, num_layers=2, bidirectional=True)
    assert called(layer, X) == [kind, kind]
    layer.backend = "cpu"
    assert called(layer, X) == [kind, kind]
    _flags._is_onnx_exporting = False
    assert called(layer, X) == []


def test_reference_is_written_out_step_by_step(exporting: None) -> None:
    with rnnkernels.use_backend("reference"):
        assert called(rnnkernels.GRU(I, H), X) == []


class Calls(nn.Module):
    """A layer and options of its call."""

    def __init__(self, layer: nn.Module, **options: Any) -> None:
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, **self.options)


RESET = torch.zeros(5, 2, dtype=torch.bool)
REFUSED = {
    "proj_size": Calls(rnnkernels.LSTM(I, H, proj_size=2)),
    "reset": Calls(rnnkernels.GRU(I, H), reset=RESET),
    "return_all_states": Calls(rnnkernels.LSTM(I, H), return_all_states=True),
}


@pytest.mark.parametrize("named", REFUSED)
def test_names_what_onnx_has_not(named: str, exporting: None) -> None:
    says = rf"torch\.onnx\.export: .* in ONNX's operators: {named}"
    with pytest.raises(RuntimeError, match=says):
        torch.export.export(REFUSED[named], (X,), strict=False)


def test_names_a_cell_that_onnx_has_not(exporting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(onnx.OPERATORS, "gru")
    with pytest.raises(RuntimeError, match="ONNX's operators: none of them is the cell gru"):
        torch.export.export(rnnkernels.GRU(I, H), (X,), strict=False)


def older(model: nn.Module, *args: Tensor) -> bytes:
    """With the exporter that records by torch.jit.trace."""
    file, names = io.BytesIO(), [f"in{i}" for i in range(len(args))]
    axes = {names[0]: {0: "T", 1: "B"}}
    try:
        torch.onnx.export(model, args, file, dynamo=False, input_names=names, dynamic_axes=axes)
    finally:
        torch.set_autocast_cache_enabled(True)  # which that exporter leaves off where it fails
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")  # of that exporter, about torch.nn's layers
@pytest.mark.parametrize("kind", KINDS)
def test_older_exporter_takes_torchs_operators(kind: str) -> None:
    """dynamo=False: T and B are dynamic there too, with both directions merged or side by side."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    for options in ({}, {"merge_mode": "sum"}):
        layer = getattr(rnnkernels, kind)(I, H, num_layers=2, bidirectional=True, **options)
        session = runtime.InferenceSession(older(nn.Sequential(layer.eval()), X))
        for x in (X, torch.randn(7, 3, I)):
            got = session.run(None, {"in0": x.numpy()})
            for value, want in zip(got, tensors(layer(x)), strict=True):
                torch.testing.assert_close(torch.from_numpy(value), want, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "call", "says"),
    [
        ({}, {"lengths": torch.tensor([5, 2])}, "takes no lengths.*With dynamo=True it can"),
        ({}, {"reset": RESET}, "takes no reset$"),
        ({"nonlinearity": "sigmoid"}, {}, "no cell 'rnn_sigmoid'.*With dynamo=True it can"),
        ({"bias_mode": "single"}, {}, "two biases or none.*With dynamo=True it can"),
    ],
    ids=["lengths", "reset", "sigmoid", "single bias"],
)
def test_older_exporter_names_what_it_has_not(options: Any, call: Any, says: str) -> None:
    with pytest.raises(RuntimeError, match=rf"torch\.onnx\.export: .*dynamo=False: .*{says}"):
        older(Calls(rnnkernels.RNN(I, H, **options), **call), X)


@pytest.mark.filterwarnings("ignore")
def test_older_exporter_names_a_packed_sequence() -> None:
    packed = pack_sequence([X[:, 0], X[:3, 1]])

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = rnnkernels.GRU(I, H)

        def forward(self, data: Tensor) -> Any:
            return self.gru(packed._replace(data=data))[1]

    with pytest.raises(RuntimeError, match="dynamo=False: a PackedSequence; pass lengths"):
        older(Packed(), packed.data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_layer_by_itself_as_users_export_it() -> None:
    """With torch's optimizer, into a file, in training mode and with gradients enabled."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    layer, file = rnnkernels.LSTM(I, H, bidirectional=True), io.BytesIO()
    torch.onnx.export(layer, (X,), file, dynamo=True, verbose=False)
    session = runtime.InferenceSession(file.getvalue())
    got = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    for value, want in zip(got, tensors(layer(X)), strict=True):
        torch.testing.assert_close(torch.from_numpy(value), want, rtol=0, atol=1e-5)
