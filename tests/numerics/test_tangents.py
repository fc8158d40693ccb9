"""Tangents, and derivatives of gradients, by the kernels: those of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

import rnnkernels
import written_cells
from helpers import draw, tensors
from rnnkernels import _ops
from rnnkernels._core.call import Call
from rnnkernels._ops import tangents
from rnnkernels.cells import CELLS, find

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
T, B, I, H, F64 = 6, 3, 3, 4, torch.float64
LAYERS: dict[str, dict[str, Any]] = {
    "relu": {"nonlinearity": "relu"},
    "sigmoid": {"nonlinearity": "sigmoid"},
    "one bias": {"bias_mode": "single"},
    "no bias": {"bias": False},
    "layers": {"num_layers": 2},
    "dropout": {"num_layers": 3, "dropout": 0.5},
    "directions": {"bidirectional": True},
    "input dropout": {"num_layers": 2, "input_dropout": 0.5},
    "recurrent dropout": {"bidirectional": True, "num_layers": 2, "recurrent_dropout": 0.5},
    "mul": {"bidirectional": True, "num_layers": 2, "merge_mode": "mul"},
    "sum": {"bidirectional": True, "num_layers": 2, "merge_mode": "sum"},
    "mean": {"bidirectional": True, "merge_mode": "mean"},
    "projected": {"proj_size": 2, "num_layers": 2, "bidirectional": True},
    "projected, dropped": {"proj_size": 2, "recurrent_dropout": 0.5},
    "heads": {"heads": 2, "num_layers": 2, "bidirectional": True},
    "heads, dropped": {"heads": 2, "recurrent_dropout": 0.5},
    "zoneout": {"zoneout": 0.4, "num_layers": 2, "bidirectional": True},
}
#: Written cells: with parameters of their own, with choices, without W_hh, with several states.
WRITTEN: dict[str, dict[str, dict[str, Any]]] = {
    "scaled": {
        "plain": {"num_layers": 2, "bidirectional": True},
        "heads": {"heads": 2},
        "heads, zoneout": {"heads": 2, "zoneout": 0.4, "bidirectional": True},
    },
    "odd": {"plain": {}},
    "forgets": {"plain": {"num_layers": 2, "bidirectional": True}, "zoneout": {"zoneout": 0.4}},
    "crowd": {"plain": {"bidirectional": True}},
}
CALLS: dict[str, dict[str, Tensor]] = {
    "plain": {},
    "lengths": {"lengths": torch.tensor([T - 1, 0, 3])},
    "resets": {"reset": draw(T, B, seed=9, dtype=F64) < -0.5},
}
CALLS["both"] = CALLS["lengths"] | CALLS["resets"]


def layers() -> list[tuple[str, str]]:
    own = {"relu": "RNN", "sigmoid": "RNN", "projected": "LSTM", "projected, dropped": "LSTM"}
    kinds = ("RNN", "LSTM", "GRU")
    built_in = [(k, name) for name in LAYERS for k in kinds if own.get(name, k) == k]
    return built_in + [(kind, name) for kind, options in WRITTEN.items() for name in options]


def options_of(kind: str, layer: str) -> dict[str, Any]:
    return WRITTEN[kind][layer] if kind in WRITTEN else LAYERS[layer]


class Problem:
    """A layer with what it takes, and what is asked of it."""

    def __init__(
        self,
        kind: str,
        options: dict[str, Any],
        call: dict[str, Tensor],
        T: int = T,
        B: int = B,
        H: int = H,
    ) -> None:
        torch.manual_seed(0)
        written = kind in WRITTEN
        make = rnnkernels.layer(getattr(written_cells, kind)) if written else None
        self.module: nn.Module = (make or getattr(rnnkernels, kind))(I, H, dtype=F64, **options)
        if written:  # parameters of a cell begin as they are all alike
            with torch.no_grad():
                for i, p in enumerate(self.module.parameters()):
                    p += 0.3 * alike(p, 60 + i)
        self.options = call | {"return_all_states": True}
        rows = options.get("num_layers", 1) * (1 + bool(options.get("bidirectional")))
        states = [draw(rows, B, options.get("proj_size", H), seed=2, dtype=F64)]
        others = find(self.module.cell).C  # type: ignore[arg-type]
        states += [draw(rows, B, H, seed=3 + i, dtype=F64) for i in range(others)]
        self.inputs = [draw(T, B, I, seed=1, dtype=F64), *states]

    def __call__(self, sources: list[Tensor]) -> list[Tensor]:
        """All outputs, of x, states and weights."""
        names = [name for name, _ in self.module.named_parameters()]
        given, weights = sources[: -len(names)], sources[-len(names) :]
        torch.manual_seed(1)  # of dropout
        states = tuple(given[1:]) if len(given) > 2 else given[1]
        named = dict(zip(names, weights, strict=True))
        return tensors(functional_call(self.module, named, (given[0], states), self.options))

    def sources(self) -> list[Tensor]:
        every = [*self.inputs, *self.module.parameters()]
        return [t.detach().clone().requires_grad_() for t in every]


def alike(t: Tensor, seed: int) -> Tensor:
    return draw(*t.shape, seed=seed, dtype=F64)


def second_order(problem: Problem) -> list[Tensor]:
    """The gradients of everything that the gradients of everything depend on."""
    sources = problem.sources()
    outputs = problem(sources)
    given = [alike(t, 20 + i).requires_grad_() for i, t in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, sources, given, create_graph=True)
    along = [alike(t, 40 + i) for i, t in enumerate(grads)]
    return list(torch.autograd.grad(grads, [*sources, *given], along))


def dual(tensors: list[Tensor], seed: int) -> list[Tensor]:
    """Tensors with tangents."""
    make = forward_ad.make_dual
    return [make(t, alike(t, seed + i)) for i, t in enumerate(tensors)]  # type: ignore[no-untyped-call]


def of_outputs(problem: Problem) -> list[Tensor]:
    """Their tangents."""
    with forward_ad.dual_level(), torch.no_grad():  # type: ignore[no-untyped-call]
        return [tangent(t) for t in problem(dual(problem.sources(), 50))]


def of_gradients(problem: Problem) -> list[Tensor]:
    """Their tangents, where all that they depend on has some."""
    with forward_ad.dual_level():  # type: ignore[no-untyped-call]
        sources = dual(problem.sources(), 50)
        outputs = problem(sources)
        given = dual([alike(t, 20 + i) for i, t in enumerate(outputs)], 30)
        return [tangent(t) for t in torch.autograd.grad(outputs, sources, given)]


def tangent(t: Tensor) -> Tensor:
    found: Tensor = forward_ad.unpack_dual(t).tangent  # type: ignore[no-untyped-call]
    return found


def compare(
    question: Callable[[Problem], list[Tensor]],
    problem: Problem,
    patch: pytest.MonkeyPatch,
    by_loops: bool = True,
) -> None:
    """An answer by the kernels, which were asked, with the reference's; ``by_loops`` says whether
    those of built-in cells are to have it by loops of tangents."""
    asked = 0
    built_in = problem.module.cell in CELLS and not problem.module.zoneout
    if by_loops and built_in:
        patch.delattr(tangents, "TorchLayer")
    elif built_in:
        patch.setattr(tangents, "kernels_take", lambda *args: False)

    def find(*args: Any) -> tangents.Found:
        nonlocal asked
        asked += 1
        return kernels(*args)

    kernels = tangents.find
    patch.setattr(tangents, "find", find)
    got = question(problem)
    assert asked
    patch.setattr(tangents, "takes", lambda *args: False)
    for mine, right in zip(got, question(problem), strict=True):
        assert (mine - right).abs().max() <= 1e-12 * max(1.0, right.abs().max().item())


@pytest.mark.parametrize("question", [second_order, of_outputs, of_gradients])
@pytest.mark.parametrize(("kind", "layer"), layers())
def test_layers(kind: str, layer: str, question: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(question, Problem(kind, options_of(kind, layer), CALLS["both"]), monkeypatch)


@pytest.mark.parametrize("question", [second_order, of_gradients])
@pytest.mark.parametrize(
    ("kind", "layer"), [at for at in layers() if at[0] not in WRITTEN and at[1] != "zoneout"]
)
def test_layers_without_loops_of_tangents(
    kind: str, layer: str, question: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on other devices."""
    problem = Problem(kind, options_of(kind, layer), CALLS["both"])
    compare(question, problem, monkeypatch, by_loops=False)


