"""torch.compile and torch.export: one whole graph, forward and backward, at any T and B."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkernels
from graphs import Graphs, H, Model, assert_same, options_for, result, tokens

FORWARD, BACKWARD = "rnnkernels.sequence_forward.default", "rnnkernels.sequence_gradients.default"
OF_A_STEP = "rnnkernels.sequence_backward.default"
pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Steps(nn.Module):
    """A loop of a cell, as decoders write it."""

    def __init__(self, kind: str, library: Any = rnnkernels) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = getattr(library, kind)(5, H)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x:
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "lstm": ({"num_layers": 2}, ()),
    "lstm-bidirectional": ({"num_layers": 2, "bidirectional": True}, ()),
    "lstm-options": (
        {"num_layers": 2, "bidirectional": True, "proj_size": 4, "merge_mode": "sum"},
        ("lengths", "reset"),
    ),
    "rnn": ({"kind": "RNN", "nonlinearity": "relu"}, ("lengths",)),
    "gru": ({"kind": "GRU", "bidirectional": True, "bias_mode": "single"}, ("reset",)),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_for_every_size(name: str) -> None:
    """fullgraph, dynamic T and B: one forward and one backward graph, results as in eager."""
    arguments, options = MODELS[name]
    model, graphs = Model(**arguments), Graphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs.backend)
    for i, (T, B) in enumerate([(5, 3), (7, 2), (4, 9)]):
        args, extra = tokens(T, B), options_for(T, B, *options)
        want = result(model, model, args, **extra)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_same(result(model, compiled, args, **extra), want)
    assert len(graphs.forward) == len(graphs.backward) == 1
    assert graphs.ops(graphs.forward[0]) == [FORWARD]
    assert graphs.ops(graphs.backward[0]) == [BACKWARD]


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_nothing_stands_beside_the_ops(kind: str) -> None:
    """A graph has no products but those of the op, and no loop that fills the first states."""
    layer, graphs = getattr(rnnkernels, kind)(5, H, num_layers=2), Graphs()
    compiled = torch.compile(layer, fullgraph=True, backend=graphs.backend)
    compiled(torch.randn(4, 3, 5, requires_grad=True))[0].sum().backward()
    calls = [n for g in (*graphs.forward, *graphs.backward) for n in g.graph.nodes]
    names = [str(n.target) for n in calls if n.op == "call_function"]
    assert not [name for name in names if "mm" in name]
    for n in calls:
        if "full" in str(n.target) or "zeros" in str(n.target):
            assert n.meta["val"].numel() == 1


def test_list_of_lengths() -> None:
    """Lengths that are known when the model is compiled."""
    model = Model("GRU")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    want = model(tokens(5, 3), lengths=[5, 0, 2])
    torch.testing.assert_close(compiled(tokens(5, 3), lengths=[5, 0, 2]), want)


def test_no_graph_break() -> None:
    """explain counts one graph and no break."""
    model = Model(num_layers=2, bidirectional=True)
    found = torch._dynamo.explain(model)(tokens(5, 3), **options_for(5, 3, "lengths", "reset"))
    assert found.graph_count == 1 and found.graph_break_count == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's
@pytest.mark.parametrize("rows", ["of a state", "of an order", "of a value"])
def test_packed_sequences(rows: str) -> None:
    """One graph where a size tells how many rows there are, or where one is asked for; else torch
    breaks at the value that does, in each of the functions around it."""
    lengths = [2, 5, 1] if rows == "of an order" else [5, 2, 1]
    data = pack_padded_sequence(
        torch.randn(5, 3, 4), torch.tensor(lengths), enforce_sorted=rows != "of an order"
    )
    layer = rnnkernels.GRU(4, H, bidirectional=True)
    hx = torch.randn(2, 3, H) if rows == "of a state" else None

    def run(packed: PackedSequence, hx: Tensor | None) -> tuple[Tensor, Tensor]:
        y, h_n = layer(PackedSequence(2 * packed.data, *packed[1:]), hx)
        return y.data + 1, h_n

    breaks = 3 if rows == "of a value" else 0
    found = torch._dynamo.explain(run)(data, hx)
    assert (found.graph_count, found.graph_break_count) == (1 + breaks, breaks)
    torch._dynamo.reset()
    want, graphs = run(data, hx), Graphs()
    got = torch.compile(run, backend=graphs.backend, fullgraph=True)(data, hx)
    torch.testing.assert_close(got, want)
    wanted = [torch.autograd.grad(t[0].square().sum(), layer.weight_hh_l0) for t in (got, want)]
    torch.testing.assert_close(*wanted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_inductor() -> None:
    """The default compiler, with lengths and reset."""
    model = Model(num_layers=2, bidirectional=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for T, B in ((5, 3), (8, 4)):
        extra = options_for(T, B, "lengths", "reset")
        want = result(model, model, tokens(T, B), **extra)
        assert_same(result(model, compiled, tokens(T, B), **extra), want)


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(kind: str) -> None:
    """A loop of a cell is one graph of one op per step, the products of which it adds up."""
    model, graphs = Steps(kind), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend)
    x = torch.randn(3, 2, 5)
    assert_same(result(model, compiled, x), result(model, model, x))
    assert graphs.ops(graphs.forward[0]) == [FORWARD] * 3
    assert graphs.ops(graphs.backward[0]) == [OF_A_STEP] * 3


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_the_formula_of_a_step_in_training(kind: str) -> None:
    """Of more rows than the op has a product of its own for, a compiler sees what it sees of
    torch.nn's cells: the same products and no further copies."""
    ours, theirs, graphs = Steps(kind), Steps(kind, nn), (Graphs(), Graphs())
    x = torch.randn(3, 9, 5)
    want = result(ours, ours, x)
    for model, kept in zip((ours, theirs), graphs, strict=True):
        compiled = torch.compile(model, fullgraph=True, backend=kept.backend)
        assert_same(result(model, compiled, x), want)
    for of_ours, of_theirs in (
        (graphs[0].forward[0], graphs[1].forward[0]),
        (graphs[0].backward[0], graphs[1].backward[0]),
    ):
        assert _count(of_ours, "mm") == _count(of_theirs, "mm") > 0
        for copies in ("cat", "clone", "copy", "rnnkernels"):
            assert _count(of_ours, copies) <= _count(of_theirs, copies)


