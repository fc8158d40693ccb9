"""Forward-mode AD: tangents of outputs, which kernels compute, and of their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vmap

import rnnkernels
from helpers import counted, draw, tensors
from rnnkernels import _ops
from transforms import CASES, F64, FEW_CASES, LANES, MODULES, B, Case, H, I, Lane, T, stacked

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # by torch.func.jvp
]
modules = pytest.mark.parametrize("module", MODULES)
few = pytest.mark.parametrize(("module", "call"), FEW_CASES)
close = torch.testing.assert_close


def direction(case: Case) -> tuple[Any, Tensor]:
    """Tangents of the parameters, and of the x of every lane."""
    seeds = enumerate(case.parameters.items(), 20)
    of_parameters = {n: draw(*p.shape, seed=seed, dtype=F64) for seed, (n, p) in seeds}
    return of_parameters, draw(*case.lanes.x.shape, seed=40, dtype=F64)


def tangents(case: Case, lane: Lane, along: tuple[Any, Tensor]) -> list[Tensor]:
    """Of all outputs, along parameters and x."""
    run = lambda p, x: case(p, lane._replace(x=x))  # noqa: E731
    found: list[Tensor] = jvp(run, (case.parameters, lane.x), along)[1]
    return found


@pytest.mark.parametrize(("module", "call"), CASES)
def test_against_reverse_mode(module: str, call: str) -> None:
    """<v, J t> is <J^T v, t>, where gradients are not bounded; values are those of the kernels."""
    case = Case(module, call)
    lane, (of_parameters, of_x) = case.lane(0), direction(case)
    leaves = {n: p.clone().requires_grad_() for n, p in case.parameters.items()}
    x = lane.x.clone().requires_grad_()
    out = case(leaves, lane._replace(x=x))
    along = of_parameters, of_x[0]
    run = lambda p, x: case(p, lane._replace(x=x))  # noqa: E731
    values, got = jvp(run, (case.parameters, lane.x), along)
    assert all(torch.equal(v, o) for v, o in zip(values, out, strict=True))
    if case.bounded:  # a bound is of gradients, and leaves tangents as they are without one
        unbounded = Case(module, "plain" if call == "bounded" else "lengths")
        return close(got, tangents(unbounded, lane, along))
    seeds = [draw(*o.shape, seed=50 + i, dtype=F64) for i, o in enumerate(out)]
    found = torch.autograd.grad(out, [*leaves.values(), x], seeds)
    forward = sum((v * t).sum() for v, t in zip(seeds, got, strict=True))
    pairs = zip(found, (*of_parameters.values(), of_x[0]), strict=True)
    close(forward, sum((g * t).sum() for g, t in pairs))


@few
def test_with_vmap(module: str, call: str) -> None:
    """In either order."""
    case = Case(module, call)
    of_parameters, of_x = direction(case)
    each = [tangents(case, case.lane(i), (of_parameters, of_x[i])) for i in range(LANES)]
    got = vmap(lambda lane, t: tangents(case, lane, (of_parameters, t)))(case.lanes, of_x)
    close(got, stacked(each))

    def lanes(parameters: Any, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = vmap(case, (None, 0))(parameters, case.lanes._replace(x=x))
        return found

    _, got = jvp(lanes, (case.parameters, case.lanes.x), (of_parameters, of_x))
    close(got, stacked(each))


@few
def test_tangents_of_gradients(module: str, call: str) -> None:
    """Products with the Hessian, of one sequence and of each lane: what the reference gives."""
    case = Case(module, call)
    of_parameters, of_x = direction(case)

    def gradients(parameters: Any, x: Tensor, lane: Lane) -> Any:
        return grad(lambda p, x: case.loss(p, lane._replace(x=x)), (0, 1))(parameters, x)

    def want(i: int) -> Any:
        lane = case.lane(i)
        with rnnkernels.use_backend("reference"), forward_ad.dual_level():
            leaves = [t.clone().requires_grad_() for t in (*case.parameters.values(), lane.x)]
            along = (*of_parameters.values(), of_x[i])
            duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, along, strict=True)]
            parameters = dict(zip(of_parameters, duals, strict=False))
            loss = case.loss(parameters, lane._replace(x=duals[-1]))
            found = torch.autograd.grad(loss, duals, create_graph=True)
            *parts, dx = [forward_ad.unpack_dual(t).tangent.detach() for t in found]
        return dict(zip(of_parameters, parts, strict=True)), dx

    each = [want(i) for i in range(LANES)]
    lane = case.lane(0)
    _, got = jvp(
        lambda p, x: gradients(p, x, lane), (case.parameters, lane.x), (of_parameters, of_x[0])
    )
    close(got, each[0])
    of_each = lambda p, x: vmap(gradients, (None, 0, 0))(p, x, case.lanes)  # noqa: E731
    _, got = jvp(of_each, (case.parameters, case.lanes.x), (of_parameters, of_x))
    close(got, stacked(each))


@pytest.mark.parametrize("module", ["RNN", "LSTM", "GRUCell"])
def test_jacobians_and_hessians(module: str) -> None:
    case = Case(module)
    f = lambda x: case(case.parameters, case.lane(0)._replace(x=x))[0]  # noqa: E731
    loss = lambda x: f(x).square().sum()  # noqa: E731
    x = case.lanes.x[0]
    want = torch.autograd.functional.jacobian(f, x)
    close(jacfwd(f)(x), want)
    close(vmap(jacfwd(f))(case.lanes.x)[0], want)
    with rnnkernels.use_backend("reference"):
        want = jacrev(jacrev(loss))(x)
    close(hessian(loss)(x), want)
    close(jacrev(jacrev(loss))(x), want)
    close(vmap(hessian(loss))(case.lanes.x)[0], want)


# torch.func.linearize warns so of any constant.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_linearize() -> None:
    cell, x = rnnkernels.GRUCell(I, H, dtype=F64), draw(B, I, seed=1, dtype=F64)
    _, push = linearize(cell, x)
    close(push(x + 1), jvp(cell, (x,), (x + 1,))[1])


@pytest.mark.parametrize("module", ["RNN", "LSTMCell", "GRUCell"])
def test_gradcheck(module: str) -> None:
    """Without torch.func, where layers and cells take their short ways."""
    case = Case(module)
    names = list(case.parameters)

    def f(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        found = case(dict(zip(names, parameters, strict=True)), case.lane(0)._replace(x=x))
        return tuple(found)

    inputs = [t.clone().requires_grad_() for t in (case.lanes.x[0], *case.parameters.values())]
    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(
        f, inputs, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True
    )


@modules
def test_dual_numbers(module: str) -> None:
    """By the module itself, whose short way hands on tangents too; with a backward inside."""
    case = Case(module)
    x, along = case.lanes.x[0], draw(*case.lanes.x[0].shape, seed=40, dtype=F64)
    zero = {n: torch.zeros_like(p) for n, p in case.parameters.items()}
    want = tangents(case, case.lane(0), (zero, along))
    with forward_ad.dual_level():
        out = tensors(case.module(forward_ad.make_dual(x, along)))
        close([forward_ad.unpack_dual(t).tangent for t in out], want)
        leaf = x.clone().requires_grad_()
        out = tensors(case.module(forward_ad.make_dual(leaf, along)))
        (dx,) = torch.autograd.grad(out[0].square().sum(), leaf)
        got = forward_ad.unpack_dual(dx).tangent
    loss = lambda x: case(case.parameters, case.lane(0)._replace(x=x))[0].square().sum()  # noqa: E731
    close(got, jvp(grad(loss), (x,), (along,))[1])
    assert all(forward_ad.unpack_dual(t).tangent is None for t in tensors(case.module(x)))


def test_values_come_from_kernels() -> None:
    lstm, x = rnnkernels.LSTM(I, H), draw(T, B, I, seed=1, dtype=torch.float32)
    used = counted(lambda: jvp(lambda x: lstm(x)[0], (x,), (x,)))
    assert used["rnnkernels::sequence_forward"] > 0
    assert torch.equal(jvp(lambda x: lstm(x)[0], (x,), (x,))[0], lstm(x)[0])


def test_recording_goes_on() -> None:
    """Norms of gradients are those of a backward, whatever tangents are there."""
    gru = rnnkernels.GRU(I, H, dtype=F64)
    x, along = draw(2, T, B, I, seed=1, dtype=F64)
    parameters = dict(gru.named_parameters())

    def norms(x: Tensor) -> Tensor:
        with rnnkernels.diagnostics.gradient_flow(gru) as flow:
            functional_call(gru, parameters, (x,))[0].square().sum().backward()
        return flow.norms("", layer=0)

    want = norms(x)
    with forward_ad.dual_level():
        close(norms(forward_ad.make_dual(x, along)), want)
