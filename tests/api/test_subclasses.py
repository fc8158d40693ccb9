"""Wrapper subclasses of a tensor: every output and gradient is one wherever torch's own would be,
and each of its parts is what that part gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import rnnkernels
from helpers import draw, tensors
from rnnkernels import _ops

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

T, B, I, H = 4, 3, 5, 6
F64 = torch.float64
MODULES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "RNN": ("RNN", {}, {}),
    "LSTM": ("LSTM", {}, {}),
    "GRU": ("GRU", {}, {}),
    "RNN relu, one bias": ("RNN", {"nonlinearity": "relu", "bias_mode": "single"}, {}),
    "LSTM projected, both ways": ("LSTM", {"proj_size": 2, "bidirectional": True}, {}),
    "GRU both ways, two layers": ("GRU", {"num_layers": 2, "bidirectional": True}, {}),
    "GRU batch first, no bias": ("GRU", {"batch_first": True, "bias": False}, {}),
    "GRU merged": ("GRU", {"bidirectional": True, "merge_mode": "mul"}, {}),
    "GRU windows": ("GRU", {"truncate": 2}, {}),
    "GRU overlapping windows": ("GRU", {"truncate": (1, 2)}, {}),
    "GRU recomputed": ("GRU", {"recompute": 3}, {}),
    "GRU clipped": ("GRU", {"grad_clip": ("norm", 0.1)}, {}),
    "GRU lengths": ("GRU", {"bidirectional": True}, {"lengths": [4, 0, 2]}),
    "GRU resets": ("GRU", {}, {"reset": torch.arange(T * B).view(T, B) % 5 == 0}),
    "LSTM all states": ("LSTM", {"num_layers": 2}, {"return_all_states": True}),
    "GRU of no steps": ("GRU", {}, {}),
    "RNNCell": ("RNNCell", {}, {}),
    "LSTMCell": ("LSTMCell", {}, {}),
    "GRUCell": ("GRUCell", {}, {}),
    "GRUCell one bias": ("GRUCell", {"bias_mode": "single"}, {}),
}
WRAPPED = ("weights", "input", "hx", "all")


def two(t: Tensor, requires_grad: bool = True) -> Tensor:
    """A tensor whose second part differs from the first."""
    pair = TwoTensor(t.detach().clone(), t.detach() * 0.5)
    return pair.requires_grad_(requires_grad)  # type: ignore[no-any-return]


def part(t: Tensor, second: bool) -> Tensor:
    if isinstance(t, TwoTensor):
        t = t.b if second else t.a
    return t.detach().clone()


def run(module: nn.Module, leaves: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """All outputs and gradients by name."""
    states = [leaves[name] for name in ("h", "c") if name in leaves]
    hx = tuple(states) if len(states) > 1 else states[0]
    weights = {name: leaves[name] for name, _ in module.named_parameters()}
    out = tensors(torch.func.functional_call(module, weights, (leaves["x"], hx), options))
    found = {f"output {i}": o for i, o in enumerate(out)}
    loss = torch.stack([(o * draw(*o.shape, seed=i, dtype=F64)).sum() for i, o in enumerate(out)])
    grads = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
    found |= {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True) if g is not None}
    return found


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("name", MODULES)
def test_every_output_and_gradient(name: str, wrapped: str) -> None:
    kind, options, call = MODULES[name]
    torch.manual_seed(0)
    module: nn.Module = getattr(rnnkernels, kind)(I, H, dtype=F64, **options)
    steps = 0 if "no steps" in name else T
    if kind.endswith("Cell"):
        sizes = {"x": (B, I), "h": (B, H), "c": (B, H)}
    else:
        rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
        x = (B, steps, I) if options.get("batch_first") else (steps, B, I)
        sizes = {"x": x, "h": (rows, B, options.get("proj_size", H)), "c": (rows, B, H)}
    if "LSTM" not in kind:
        del sizes["c"]
    plain = {n: draw(*shape, seed=i, dtype=F64) for i, (n, shape) in enumerate(sizes.items())}
    weights = {n: p.detach() for n, p in module.named_parameters()}
    chosen = {"weights": set(weights), "input": {"x"}, "hx": {"h", "c"}}
    chosen["all"] = set().union(*chosen.values())
    leaves = {
        n: two(t) if n in chosen[wrapped] else t.clone().requires_grad_()
        for n, t in {**plain, **weights}.items()
    }
    found = run(module, leaves, call)
    for second in (False, True):
        parts = {n: part(t, second).requires_grad_() for n, t in leaves.items()}
        want = run(module, parts, call)
        assert found.keys() == want.keys()
        for n, t in found.items():
            assert isinstance(t, TwoTensor), f"{n} is a {type(t).__name__}"
            torch.testing.assert_close(t.b if second else t.a, want[n], rtol=1e-12, atol=1e-13)