def _count(graph: torch.fx.GraphModule, name: str) -> int:
    return sum(name in str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize("why", ["without gradients", "any batch", "asked for", "bfloat16"])
def test_steps_that_stay_ops(why: str) -> None:
    """Where kernels have more to offer, or somebody asked for them."""
    model, graphs, x = Steps("GRUCell"), Graphs(), torch.randn(3, 9, 5)
    if why == "asked for":
        model.cell.backend = "cpu"
    if why == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    compiled = torch.compile(
        model, fullgraph=True, backend=graphs.backend, dynamic=why == "any batch"
    )
    with torch.set_grad_enabled(why != "without gradients"):
        assert_same([compiled(x).float()], [model(x).float()])
        if why == "any batch":
            with torch._dynamo.config.patch(error_on_recompile=True):
                compiled(torch.randn(3, 4, 5))
    assert graphs.ops(graphs.forward[0]) == [FORWARD] * 3


def test_a_bad_weight_of_a_compiled_cell() -> None:
    """It is refused by name, however many rows there are."""
    model = Steps("GRUCell")
    model.cell.weight_hh = nn.Parameter(torch.zeros(3 * H, H + 1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for rows in (2, 9):
        with pytest.raises(RuntimeError, match="weight_hh"):
            compiled(torch.randn(3, rows, 5))


def test_bad_lengths_in_a_compiled_model() -> None:
    """Their values are checked when the graph runs."""
    model = Model("GRU")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for bad, named in (([4, 6], "6"), ([-1, 5], "-1")):
        with pytest.raises(ValueError, match=f"lengths: expected values from 0 to 5.*got {named}"):
            compiled(tokens(5, 2), lengths=torch.tensor(bad))


def test_bad_weight_in_a_compiled_model() -> None:
    """A weight of another shape is refused by name when the graph runs."""
    model = Model("GRU")
    model.layer.weight_hh_l0 = nn.Parameter(torch.zeros(3 * H, H + 1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="weight_hh_l0"):
        compiled(tokens(5, 2))


class Inference(Model):
    """The model with lengths as a positional argument, for export."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(tokens, lengths=lengths)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11 reads so
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_export(kind: str, strict: bool) -> None:
    """An exported program runs at other T and B, also after saving and loading."""
    model = Inference(kind, num_layers=2, bidirectional=True).eval()
    time, batch = torch.export.Dim("time", min=2), torch.export.Dim("batch", min=2)
    program = torch.export.export(
        model,
        (tokens(5, 3), torch.tensor([5, 2, 3])),
        dynamic_shapes={"tokens": {0: time, 1: batch}, "lengths": {0: batch}},
        strict=strict,
    )
    assert Graphs.ops(program.graph_module) == [FORWARD]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for T, B in ((5, 3), (9, 2), (2, 7)):
        args = tokens(T, B), options_for(T, B, "lengths")["lengths"]
        with torch.no_grad():
            want = model(*args)
        for runnable in (program, loaded):
            torch.testing.assert_close(runnable.module()(*args), want)
