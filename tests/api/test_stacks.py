"""Modules of several layers against the same layers one by one."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkernels
from graphs import Graphs, Model, assert_same, options_for, result, tokens
from helpers import compare, draw, outputs_and_gradients, same_bits
from rnnkernels import _ops
from rnnkernels.cells import CELLS
from rnnkernels.diagnostics import gradient_flow
from rnnkernels.functional import _stack as stack

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

F64 = torch.float64


class OneByOne(nn.Module):
    """The layers of a module as modules of one layer each, on the same parameters."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, hx: Any = None, **options: Any) -> Any:
        m = self.module
        D, has_c = 2 if m.bidirectional else 1, CELLS[m.cell].S > 1
        kind = getattr(rnnkernels.functional, m.mode.split("_")[0].lower())
        if m.mode.startswith("RNN"):
            options["nonlinearity"] = m.cell.removeprefix("rnn_")
        states, every = [], []
        for layer in range(m.num_layers):
            rows = slice(layer * D, (layer + 1) * D)
            mine = hx
            if hx is not None:
                mine = (hx[0][rows], hx[1][rows]) if has_c else hx[rows]
            x, last, *more = kind(
                x,
                mine,
                m.all_weights[rows],
                bidirectional=m.bidirectional,
                batch_first=m.batch_first,
                merge_mode=m.merge_mode,
                **{"grad_clip": m.grad_clip, "truncate": m.truncate, **options},
            )
            states.append(last)
            every += more
            if layer + 1 < m.num_layers:
                x = self.dropped(x)
        last = tuple(map(torch.cat, zip(*states, strict=True))) if has_c else torch.cat(states)
        if not every:
            return x, last
        h, c = zip(*every, strict=True)
        return x, last, (sum(h, ()), sum(c, ()) if has_c else None)

    def dropped(self, x: Tensor) -> Tensor:
        """What falls out is drawn for x as it lies in memory."""
        if not self.module.training or not self.module.dropout:
            return x
        turned = x.transpose(0, 1) if self.module.batch_first else x
        ones = F.dropout(
            torch.ones_like(turned, memory_format=torch.contiguous_format), self.module.dropout
        )
        return (turned * ones).transpose(0, 1) if self.module.batch_first else turned * ones


def by_name(found: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name.replace("module.", ""): t for name, t in found.items()}


def both_ways(module: Any, args: Any, **extra: Any) -> list[dict[str, Tensor | None]]:
    """Results and gradients in one call, and layer by layer, after the same seed."""
    found = []
    for way in (module, OneByOne(module)):
        torch.manual_seed(3)
        found.append(by_name(outputs_and_gradients(way, args, F64, **extra)))
    return found


T, B, I, H = 6, 3, 4, 5
RESET = torch.arange(T * B).view(T, B) % 5 == 3
#: Those with a function of their own, which runs the layers one by one.
NAMES = [name for name in CELLS if hasattr(rnnkernels.functional, name.split("_")[0])]
#: What a module is made with, and what it is called with.
USES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "rows": ({}, {"lengths": [6, 0, 3], "reset": RESET}),
    "all-states": ({}, {"lengths": [6, 0, 3], "return_all_states": True}),
    "batch-first": ({"batch_first": True}, {"reset": RESET.t(), "return_all_states": True}),
    "no-bias": ({"bias": False}, {"return_all_states": True}),
    "window": ({}, {"truncate": 4}),
    "two-directions": ({"bidirectional": True}, {"return_all_states": True}),
    **{
        mode: ({"bidirectional": True, "merge_mode": mode}, {"return_all_states": True})
        for mode in ("sum", "mean", "mul")
    },
    "merged": ({"bidirectional": True, "merge_mode": "mul", "batch_first": True}, {}),
    "clip": ({"grad_clip": ("norm", 0.3)}, {}),
}


def build(cell: str, layers: int, dtype: torch.dtype, **options: Any) -> Any:
    torch.manual_seed(0)
    return rnnkernels.nn.base.RNNBase(cell.upper(), I, H, layers, dtype=dtype, **options)


def arguments_of(module: Any, dtype: torch.dtype, hx: bool) -> Any:
    x = draw(*((B, T, I) if module.batch_first else (T, B, I)), seed=1, dtype=dtype)
    if not hx:
        return [x.requires_grad_()]
    rows = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or H), H
    states = [
        draw(rows, B, size, seed=2 + i, dtype=dtype).requires_grad_()
        for i, size in enumerate(sizes)
    ]
    return [x.requires_grad_(), tuple(states) if CELLS[module.cell].S > 1 else states[0]]


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("cell", NAMES)
def test_layers(cell: str, use: str, hx: bool) -> None:
    """float64 to 1e-12, outputs in float32 to the bit, 2 and 3 layers."""
    options, extra = USES[use]
    for dtype, layers in ((F64, 2), (torch.float32, 3)):
        module = build(cell, layers, dtype, **options)
        args = arguments_of(module, dtype, hx)
        got, want = both_ways(module, args, **extra)
        compare(got, want, rtol=1e-12 if dtype == F64 else 2e-6)
        if dtype == torch.float32:
            outputs = [name for name in want if name.startswith("output")]
            assert same_bits([got[n] for n in outputs], [want[n] for n in outputs])


@pytest.mark.parametrize("merge_mode", ["concat", "mean"])
def test_projections(merge_mode: str) -> None:
    options = {"bidirectional": True, "merge_mode": merge_mode, "proj_size": 3}
    module = build("lstm", 3, F64, **options)
    args = arguments_of(module, F64, True)
    got, want = both_ways(module, args, lengths=[6, 0, 3], return_all_states=True)
    compare(got, want, rtol=1e-12)


