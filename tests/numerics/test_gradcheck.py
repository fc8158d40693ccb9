"""Numerical gradients of first and second order, in float64, for every cell, option and pair."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkernels
from cases import NAMES
from rnnkernels import functional
from rnnkernels._core.call import LayerWeights
from rnnkernels.cells import CELLS

T, B, INPUTS, H = 3, 2, 2, 3


pytestmark = pytest.mark.usefixtures("one_thread")


#: Options by name: what the constructor takes.
CONSTRUCTOR: dict[str, dict[str, Any]] = {
    "bidirectional": {"bidirectional": True},
    "projection": {"proj_size": 2},
    "no-bias": {"bias": False},
    "single-bias": {"bias_mode": "single"},
    "sum": {"bidirectional": True, "merge_mode": "sum"},
    "mean": {"bidirectional": True, "merge_mode": "mean"},
    "mul": {"bidirectional": True, "merge_mode": "mul"},
    "dropout": {"num_layers": 2, "dropout": 0.4},
    "two-layers": {"num_layers": 2},
    "recurrent-dropout": {"recurrent_dropout": 0.4},
    "input-dropout": {"input_dropout": 0.4, "num_layers": 2},
    "batch-first": {"batch_first": True},
}
#: Options of the call.
CALL = ("hx", "lengths", "reset", "all-states", "packed", "unbatched")
OPTIONS = (*CONSTRUCTOR, *CALL)
EXCLUDED = [
    {"no-bias", "single-bias"},
    {"sum", "mean"},
    {"sum", "mul"},
    {"mean", "mul"},
    {"packed", "lengths"},
    {"packed", "unbatched"},
]


def make_layer(cell: str, **arguments: Any) -> rnnkernels.nn.base.RNNBase:
    torch.manual_seed(3)
    layer = rnnkernels.nn.base.RNNBase(
        cell.upper(), INPUTS, H, dtype=torch.float64, backend="cpu", **arguments
    )
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(1.5)
    return layer


def tensors_of(result: Any) -> list[Tensor]:
    """Every tensor inside the results of a layer."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [] if result is None else [t for part in result for t in tensors_of(part)]


def function_of_inputs(
    cell: str, options: tuple[str, ...]
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """A layer with these options as a function of x, its states and its parameters."""
    arguments = {k: v for name in options for k, v in CONSTRUCTOR.get(name, {}).items()}
    layer = make_layer(cell, **arguments)
    names = [name for name, _ in layer.named_parameters()]
    gen = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64).requires_grad_()

    batch = () if "unbatched" in options else (B,)
    batch_first = "batch-first" in options and batch
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    inputs = [random(*((*batch, T) if batch_first else (T, *batch)), INPUTS)]
    if "hx" in options:
        inputs.append(random(rows, *batch, layer.proj_size or H))
        if cell == "lstm":
            inputs.append(random(rows, *batch, H))
    states = len(inputs) - 1
    lengths = torch.tensor([2, 3] if "packed" in options else [2, 0])[: B if batch else 1]
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[1, 0] = mask[2, 1] = mask[0, 1] = True
    mask = mask if batch else mask[:, 0]
    call: dict[str, Any] = {"return_all_states": "all-states" in options}
    if "lengths" in options:
        call["lengths"] = lengths
    if "reset" in options:
        call["reset"] = mask.t() if batch_first else mask

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(7)  # dropout draws the same mask at every evaluation
        hx = rest[:states]
        parameters = dict(zip(names, rest[states:], strict=True))
        given: Any = x
        if "packed" in options:
            given = pack_padded_sequence(x, lengths, bool(batch_first), enforce_sorted=False)
        state = (hx if cell == "lstm" else hx[0]) if hx else None
        result = functional_call(layer, parameters, (given, state), call)
        return tuple(t for t in tensors_of(result) if t.requires_grad)

    return run, inputs + [p.detach().requires_grad_() for p in layer.parameters()]


def fits(cell: str, *options: str) -> bool:
    if "projection" in options and cell != "lstm":
        return False
    return not any(pair <= set(options) for pair in EXCLUDED)


SINGLE = [
    pytest.param(cell, (option,), id=f"{cell}-{option}")
    for cell in NAMES
    for option in OPTIONS
    if fits(cell, option)
]
#: They share one body and one backward; of these, a pair of options is tried with one in turn.
ELMAN = ("rnn_tanh", "rnn_relu", "rnn_sigmoid")
PAIRS = [
    pytest.param(
        cell,
        pair,
        id=f"{cell}-{pair[0]}+{pair[1]}",
        marks=pytest.mark.full if cell in ELMAN and cell != ELMAN[turn % 3] else (),
    )
    for turn, pair in enumerate(itertools.combinations(OPTIONS, 2))
    for cell in NAMES
    if fits(cell, *pair)
]


@pytest.mark.parametrize("cell", NAMES)
def test_plain(cell: str) -> None:
    assert gradcheck(*function_of_inputs(cell, ()))


@pytest.mark.parametrize(("cell", "options"), SINGLE)
def test_option(cell: str, options: tuple[str]) -> None:
    """The whole Jacobian, each option alone."""
    assert gradcheck(*function_of_inputs(cell, options))


