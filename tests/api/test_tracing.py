"""Whoever records the calls of a layer or a cell sees one graph, with gradients and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import rnnkernels
from helpers import draw, same_bits, tensors
from rnnkernels import _ops

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "RNN": ("RNN", {}),
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "LSTM projected": ("LSTM", {"proj_size": 2, "num_layers": 2}),
    "RNNCell": ("RNNCell", {}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {"bias": False}),
}
# What torch.nn's layers warn of as well: checks of sizes are not recorded.
TRACING = (
    "ignore:.torch.jit.trace:DeprecationWarning",
    "ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning",
)


def build(name: str) -> nn.Module:
    kind, options = MODULES[name]
    torch.manual_seed(0)
    module: nn.Module = getattr(rnnkernels, kind)(3, 4, **options)
    return module


def input_of(name: str, T: int = 5, B: int = 2) -> Tensor:
    shape = (B, 3) if name.endswith("Cell") else (T, B, 3)
    return draw(*shape, seed=T, dtype=torch.float32)


@pytest.mark.filterwarnings(*TRACING)
@pytest.mark.parametrize("name", MODULES)
def test_jit_trace(name: str) -> None:
    """With its check, which traces once more; the trace runs at other sizes, backward too."""
    module = build(name)
    traced = torch.jit.trace(module, (input_of(name),), check_trace=True)
    x = input_of(name, 9, 4)
    leaves = [x.requires_grad_(), *module.parameters()]
    out = [tensors(run(x)) for run in (module, traced)]
    torch.testing.assert_close(out[1], out[0], rtol=0, atol=0)
    grads = [torch.autograd.grad(sum(t.square().sum() for t in o), leaves) for o in out]
    assert same_bits(*grads)


class WithLengths(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = rnnkernels.GRU(3, 4, **options)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y: Tensor = self.layer(x, lengths=lengths)[0]
        return y


@pytest.mark.filterwarnings(*TRACING)
@pytest.mark.parametrize("grad", [True, False], ids=["recorded with gradients", "without"])
@pytest.mark.parametrize("option", ["lengths", "layer_norm", "truncate", "recompute"])
def test_jit_trace_with_lengths(option: str, grad: bool) -> None:
    """The check records once more without gradients; a trace trains however it was recorded, and
    what stands in the padding reaches no gradient."""
    options: dict[str, Any] = {
        "layer_norm": {"layer_norm": True}, "truncate": {"truncate": (2, 3)},
        "recompute": {"recompute": 2},
    }.get(option, {})  # fmt: skip
    module = WithLengths(**options)
    given = input_of("GRU"), torch.tensor([5, 2])
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, given, check_trace=True)
    x, lengths = input_of("GRU", 5, 2), torch.tensor([1, 4])
    padding = torch.arange(5)[:, None, None] >= lengths[:, None]
    leaves = [x.masked_fill(padding, float("nan")).requires_grad_(), *module.parameters()]
    out = [run(leaves[0], lengths) for run in (module, traced)]
    torch.testing.assert_close(out[1], out[0])
    grads = [torch.autograd.grad(o.square().sum(), leaves) for o in out]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_the_call_is_the_same_with_gradients_and_without(name: str) -> None:
    """Which is what a recorder above autograd sees of it."""
    module, x = build(name), input_of(name)
    seen = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            graph = make_fx(module, pre_dispatch=True)(x).graph
        calls = [node for node in graph.nodes if "rnnkernels" in str(node.target)]
        save = [a.name for a in calls[0].target._schema.arguments].index("save")
        seen.append([(str(c.target), c.args[save]) for c in calls])
    assert seen[0] == seen[1] and seen[0]


@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_a_compiled_gradient(name: str) -> None:
    module, x = build(name), input_of(name)
    parameters = {n: p.detach() for n, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return tensors(torch.func.functional_call(module, parameters, (x,)))[0].square().sum()

    torch._dynamo.reset()
    got = torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(parameters, x)
    torch.testing.assert_close(got, torch.func.grad(loss)(parameters, x))
    torch._dynamo.reset()
