"""Numerical gradients of first and second order, in float64, for every cell, option and pair."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from cases import NAMES
from option_functions import (
    CALL,
    CONSTRUCTOR,
    INPUTS,
    B,
    H,
    T,
    fits,
    function_of_inputs,
    make_layer,
)
from rnnkernels import functional
from rnnkernels._core.call import LayerWeights
from rnnkernels.cells import CELLS

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = (*CONSTRUCTOR, *CALL)

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