@pytest.mark.parametrize("question", [second_order, of_gradients])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_many_rows_and_units(kind: str, question: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a block of rows, and tiles of units of which the last is not whole."""
    problem = Problem(kind, {}, {}, T=2, B=150, H=37)
    compare(question, problem, monkeypatch)


@pytest.mark.parametrize("question", [second_order, of_outputs, of_gradients])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_calls(kind: str, call: str, question: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(question, Problem(kind, {"bidirectional": True}, CALLS[call]), monkeypatch)


@pytest.mark.parametrize("question", [second_order, of_outputs, of_gradients])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_a_single_step(kind: str, question: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(question, Problem(kind, {}, {}, T=1), monkeypatch)


@pytest.mark.parametrize("question", [of_outputs, of_gradients])
def test_tangents_end_where_windows_do(question: Any) -> None:
    """As gradients do; the reference has them."""
    got = question(Problem("GRU", {"truncate": 2}, {}))
    with rnnkernels.use_backend("reference"):
        want = question(Problem("GRU", {"truncate": 2}, {}))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_float32(kind: str) -> None:
    """Vectors of other widths than those of float64."""
    torch.manual_seed(0)
    layer = getattr(rnnkernels, kind)(5, 19, bidirectional=True)
    x = torch.randn(4, 3, 5)

    def derivatives(dtype: torch.dtype) -> list[Tensor]:
        made = layer.to(dtype)
        given = x.to(dtype).requires_grad_()
        (dx,) = torch.autograd.grad(made(given)[0].sum(), given, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), [given, *made.parameters()]))

    for got, want in zip(derivatives(torch.float32), derivatives(F64), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("question", ["jvp", "jvp of grad"])
def test_by_torch_func(question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.func.jvp, around everything, of functions and of their gradients."""

    def answer(problem: Problem) -> list[Tensor]:
        sources = [t.detach() for t in problem.sources()]
        along = [alike(t, 50 + i) for i, t in enumerate(sources)]

        def run(*sources: Tensor) -> Tensor:
            return torch.cat([t.flatten() for t in problem([*sources])])

        loss = torch.func.grad(lambda *s: run(*s).square().sum(), tuple(range(len(sources))))
        asked = run if question == "jvp" else loss
        return tensors(torch.func.jvp(asked, tuple(sources), tuple(along))[1])

    compare(answer, Problem("LSTM", {"num_layers": 2}, CALLS["both"]), monkeypatch)


def test_what_comes_of_torch_func_is_differentiable() -> None:
    """In parameters that ask for gradients, which torch.func.jvp does not see."""
    problem = Problem("GRU", {}, {})
    x, h0 = problem.inputs
    parameters = list(problem.module.parameters())

    def gradients() -> tuple[Tensor, ...]:
        slope = torch.func.jvp(lambda x: problem.module(x, h0)[0], (x,), (x,))[1]
        return torch.autograd.grad(slope.square().sum(), parameters)

    got = gradients()
    with rnnkernels.use_backend("reference"):
        torch.testing.assert_close(got, gradients(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CELLS)
def test_cells_say_how_what_they_save_changes(name: str) -> None:
    cell = CELLS[name]
    gx, gh = ([draw(5, seed=10 * part + i, dtype=F64) for i in range(cell.G)] for part in range(2))
    dgx, dgh = ([draw(5, seed=50 + 10 * p + i, dtype=F64) for i in range(cell.G)] for p in range(2))
    prev, dprev = ([draw(5, seed=90 + 5 * p + i, dtype=F64) for i in range(cell.S)] for p in (0, 1))
    with forward_ad.dual_level():  # type: ignore[no-untyped-call]
        make = forward_ad.make_dual
        duals = [
            [make(t, d) for t, d in zip(ts, ds, strict=True)]  # type: ignore[no-untyped-call]
            for ts, ds in ((gx, dgx), (gh, dgh), (prev, dprev))
        ]
        right = [tangent(t) for t in cell.forward(*duals)[1]]
    next, saved = cell.forward(gx, gh, prev)
    got = cell.tangents(saved, prev, next, dgx, dgh, dprev)
    torch.testing.assert_close(list(got), right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CELLS)
def test_padding_may_be_anything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where steps are not packed: x and resets there reach no derivative."""
    cell = CELLS[name]
    lengths = torch.tensor([2, T, 0])
    rest = torch.arange(T)[:, None] >= lengths
    shapes = [(cell.G * H, I), (cell.G * H, H)] * 2
    weights = [draw(*s, seed=i, dtype=F64).requires_grad_() for i, s in enumerate(shapes)]
    states = [draw(2, B, H, seed=7 + i, dtype=F64).requires_grad_() for i in range(cell.S)]

    def derivatives(padding: float) -> list[Tensor]:
        x = draw(T, B, I, seed=5, dtype=F64).masked_fill(rest[..., None], padding).requires_grad_()
        c0 = states[1] if cell.S > 1 else None
        call = Call(name, 1, 2, 1, False, "concat", 0, "none", 1.0, x, weights, states[0], c0)
        y = _ops.run(call._replace(lengths=lengths, reset=rest)).y
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        inside = dx.masked_fill(rest[..., None], 0)
        return list(torch.autograd.grad(inside.pow(2).sum(), [x, *states, *weights]))

    got = derivatives(float("nan"))
    monkeypatch.setattr(tangents, "takes", lambda *args: False)
    torch.testing.assert_close(got, derivatives(0.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_outputs_may_be_changed_before(kind: str) -> None:
    """What forward has kept is not what the caller holds."""

    def derivative(change: bool) -> list[Tensor]:
        problem = Problem(kind, {}, {})
        inputs = problem.sources()
        outputs = problem(inputs)
        (dx,) = torch.autograd.grad(outputs[0].sum(), inputs[:1], create_graph=True)
        if change:
            with torch.no_grad():
                outputs[0].zero_()
        return list(torch.autograd.grad(dx.pow(2).sum(), inputs))

    for got, right in zip(derivative(True), derivative(False), strict=True):
        assert torch.equal(got, right)
