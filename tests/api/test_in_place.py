"""Outputs changed in place: gradients as of the same change out of place, or an error, and no copy
where nobody changes anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import in_place_report as report
import rnnkernels
from helpers import draw, same_bits, tensors
from in_place_report import CLASSES, Case
from rnnkernels import _ops
from rnnkernels.diagnostics import gradient_flow

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

T, B, H = 5, 3, 8
shared = torch._C._is_cow_tensor


@pytest.mark.parametrize("case", list(report.cases()), ids=str)
def test_every_output_of_every_class(case: Case) -> None:
    assert report.outcome(rnnkernels, case) == "ok"
    if report.has_torch(case):
        assert report.outcome(nn, case) != "WRONG"


def layer(name: str = "GRU", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = getattr(rnnkernels, name)(H, H, **options)
    return module


def gradients(module: nn.Module, x: Tensor, change: bool, **how: Any) -> list[Tensor]:
    y = tensors(module(x))[0]
    y = torch.relu_(y) if change else torch.relu(y)
    return list(torch.autograd.grad(y.square().sum(), list(module.parameters()), **how))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_other_ways_through_backward(name: str) -> None:
    """Gradients of gradients, hooks, checkpoints and recorded norms, of outputs that change."""
    module = layer(name)
    x = draw(*((B, H) if name.endswith("Cell") else (T, B, H)), seed=1, dtype=torch.float32)
    want = gradients(module, x, False)
    assert same_bits(gradients(module, x, True), want)
    torch.testing.assert_close(gradients(module, x, True, create_graph=True), want)
    for hooks in (save_on_cpu(), saved_tensors_hooks(lambda t: t.clone(), lambda t: t)):
        with hooks:
            assert same_bits(gradients(module, x, True), want)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():  # a mode: it sees torch.mm
        torch.testing.assert_close(gradients(module, x, True), want)
    norms = []
    for change in (False, True):
        with gradient_flow(module) as flow:
            gradients(module, x, change)
        norms.append([record.norms for record in flow.records])
    assert norms[0] and same_bits(*norms)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    module, x = layer("RNN"), draw(T, B, H, seed=1, dtype=torch.float32).requires_grad_()

    def gradient(y: Tensor) -> Tensor:
        x.grad = None
        torch.relu_(y).sum().backward()
        assert x.grad is not None
        return x.grad

    run = lambda x: module(x)[0]  # noqa: E731
    want = gradient(run(x))
    assert torch.equal(gradient(checkpoint(run, x, use_reentrant=reentrant)), want)


READERS: dict[str, Callable[[Tensor], Any]] = {
    "linear": nn.Linear(H, H),
    "linear in bfloat16": lambda y: F.linear(y.bfloat16(), torch.ones(H, H, dtype=torch.bfloat16)),
    "dropout": nn.Dropout(0.5),
    "concatenated": lambda y: torch.cat([y, y], -1),
    "summed": lambda y: y.sum(),
    "transposed": lambda y: y.transpose(0, 1).reshape(-1, H),
    "last step": lambda y: y[-1] * 2,
    "normed": nn.LayerNorm(H),
    "softmax": lambda y: y.softmax(-1),
    "attention": lambda y: F.scaled_dot_product_attention(y, y, y),
    "convolution": lambda y: F.conv1d(y, torch.ones(2, B, 3)),
    "indexed": lambda y: y[torch.tensor([0, 2])],
    "a second layer": rnnkernels.GRU(H, H),
    "a second LSTM": rnnkernels.LSTM(H, H, bidirectional=True),
    "a cell": lambda y: rnnkernels.LSTMCell(H, H)(y[0]),
    "copied": lambda y: copy.deepcopy(y.detach()),
    "moved": lambda y: y.to(torch.float64),
    "compared": lambda y: torch.equal(y, y),
}


@pytest.mark.parametrize("reader", READERS)
def test_readers_copy_nothing(reader: str) -> None:
    """Memory stays shared by the output and what backward has of it, backward included."""
    y = tensors(layer("RNN")(draw(T, B, H, seed=1, dtype=torch.float32)))[0]
    assert shared(y)
    out = READERS[reader](y)
    assert shared(y)
    out = tensors(out)[0] if not isinstance(out, bool) and out is not None else y
    (out if out.requires_grad else y).float().sum().backward()
    assert shared(y)


@pytest.mark.parametrize("name", ["GRUCell", "LSTMCell", "RNNCell"])
def test_what_a_step_keeps(name: str) -> None:
    """The h of a step only where a cell's backward reads it; a step reads the one before."""
    cell = layer(name)
    states: Any = None
    for _ in range(3):
        states = cell(draw(B, H, seed=1, dtype=torch.float32), states)
    kept = [shared(t) for t in tensors(states)]
    assert kept == {"GRUCell": [False], "LSTMCell": [False, True], "RNNCell": [True]}[name]


def test_without_a_backward_nothing_is_shared() -> None:
    with torch.no_grad():
        y, h = layer("RNN")(torch.zeros(T, B, H))
    assert not shared(y) and not shared(h)


def test_a_change_copies_once_and_for_the_output_alone() -> None:
    y = layer("RNN")(draw(T, B, H, seed=1, dtype=torch.float32))[0]
    view, before = y[0], y.detach().clone()
    y.mul_(2)
    assert not shared(y) and torch.equal(view, before[0] * 2)
    address = y.data_ptr()
    y.mul_(2)
    assert y.data_ptr() == address


def test_other_holders_of_the_memory() -> None:
    """numpy, DLPack and shared memory hold what the output becomes, not what backward reads."""
    module, x = layer("RNN"), draw(T, B, H, seed=1, dtype=torch.float32)
    want = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    for write in (
        lambda y: y.numpy().fill(0),
        lambda y: torch.from_dlpack(y).zero_(),
        lambda y: y.share_memory_().zero_(),
        lambda y: y.untyped_storage().fill_(0),
    ):
        y = module(x)[0]
        write(y.detach())
        assert not y.any()
        assert same_bits(torch.autograd.grad(y.sum(), list(module.parameters())), want)


def test_an_output_changed_inside_a_recorded_graph_is_an_error() -> None:
    """Where the graph of a backward is recorded from the tensors themselves, their version is
    watched."""

    class Look(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            return func(*args, **(kwargs or {}))

    module, x = layer("RNN"), draw(T, B, H, seed=1, dtype=torch.float32)
    with Look():
        y = module(x)[0]
    torch.relu_(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_classes() -> None:
    kinds = {kind for kind, _ in CLASSES.values()}
    assert kinds == {"RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"}