def test_unbatched_and_packed() -> None:
    module = build("lstm", 2, F64)
    x = draw(T, B, I, seed=1, dtype=F64)
    packed = pack_padded_sequence(x, torch.tensor([4, 6, 1]), enforce_sorted=False)
    for argument in (x[:, 1], packed):
        got, want = both_ways(module, [argument])
        compare(got, want, rtol=1e-12)


def test_frozen_layers() -> None:
    """Of a lower layer no gradient comes, and the upper ones have theirs."""
    module = build("gru", 3, F64)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.endswith("_l0"))
    got, want = both_ways(module, [draw(T, B, I, seed=1, dtype=F64)])
    compare(got, want, rtol=1e-12)
    assert got["gradient of weight_hh_l0"] is None is want["gradient of weight_hh_l0"]


def test_each_layer_is_told_of_and_recorded() -> None:
    x = draw(T, B, I, seed=1, dtype=torch.float32)
    module = build("lstm", 2, torch.float32)
    assert [c.layer for c in rnnkernels.explain(module, x).choices] == [0, 1]
    with gradient_flow(module) as flow:
        module(x)[0].sum().backward()
    assert [record.layer for record in flow.records] == [1, 0]


DROPS = {**USES, "everything": ({"dropout": 1.0}, {}), "float32": ({"dtype": torch.float32}, {})}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("use", DROPS)
def test_dropout(use: str, training: bool) -> None:
    """The same random numbers fall out as between layers one by one, and none are drawn in eval
    mode: the same values, and the same state of the generator behind them."""
    options, extra = DROPS[use]
    module = build("gru", 3, **{"dtype": F64, "dropout": 0.4, **options}).train(training)
    if "lengths" in extra:  # drawn for the steps that there are
        extra = {**extra, "lengths": None}
    args = arguments_of(module, module.weight_hh_l0.dtype, True)
    drawn: list[Tensor] = []

    def run(way: Any) -> dict[str, Tensor | None]:
        generator = torch.manual_seed(3)
        before = generator.get_state()
        found = by_name(outputs_and_gradients(way, args, F64, **extra))
        drawn.append(generator.get_state())
        assert torch.equal(before, drawn[-1]) == (not training or use == "everything")
        return found

    want, got = run(OneByOne(module)), run(module)
    compare(got, want, rtol=2e-6 if use == "float32" else 1e-12)
    assert torch.equal(*drawn)


def test_second_derivatives_with_dropout() -> None:
    module = build("lstm", 3, F64, dropout=0.4)
    x = draw(T, B, I, seed=1, dtype=F64).requires_grad_()

    def derivatives(way: Any) -> list[Tensor]:
        torch.manual_seed(3)
        loss = way(x)[0].square().sum()
        first = torch.autograd.grad(loss, [x, *module.parameters()], create_graph=True)
        square = torch.stack([g.square().sum() for g in first]).sum()
        return [*first, *torch.autograd.grad(square, [x, *module.parameters()])]

    got, want = derivatives(module), derivatives(OneByOne(module))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["weight_ih_l2", "weight_hh_l1", "bias_ih_l0", "bias_hh_l2"])
def test_errors_name_the_parameter_of_the_layer(name: str) -> None:
    module = build("gru", 3, F64)
    x = draw(T, B, I, seed=1, dtype=F64)
    right = getattr(module, name)
    for wrong, error in ((right[1:], RuntimeError), (right.float(), ValueError)):
        setattr(module, name, torch.nn.Parameter(wrong.detach()))
        with pytest.raises(error, match=rf"{name}: expected"):
            module(x)


FORWARD, BACKWARD = "rnnkernels.sequence_forward.default", "rnnkernels.sequence_gradients.default"


@pytest.mark.parametrize(
    ("kind", "dropout", "options"),
    [("LSTM", 0, ("lengths", "reset")), ("GRU", 0, ()), ("GRU", 0.4, ("lengths",))],
)
def test_one_graph_for_every_size(
    kind: str,
    dropout: float,
    options: tuple[str, ...],
    fresh_compiler: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """fullgraph, dynamic T and B: one forward and one backward graph of one op each.

    Graphs know no lengths and keep the padding: so do we here, for dropout of the same numbers.
    """
    monkeypatch.setattr(stack, "known", lambda _: False)
    model, graphs = Model(kind, num_layers=3, dropout=dropout), Graphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs.backend)
    for i, (T, B) in enumerate([(5, 3), (7, 2), (4, 9)]):
        args, extra = tokens(T, B), options_for(T, B, *options)
        torch.manual_seed(i)
        want = result(model, model, args, **extra)
        torch.manual_seed(i)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_same(result(model, compiled, args, **extra), want)
    assert [graphs.ops(graph) for graph in graphs.forward] == [[FORWARD]]
    assert [graphs.ops(graph) for graph in graphs.backward] == [[BACKWARD]]


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11 reads so
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export(strict: bool, fresh_compiler: None) -> None:
    """An exported program runs at another T and B, also after saving and loading."""
    model = Model("LSTM", num_layers=2).eval()
    time, batch = torch.export.Dim("time", min=2), torch.export.Dim("batch", min=2)
    program = torch.export.export(
        model, (tokens(5, 3),), dynamic_shapes={"tokens": {0: time, 1: batch}}, strict=strict
    )
    assert Graphs.ops(program.graph_module) == [FORWARD]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for runnable in (program, torch.export.load(file)):
        torch.testing.assert_close(runnable.module()(tokens(9, 2)), model(tokens(9, 2)))
