"""Layers whose backend runs a stack at once against the same layers one by one."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import NAMES
from graphs import Graphs, Model, assert_same, options_for, result, tokens
from helpers import compare, draw, outputs_and_gradients, same_bits
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkernels
from rnnkernels import backends, ops, stack
from rnnkernels.call import Call, Result
from rnnkernels.cells import CELLS
from rnnkernels.diagnostics import gradient_flow

if ops.missing is not None:
    pytest.skip(f"no compiled kernels: {ops.missing}", allow_module_level=True)

F64 = torch.float64


@contextmanager
def at_once(masked: list[int] | None = None) -> Iterator[list[int]]:
    """The cpu backend runs stacks; yields the number of layers of each that it ran, and adds the
    numbers of masks between them to ``masked``."""
    ran: list[int] = []

    def run_stack(calls: list[Call], masks: list[Tensor]) -> list[Result]:
        ran.append(len(calls))
        if masked is not None:
            masked.append(len(masks))
        return ops.run_stack(calls, masks)

    cpu = backends.BACKENDS["cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.BACKENDS, "cpu", dataclasses.replace(cpu, run_stack=run_stack))
        yield ran


T, B, I, H = 6, 3, 4, 5
RESET = torch.arange(T * B).view(T, B) % 5 == 3
LAYERS: dict[str, Callable[..., Any]] = {
    "lstm": rnnkernels.LSTM,
    "gru": rnnkernels.GRU,
    **{
        f"rnn_{name}": lambda *sizes, name=name, **options: rnnkernels.RNN(
            *sizes, nonlinearity=name, **options
        )
        for name in ("tanh", "relu", "sigmoid")
    },
}
#: What a module is made with, and what it is called with.
USES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "rows": ({}, {"lengths": [6, 0, 3], "reset": RESET}),
    "all-states": ({}, {"lengths": [6, 0, 3], "return_all_states": True}),
    "batch-first": ({"batch_first": True}, {"reset": RESET.t(), "return_all_states": True}),
    "no-bias": ({"bias": False}, {"return_all_states": True}),
    "window": ({}, {"truncate": 4}),
    "overlapping": ({}, {"truncate": (2, 3), "lengths": [6, 0, 3], "return_all_states": True}),
    "clip": ({"grad_clip": ("norm", 0.3)}, {}),
    "named": ({"backend": "cpu"}, {}),
}


def build(cell: str, layers: int, dtype: torch.dtype, **options: Any) -> Any:
    torch.manual_seed(0)
    return LAYERS[cell](I, H, layers, dtype=dtype, **options)


def arguments_of(cell: str, layers: int, dtype: torch.dtype, hx: bool, batch_first: bool) -> Any:
    x = draw(*((B, T, I) if batch_first else (T, B, I)), seed=1, dtype=dtype).requires_grad_()
    if not hx:
        return [x]
    states = [draw(layers, B, H, seed=2 + i, dtype=dtype).requires_grad_() for i in range(2)]
    return [x, tuple(states) if CELLS[cell].S > 1 else states[0]]


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("cell", NAMES)
def test_layers(cell: str, use: str, hx: bool) -> None:
    """float64 to 1e-12, outputs in float32 to the bit, 2 and 3 layers."""
    options, extra = USES[use]
    for dtype, layers in ((F64, 2), (torch.float32, 3)):
        module = build(cell, layers, dtype, **options)
        args = arguments_of(cell, layers, dtype, hx, module.batch_first)
        want = outputs_and_gradients(module, args, F64, **extra)
        with at_once() as ran:
            got = outputs_and_gradients(module, args, F64, **extra)
        assert ran == [layers] * (2 if isinstance(extra.get("truncate"), tuple) else 1)
        compare(got, want, rtol=1e-12 if dtype == F64 else 1e-6)
        if dtype == torch.float32:
            outputs = [name for name in want if name.startswith("output")]
            assert same_bits([got[n] for n in outputs], [want[n] for n in outputs])


def test_unbatched_and_packed() -> None:
    module = build("lstm", 2, F64)
    x = draw(T, B, I, seed=1, dtype=F64)
    packed = pack_padded_sequence(x, torch.tensor([4, 6, 1]), enforce_sorted=False)
    for argument in (x[:, 1], packed):
        want = outputs_and_gradients(module, [argument], F64)
        with at_once() as ran:
            got = outputs_and_gradients(module, [argument], F64)
        assert ran == [2]
        compare(got, want, rtol=1e-12)


def test_frozen_layers() -> None:
    """Of a lower layer no gradient comes, and the upper ones have theirs."""
    module = build("gru", 3, F64)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.endswith("_l0"))
    x = draw(T, B, I, seed=1, dtype=F64)
    want = outputs_and_gradients(module, [x], F64)
    with at_once():
        got = outputs_and_gradients(module, [x], F64)
    compare(got, want, rtol=1e-12)
    assert got["gradient of weight_hh_l0"] is None is want["gradient of weight_hh_l0"]


def layers_run(module: Any, *args: Any, **options: Any) -> list[int]:
    """The numbers of layers of the stacks that ran at once."""
    with at_once() as ran:
        module(*args, **options)
    return ran


def test_what_runs_one_by_one() -> None:
    """Whatever has something between its layers, and whatever somebody looks at."""
    x = draw(T, B, I, seed=1, dtype=torch.float32)
    plain = build("lstm", 2, torch.float32)
    assert layers_run(plain, x) == [2]
    for options in (
        {"num_layers": 1},
        {"bidirectional": True},
        {"proj_size": 3},
        {"backend": "reference"},
    ):
        assert layers_run(rnnkernels.LSTM(I, H, **{"num_layers": 2, **options}), x) == []
    with rnnkernels.batch_invariant():
        assert layers_run(plain, x) == []
    with at_once() as ran:
        assert [c.layer for c in rnnkernels.explain(plain, x).choices] == [0, 1]
        with gradient_flow(plain) as flow:
            plain(x)[0].sum().backward()
    assert ran == [] and [record.layer for record in flow.records] == [1, 0]


DROPS = {**USES, "everything": ({"dropout": 1.0}, {}), "float32": ({"dtype": torch.float32}, {})}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("use", DROPS)
def test_dropout(use: str, training: bool) -> None:
    """The same random numbers fall out as between layers one by one, and none are drawn in eval
    mode: the same bits, and the same state of the generator behind them."""
    options, extra = DROPS[use]
    module = build("gru", 3, **{"dtype": F64, "dropout": 0.4, **options}).train(training)
    args = arguments_of("gru", 3, module.weight_hh_l0.dtype, True, module.batch_first)
    drawn: list[Tensor] = []

    def run() -> dict[str, Tensor | None]:
        generator = torch.manual_seed(3)
        before = generator.get_state()
        found = outputs_and_gradients(module, args, F64, **extra)
        drawn.append(generator.get_state())
        assert torch.equal(before, drawn[-1]) == (not training or use == "everything")
        return found

    want = run()
    masked: list[int] = []
    with at_once(masked) as ran:
        got = run()
    assert ran == [3] * (2 if use == "overlapping" else 1)
    assert masked == [2 if training else 0] * len(ran)
    assert same_bits(list(got.values()), list(want.values()))
    assert torch.equal(*drawn)


def test_second_derivatives_with_dropout() -> None:
    module = build("lstm", 3, F64, dropout=0.4)
    x = draw(T, B, I, seed=1, dtype=F64).requires_grad_()

    def derivatives() -> list[Tensor]:
        torch.manual_seed(3)
        loss = module(x)[0].square().sum()
        first = torch.autograd.grad(loss, [x, *module.parameters()], create_graph=True)
        square = torch.stack([g.square().sum() for g in first]).sum()
        return [*first, *torch.autograd.grad(square, [x, *module.parameters()])]

    want = derivatives()
    with at_once() as ran:
        got = derivatives()
    assert ran == [3]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["weight_ih_l2", "weight_hh_l1", "bias_ih_l0", "bias_hh_l2"])
def test_errors_name_the_parameter_of_the_layer(name: str) -> None:
    module = build("gru", 3, F64)
    x = draw(T, B, I, seed=1, dtype=F64)
    right = getattr(module, name)
    for wrong, error in ((right[1:], RuntimeError), (right.float(), ValueError)):
        setattr(module, name, torch.nn.Parameter(wrong.detach()))
        with at_once() as ran, pytest.raises(error, match=rf"{name}: expected"):
            module(x)
        assert ran == [3]


@contextmanager
def cpu_runs_stacks() -> Iterator[None]:
    """The same as at_once, without a list that a compiler would have to follow."""
    cpu = backends.BACKENDS["cpu"]
    with pytest.MonkeyPatch.context() as patch:
        stacks = dataclasses.replace(cpu, run_stack=ops.run_stack)
        patch.setitem(backends.BACKENDS, "cpu", stacks)
        yield


FORWARD, BACKWARD = "rnnkernels.stack_forward.default", "rnnkernels.stack_backward.default"


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
        with cpu_runs_stacks(), torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_same(result(model, compiled, args, **extra), want)
    assert [graphs.ops(graph) for graph in graphs.forward] == [[FORWARD]]
    assert [graphs.ops(graph) for graph in graphs.backward] == [[BACKWARD]]


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11 reads so
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export(strict: bool, fresh_compiler: None) -> None:
    """An exported program runs at another T and B, also after saving and loading."""
    model = Model("LSTM", num_layers=2).eval()
    time, batch = torch.export.Dim("time", min=2), torch.export.Dim("batch", min=2)
    with cpu_runs_stacks():
        program = torch.export.export(
            model, (tokens(5, 3),), dynamic_shapes={"tokens": {0: time, 1: batch}}, strict=strict
        )
    assert Graphs.ops(program.graph_module) == [FORWARD]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for runnable in (program, torch.export.load(file)):
        torch.testing.assert_close(runnable.module()(tokens(9, 2)), model(tokens(9, 2)))
