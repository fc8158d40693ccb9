"""What gradient_flow records, shows and refuses, and that it changes nothing else."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnkernels
from cases import NAMES
from flow_layers import F64, LENGTHS, B, H, I, T, build
from helpers import draw, outputs_and_gradients
from rnnkernels import _backends
from rnnkernels._core.call import Call
from rnnkernels.diagnostics import GradientFlow, Record, gradient_flow
from rnnkernels.diagnostics._flow import _Norms

# What is recorded


class Model(nn.Module):
    """Three layers in two modules, and a cell that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = rnnkernels.GRU(I, H, 2, bidirectional=True, dtype=F64)
        self.top = nn.ModuleList([rnnkernels.LSTM(2 * H, H, dtype=F64)])
        self.step = rnnkernels.RNNCell(H, 2, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.top[0](self.encoder(x)[0])
        h = self.step(y[0])
        return self.step(y[1], h)


X = draw(T, B, I, seed=1, dtype=F64)
KEYS = [("encoder", 0), ("encoder", 1), ("top.0", 0), ("step", -1)]


def test_records(backend: str) -> None:
    model = Model()
    with gradient_flow(model) as flow:
        model(X).sum().backward()
        keys = [(r.module, r.layer) for r in flow.records]
        assert keys == [KEYS[3], KEYS[3], KEYS[2], KEYS[1], KEYS[0]]
        shapes = [r.norms.shape for r in flow.records]
        assert shapes == [(1, B, 1), (1, B, 1), (T, B, 1), (T, B, 2), (T, B, 2)]
        model(X).sum().mul(2).backward()
    assert len(flow.records) == 10
    for first, second in zip(flow.records[:5], flow.records[5:], strict=True):
        torch.testing.assert_close(second.norms, 2 * first.norms)
    for key, record in zip(KEYS, flow.records[:5:-1], strict=True):
        torch.testing.assert_close(flow.norms(*key), record.norms.norm(dim=1))
    flow.clear()
    assert flow.records == []
    with pytest.raises(RuntimeError, match="recorded nothing"):
        flow.norms("top.0")


def test_backward_may_come_after_the_block(backend: str) -> None:
    model = Model()
    with gradient_flow(model) as flow:
        loss = model(X).sum()
    assert flow.records == []
    model(X).sum().backward()  # of a forward outside
    assert flow.records == []
    loss.backward()
    assert len(flow.records) == 5


def test_every_backward_is_a_record_of_its_own(backend: str) -> None:
    module = build("gru")
    with gradient_flow(module) as flow:
        y = module(X)[0]
        y.sum().backward(retain_graph=True)
        once = flow.norms()
        (3 * y).sum().backward()
    first, second = flow.records
    torch.testing.assert_close(first.norms.norm(dim=1), once, rtol=1e-14, atol=0)
    torch.testing.assert_close(second.norms, 3 * first.norms, rtol=1e-12, atol=0)


def test_double_backward(backend: str) -> None:
    module, x = build("lstm"), X.clone().requires_grad_()
    with gradient_flow(module) as flow:
        y = module(x)[0]
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        once = flow.norms()
        module(x)[0].sum().backward()
        torch.testing.assert_close(flow.norms(), once)
        dx.pow(2).sum().backward()
    # The backward of a gradient is none of the layer's own.
    assert len(flow.records) == 2
    torch.testing.assert_close(flow.records[0].norms.norm(dim=1), once)


def test_blocks_nest() -> None:
    model = Model()
    with gradient_flow(model) as outer:
        with gradient_flow(model.top) as inner:
            model(X).sum().backward()
        assert [r.module for r in inner.records] == ["0"]
        assert len(outer.records) == 5
        assert torch.equal(inner.records[0].norms, outer.records[2].norms)
        rnnkernels.explain(model, X)
        model(X).sum().backward()
    assert len(inner.records) == 1 and len(outer.records) == 10


def test_only_what_trains_inside_the_model_is_recorded() -> None:
    model, other = Model(), build("gru")
    with gradient_flow(model) as flow:
        with torch.no_grad():
            model(X)
        other(X)[0].sum().backward()
        rnnkernels.functional.gru(X, None, other.all_weights)[0].sum().backward()
        with rnnkernels.use_backend("torch"), torch.no_grad():
            model.encoder(X)
    assert flow.records == []


def test_an_error_inside_a_layer_leaves_no_name_behind() -> None:
    model, other = Model(), build("gru")
    with gradient_flow(model) as flow:
        with pytest.raises(RuntimeError, match="input_size"):
            model.encoder(X[..., :2])
        other(X)[0].sum().backward()
        assert flow.records == []
        model(X).sum().backward()
    assert len(flow.records) == 5


def state(model: nn.Module) -> list[Any]:
    parts = list(model.modules())
    return [
        _backends._observer,
        *[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in parts],
    ]


def test_nothing_is_left_behind() -> None:
    model = Model()
    before = state(model)
    assert before[0] is None
    with gradient_flow(model):
        assert state(model) != before
        model(X)
    assert state(model) == before
    with pytest.raises(KeyError), gradient_flow(model):
        raise KeyError
    assert state(model) == before
    model.encoder.truncate = (2, 3)
    with pytest.raises(NotImplementedError), gradient_flow(model):
        model(X)
    assert state(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("cell", NAMES)
def test_results_are_the_same_to_the_bit(backend: str, cell: str, dtype: torch.dtype) -> None:
    module = build(cell, 2, bidirectional=True).to(dtype)
    x = draw(T, B, I, seed=1, dtype=dtype).requires_grad_()
    plain = outputs_and_gradients(module, [x], dtype, lengths=LENGTHS)
    with gradient_flow(module) as flow:
        seen = outputs_and_gradients(module, [x], dtype, lengths=LENGTHS)
    assert len(flow.records) == 2 and plain.keys() == seen.keys()
    for name, value in plain.items():
        assert value is not None and torch.equal(value, seen[name]), name


# Text and picture


def vanishing() -> GradientFlow:
    """Norms 1e-2 to 1e+2 forward and the other way in reverse, made by hand."""
    model = build("gru", 2, bidirectional=True)
    with gradient_flow(model) as flow:
        model(X)
    up = torch.logspace(-2, 2, 5, dtype=F64)
    both = [torch.stack([up, up.flip(0) * 10**layer], 1)[:, None] for layer in range(2)]
    norms = _Norms(torch.stack(both), None)
    for layer in range(2):
        flow._latest["", layer] = Record("", layer, norms)
    return flow


def test_table() -> None:
    assert vanishing().table().splitlines() == [
        "                  T   first t  middle t    last t  start / end",
        "layer 0           5  1.00e-02  1.00e+00  1.00e+02     1.00e-04",
        "layer 0, reverse  5  1.00e+02  1.00e+00  1.00e-02     1.00e-04",
        "layer 1           5  1.00e-02  1.00e+00  1.00e+02     1.00e-04",
        "layer 1, reverse  5  1.00e+03  1.00e+01  1.00e-01     1.00e-04",
    ]


def test_plot() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    flow = vanishing()
    ax = flow.plot()
    assert [line.get_label() for line in ax.lines] == [
        "layer 0",
        "layer 0, reverse",
        "layer 1",
        "layer 1, reverse",
    ]
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--"] * 2
    assert ax.get_yscale() == "log" and ax.get_xlabel() == "t" and "dL/dh" in ax.get_ylabel()
    assert len(ax.get_legend().get_texts()) == 4
    assert list(ax.lines[1].get_ydata()) == flow.norms()[:, 1].tolist()
    assert flow.plot(ax) is ax and len(ax.lines) == 8
    model = Model()
    with gradient_flow(model) as flow:
        model(X).sum().backward()
    ax = flow.plot()
    assert [line.get_label() for line in ax.lines][4:] == ["top.0, layer 0", "step"]
    ax.figure.canvas.draw()
    pyplot.close("all")


def test_plot_of_nothing_but_zeros() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    module = build("gru")
    with gradient_flow(module) as flow:
        module(X)[0].mul(0).sum().backward()
    flow.plot().figure.canvas.draw()
    assert flow.table().endswith("-")
    pyplot.close("all")


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        vanishing().plot()


# Errors


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"), gradient_flow(3):  # type: ignore[arg-type]
        pass
    theirs = nn.Sequential(nn.GRU(I, H))
    with (
        pytest.raises(ValueError, match=r"found none in Sequential; rnnkernels\.convert"),
        gradient_flow(theirs),
    ):
        pass
    with gradient_flow(rnnkernels.convert(theirs)):
        pass


def test_nothing_recorded() -> None:
    model = Model()
    with gradient_flow(model) as flow:
        loss = model(X).sum()
    for ask in (flow.norms, flow.table, flow.plot):
        with pytest.raises(RuntimeError, match="run the model inside its block, and backward"):
            ask()
    loss.backward()
    with pytest.raises(ValueError) as error:
        flow.norms("encoder", 2)
    assert "('encoder', 0), ('encoder', 1), ('top.0', 0), ('step', -1)" in str(error.value)
    assert "got ('encoder', 2)" in str(error.value)


def test_overlapping_windows() -> None:
    module = build("gru")
    with gradient_flow(module):
        with pytest.raises(NotImplementedError, match=r"\(3, 5\).*use truncate=k"):
            module(X, truncate=(3, 5))
        module.truncate = (2, 3)  # type: ignore[assignment]
        with pytest.raises(NotImplementedError, match=r"\(2, 3\)"):
            module(X)
        with torch.no_grad():
            module(X)
        module(X, truncate=None)  # the call's own word counts
        module.truncate = 3  # type: ignore[assignment]
        module(X)


def test_the_torch_backend_refuses() -> None:
    module = rnnkernels.GRU(I, H, backend="torch")
    with gradient_flow(module), pytest.raises(RuntimeError, match="does not record the norms"):
        module(X.float())


# Compiled models


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by the compiler
def test_compiled_models_run_their_layers_outside_of_graphs() -> None:
    torch._dynamo.reset()
    model = Model()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(X).sum().backward()
    for _ in range(2):
        with gradient_flow(model) as flow:
            compiled(X).sum().backward()
        assert {(r.module, r.layer) for r in flow.records} == set(KEYS)
        with gradient_flow(model) as true:
            model(X).sum().backward()
        for key in KEYS:
            torch.testing.assert_close(flow.norms(*key), true.norms(*key))
    compiled(X).sum().backward()
    assert len(flow.records) == 5
    torch._dynamo.reset()


def test_whole_graphs_refuse() -> None:
    torch._dynamo.reset()
    model = build("gru")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with gradient_flow(model), pytest.raises(RuntimeError, match="run the model itself"):
        compiled(X)
    compiled(X)[0].sum().backward()
    torch._dynamo.reset()


def test_the_call_is_what_the_layer_asked_for() -> None:
    """Recording replaces nothing but ``flow``."""
    calls: list[Call] = []

    def look(call: Call, name: str | None) -> Any:
        calls.append(call)
        return _backends.select(call, name).run(call)

    module = build("gru")
    with _backends.observe(look):
        module(X)
        with gradient_flow(module):
            module(X)
    plain, seen = calls
    assert plain.flow is None and seen.flow is not None
    for field in ("cell_name", "all_states", "layers", "window", "clip", "lengths", "reset"):
        assert getattr(plain, field) == getattr(seen, field)