@pytest.mark.parametrize(("cell", "options"), PAIRS)
def test_pair(cell: str, options: tuple[str, str]) -> None:
    """A random projection of the Jacobian, for every pair of options that go together."""
    assert gradcheck(*function_of_inputs(cell, options), fast_mode=True)


@pytest.mark.parametrize("cell", NAMES)
def test_single_cell(cell: str) -> None:
    """One step as a function of its weights, with states that need gradients."""
    G, S = CELLS[cell].G, CELLS[cell].S

    def run(x: Tensor, *rest: Tensor) -> Any:
        hx: Any = rest[0] if S == 1 else rest[:S]
        return functional.cell("Cell", cell, x, hx, LayerWeights(*rest[S:]))

    shapes = [*[(B, H)] * S, (G * H, INPUTS), (G * H, H), (G * H,), (G * H,)]
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in [(B, INPUTS), *shapes]
    ]
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs, fast_mode=True)


SECOND = [
    pytest.param(cell, options, id="-".join((cell, *options)))
    for cell in NAMES
    for options in (
        ("hx",),
        ("hx", "lengths"),
        ("hx", "reset"),
        ("hx", "projection"),
        ("hx", "bidirectional", "lengths", "reset", "all-states"),
        ("hx", "single-bias", "two-layers"),
        ("hx", "recurrent-dropout", "bidirectional", "lengths", "reset", "two-layers"),
        ("hx", "recurrent-dropout", "projection", "packed"),
        ("recurrent-dropout", "input-dropout", "dropout", "lengths"),
        ("input-dropout", "bidirectional", "packed"),
    )
    if fits(cell, *options)
]


@pytest.mark.parametrize(("cell", "options"), SECOND)
def test_second_order(cell: str, options: tuple[str, ...]) -> None:
    assert gradgradcheck(*function_of_inputs(cell, options), fast_mode=True)


@pytest.mark.parametrize("cell", NAMES)
def test_gradient_penalty(cell: str) -> None:
    """A critic's penalty on the norm of dx (Gulrajani et al. 2017), in eval mode: the gradients
    of the parameters equal those on the reference backend."""
    found = {}
    for backend in ("cpu", "reference"):
        layer = make_layer(cell, num_layers=2, bidirectional=True).eval()
        layer.backend = backend
        gen = torch.Generator().manual_seed(5)
        x = torch.randn(4, 3, INPUTS, generator=gen, dtype=torch.float64).requires_grad_()
        score = layer(x)[0].sum()
        (dx,) = torch.autograd.grad(score, x, create_graph=True)
        penalty = ((dx.norm(dim=2) - 1) ** 2).mean()
        (score + penalty).backward()
        found[backend] = [penalty, x.grad, *(p.grad for p in layer.parameters())]
    for got, want in zip(found["cpu"], found["reference"], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("cell", NAMES)
def test_second_order_through_hx(cell: str) -> None:
    """A Hessian-vector product with respect to the initial state, against the reference."""
    found = []
    for backend in ("cpu", "reference"):
        layer = make_layer(cell, bidirectional=True)
        layer.backend = backend
        gen = torch.Generator().manual_seed(5)
        x = torch.randn(4, 3, INPUTS, generator=gen, dtype=torch.float64)
        h0, c0, v = torch.randn(3, 2, 3, H, generator=gen, dtype=torch.float64)
        h0.requires_grad_()
        y, _ = layer(x, (h0, c0) if cell == "lstm" else h0)
        (first,) = torch.autograd.grad(y.square().sum(), h0, create_graph=True)
        (second,) = torch.autograd.grad((first * v).sum(), h0)
        found.append(second)
    assert found[0].any()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("cell", NAMES)
def test_backward_in_eval_mode(cell: str, training: bool) -> None:
    """Backward works in eval mode, and gives what training mode gives without dropout."""
    layer = make_layer(cell, num_layers=2).train(training)
    x = torch.ones(T, B, INPUTS, dtype=torch.float64, requires_grad=True)
    layer(x)[0].sum().backward()
    reference = make_layer(cell, num_layers=2).train()
    reference.backend = "reference"
    other = x.detach().clone().requires_grad_()
    reference(other)[0].sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    for p, q in zip(layer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_frozen_parts_get_no_gradient() -> None:
    """Frozen weights stay without gradient, and the others are right beside them."""
    layer = make_layer("lstm", bidirectional=True)
    layer.weight_hh_l0.requires_grad_(False)
    layer.bias_ih_l0_reverse.requires_grad_(False)
    layer(torch.ones(T, B, INPUTS, dtype=torch.float64))[0].sum().backward()
    whole = make_layer("lstm", bidirectional=True)
    whole.backend = "reference"
    whole(torch.ones(T, B, INPUTS, dtype=torch.float64))[0].sum().backward()
    for (name, p), q in zip(layer.named_parameters(), whole.parameters(), strict=True):
        if p.requires_grad:
            assert q.grad is not None
            torch.testing.assert_close(p.grad, q.grad)
        else:
            assert p.grad is None, name


def test_a_state_carried_on_needs_detach() -> None:
    """A state of a graph that was freed gives torch's own error."""
    layer: nn.Module = make_layer("gru")
    x = torch.ones(T, B, INPUTS, dtype=torch.float64)
    y, h = layer(x)
    y.sum().backward()
    y, _ = layer(x, h)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
