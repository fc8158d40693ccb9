"""Layers whose products are normalised: numerical derivatives, transforms, 16-bit types, the same
bits, and numbers that are not finite."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jvp, vmap

import rnnkernels
from helpers import draw, same_bits, tensors
from normed_layers import F64, KINDS, B, I, T, X, called, given, make
from rnnkernels.testing import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    """Against float64, of the same numbers."""
    narrow = make(kind, backend="cpu").to(dtype)
    wide = copy.deepcopy(narrow).double()
    x = X.to(dtype)
    results = []
    for module in (narrow, wide):
        states = [s.detach().to(dtype).to(module.weight_ih_l0) for s in given(make(kind))]
        outputs = called(module, x.to(module.weight_ih_l0), states)
        loss = torch.stack([o.double().square().sum() for o in outputs]).sum()
        results.append([*outputs, *torch.autograd.grad(loss, list(module.parameters()))])
    near = 1e-5 if dtype == torch.float32 else 40 * torch.finfo(dtype).eps
    for a, b in zip(*results, strict=True):
        assert a.dtype == dtype
        largest = float(b.detach().abs().max())
        torch.testing.assert_close(a.double(), b, rtol=near, atol=near * largest)


#: What two of these do to each other is differentiated numerically.
PAIRED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reverse": ({"bidirectional": True}, {}),
    "projection": ({"proj_size": 2}, {}),
    "recurrent-dropout": ({"recurrent_dropout": 0.4}, {}),
    "lengths": ({}, {"lengths": [2, 1]}),
    "reset": ({}, {"reset": torch.tensor([[False, True], [True, False]])}),
}
PAIRS = [("LSTM", names) for names in itertools.combinations(PAIRED, 2)]
PAIRS += [("GRU", ("reverse", "reset")), ("GRU", ("recurrent-dropout", "lengths"))]


class Function:
    """A small layer as a function of its input, states and parameters."""

    def __init__(self, kind: str, names: tuple[str, ...] = ()) -> None:
        options: dict[str, Any] = {}
        self.call: dict[str, Any] = {}
        for name in names:
            options, self.call = options | PAIRED[name][0], self.call | PAIRED[name][1]
        self.module = make(kind, (2, 3), backend="cpu", **options)
        self.every = dict(self.module.named_parameters())
        x, parameters = draw(2, 2, 2, seed=4, dtype=F64), self.every.values()
        self.values = [x.requires_grad_(), *given(self.module, 2)]
        self.states = len(self.values) - 1
        self.values += [p.detach().requires_grad_() for p in parameters]

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        hx = values[1 : 1 + self.states]
        changed = dict(zip(self.every, values[1 + self.states :], strict=True))
        arguments = values[0], hx if len(hx) > 1 else hx[0]
        return tuple(tensors(functional_call(self.module, changed, arguments, self.call)))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("kind", "names"), PAIRS, ids=lambda p: p if p in KINDS else "-".join(p))
def test_gradients(kind: str, names: tuple[str, ...]) -> None:
    function = Function(kind, names)
    assert gradcheck(function, function.values, fast_mode=True)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("kind", "names"), [("LSTM", ()), ("GRU", ("reset",))])
def test_second_derivatives(kind: str, names: tuple[str, ...]) -> None:
    """Of the reference, which those of the kernels' gradients lead to."""
    function = Function(kind, names)
    assert gradgradcheck(function, function.values, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_whatever_the_threads(kind: str) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            module = make(kind, (16, 160), dtype=torch.float32, backend="cpu")
            x = draw(4, 3, 16, seed=1, dtype=torch.float32).requires_grad_()
            y = module(x)[0]
            asked = [
                x,
                module.weight_hh_l0,
                *(p for n, p in module.named_parameters() if "_hh" in n),
            ]
            found.append([y, *torch.autograd.grad(y.square().sum(), asked)])
    finally:
        torch.set_num_threads(before)
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_in_any_batch(kind: str) -> None:
    module = make(kind, (8, 40), dtype=torch.float32)
    x = draw(5, 37, 8, seed=1, dtype=torch.float32)
    with rnnkernels.batch_invariant():
        found = []
        for rows in (slice(None), slice(3, 4), slice(3, 10)):
            own = x[:, rows].detach().requires_grad_()
            y = module(own)[0]
            (dx,) = torch.autograd.grad(y.square().sum(), own)
            place = 3 if rows == slice(None) else 0
            found.append([y[:, place], dx[:, place]])
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])
    assert_close(found[0][0], module(x)[0][:, 3])


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_not_finite_stay_in_their_row(kind: str) -> None:
    module, x = make(kind, backend="cpu"), X.detach().clone()
    clean = x.clone().requires_grad_()
    x[2, 1, 0] = torch.nan
    x[1, 3] = torch.inf
    x.requires_grad_()
    found = []
    for each in (x, clean):
        y = module(each)[0]
        found.append([y, *torch.autograd.grad(y[:, [0, 2, 4]].square().sum(), each)])
    others = [0, 2, 4]
    assert same_bits(*([t[:, others] for t in some] for some in found))
    assert found[0][0][2:, 1].isnan().all() and found[0][0][1:, 3].isnan().all()
    assert same_bits([found[0][0][:2, 1]], [found[1][0][:2, 1]])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own layer_norm
@pytest.mark.parametrize("kind", KINDS)
def test_transforms(kind: str) -> None:
    """Lanes of torch.vmap, and tangents, which the reference has."""
    module = make(kind, num_layers=2)
    lanes = draw(3, T, B, I, seed=7, dtype=F64)
    for a, x in zip(vmap(lambda x: module(x)[0])(lanes), lanes, strict=True):
        torch.testing.assert_close(a, module(x)[0], rtol=1e-12, atol=1e-13)

    def loss(x: Tensor) -> Tensor:
        return module(x)[0].square().sum((0, 2))

    _, tangent = jvp(loss, (X,), (lanes[0],))
    step = 1e-6
    slope = (loss(X + step * lanes[0]) - loss(X - step * lanes[0])) / (2 * step)
    torch.testing.assert_close(tangent, slope, rtol=1e-6, atol=1e-7)
