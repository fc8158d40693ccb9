"""Batches of gradients, and torch.vmap: what works, and what the errors say that does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

import rnnkernels
from helpers import draw, tensors
from rnnkernels import _ops

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

T, B, I, H, N = 4, 2, 3, 5, 6
F64 = torch.float64
MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "RNN": ("RNN", {}),
    "LSTM": ("LSTM", {"proj_size": 2, "num_layers": 2}),
    "GRU": ("GRU", {"bidirectional": True}),
    "RNNCell": ("RNNCell", {}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
}


def build(name: str) -> nn.Module:
    kind, options = MODULES[name]
    torch.manual_seed(0)
    module: nn.Module = getattr(rnnkernels, kind)(I, H, dtype=F64, **options)
    return module


def input_of(name: str, *lanes: int) -> Tensor:
    return draw(*lanes, *(() if name.endswith("Cell") else (T,)), B, I, seed=1, dtype=F64)


def output(result: Any) -> Tensor:
    return tensors(result)[0]


@pytest.mark.parametrize("name", MODULES)
def test_a_batch_of_gradients(name: str) -> None:
    """What each gives alone."""
    module, x = build(name), input_of(name).requires_grad_()
    leaves = [x, *module.parameters()]
    for create_graph in (False, True):
        y = output(module(x))
        seeds = draw(N, *y.shape, seed=2, dtype=F64)
        options: Any = {"retain_graph": True, "create_graph": create_graph}
        got = torch.autograd.grad(y, leaves, seeds, is_grads_batched=True, **options)
        for i in range(N):
            want = torch.autograd.grad(y, leaves, seeds[i], retain_graph=True)
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g[i], w)
        assert all(g.requires_grad == create_graph for g in got)


@pytest.mark.parametrize("name", MODULES)
def test_jacobians(name: str) -> None:
    module, x = build(name), input_of(name)

    def f(x: Tensor) -> Tensor:
        return output(module(x))

    want = jacobian(f, x)
    torch.testing.assert_close(jacobian(f, x, vectorize=True), want)
    with pytest.raises(NotImplementedError, match=r"torch.vmap .*use_backend\('reference'\)"):
        torch.func.jacrev(f)(x)
    with rnnkernels.use_backend("reference"):
        torch.testing.assert_close(torch.func.jacrev(f)(x), want)


@pytest.mark.parametrize("name", MODULES)
def test_vmap_is_refused(name: str) -> None:
    module, x = build(name), input_of(name, N)
    for run in (lambda x: output(module(x)), torch.func.grad(lambda x: output(module(x)).sum())):
        with pytest.raises(NotImplementedError, match=r"torch.vmap .*use_backend\('reference'\)"):
            torch.vmap(run)(x)


@pytest.mark.parametrize("name", MODULES)
def test_vmap_over_the_reference(name: str) -> None:
    """Outputs, and the gradients of every sample."""
    module, x = build(name), input_of(name, N)
    parameters = {n: p.detach() for n, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return output(torch.func.functional_call(module, parameters, (x,))).square().sum()

    with rnnkernels.use_backend("reference"):
        got = torch.vmap(lambda x: output(module(x)))(x)
        each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    torch.testing.assert_close(got, torch.stack([output(module(lane)) for lane in x]))
    for i in range(N):
        want = torch.func.grad(loss)(parameters, x[i])
        torch.testing.assert_close({n: g[i] for n, g in each.items()}, want)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths_and_resets_of_each_lane(bidirectional: bool) -> None:
    torch.manual_seed(0)
    gru = rnnkernels.GRU(I, H, dtype=F64, bidirectional=bidirectional)
    x = draw(N, T, B, I, seed=1, dtype=F64)
    lengths = torch.randint(0, T + 1, (N, B))
    reset = torch.rand(N, T, B) < 0.3
    with rnnkernels.use_backend("reference"):
        run = torch.vmap(lambda x, n, r: gru(x, lengths=n, reset=r))
        got = tensors(run(x, lengths, reset))
    for i in range(N):
        want = tensors(gru(x[i], lengths=lengths[i], reset=reset[i]))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g[i], w)
