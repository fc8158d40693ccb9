"""Autocast casts each parameter once per region, on every way that a layer or a cell can go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import rnnkernels
from helpers import draw, same_bits, tensors
from modes import Dispatch
from rnnkernels import _ops

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

T, B, I, H, STEPS = 2, 3, 5, 6, 4
MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "RNN": ("RNN", {}),
    "LSTM": ("LSTM", {"proj_size": 2, "num_layers": 2}),
    "GRU": ("GRU", {"bidirectional": True, "dropout": 0.0}),
    "GRU merged": ("GRU", {"bidirectional": True, "merge_mode": "sum"}),
    "RNNCell": ("RNNCell", {}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
}


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


#: Ways that a call can go.
WAYS: dict[str, Callable[[], Any]] = {
    "short": nullcontext,
    "function mode": Functions,
    "default device": lambda: torch.device("cpu"),
    "reference": lambda: rnnkernels.use_backend("reference"),
    "backend by name": lambda: rnnkernels.use_backend("cpu"),
}


@contextmanager
def region(**options: Any) -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16, **options):
        yield


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    kind, options = MODULES[name]
    torch.manual_seed(0)
    module: nn.Module = getattr(rnnkernels, kind)(I, H, dtype=dtype, **options)
    return module


def input_of(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (B, I) if name.endswith("Cell") else (T, B, I)
    return draw(*shape, seed=1, dtype=dtype)


def unroll(module: nn.Module, x: Tensor, steps: int = STEPS) -> Tensor:
    state, total = None, torch.zeros(())
    for _ in range(steps):
        out = module(x, state)
        state = out if isinstance(module, nn.RNNCellBase) else out[1]
        total = total + sum(t.float().sum() for t in tensors(out))
    return total


def casts(loss: Tensor, module: nn.Module) -> list[int]:
    """How often each parameter was cast, of what a backward from here goes through."""
    found = dict.fromkeys(map(id, module.parameters()), 0)
    seen, open_ends = set(), [loss.grad_fn]
    while open_ends:
        node = open_ends.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nexts = [n for n, _ in node.next_functions]
        if node.name() == "ToCopyBackward0" and hasattr(nexts[0], "variable"):
            found[id(nexts[0].variable)] += 1
        open_ends += nexts
    return list(found.values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_each_parameter_is_cast_once_per_region(name: str, way: str) -> None:
    """With the values and gradients of a layer whose parameters are narrow."""
    module, x = build(name), input_of(name)
    with region(), WAYS[way]():
        loss = unroll(module, x)
        assert set(casts(loss, module)) == {1}
    with region(), WAYS[way]():
        both = loss + unroll(module, x)
    assert set(casts(both, module)) == {2}
    found = torch.autograd.grad(loss, list(module.parameters()))
    assert all(g.dtype == torch.float32 for g in found)

    if way == "reference":  # whose operators autocast takes one by one
        return
    narrow = build(name, torch.bfloat16)
    narrow.load_state_dict(module.state_dict())
    want = torch.autograd.grad(unroll(narrow, x.bfloat16()), list(narrow.parameters()))
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_all_ways_give_one_dtype(name: str, way: str) -> None:
    """float64 is left alone; states of one type and input of another are cast alike."""
    for dtype, out in ((torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        module, x = build(name, dtype), input_of(name, dtype)
        with region(), WAYS[way]():
            result = module(x)
            state = result if isinstance(module, nn.RNNCellBase) else result[1]
            again = module(x, state)
        assert {t.dtype for t in tensors([result, again])} == {out}


@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_a_cast_without_history_is_not_taken_for_one_with(name: str) -> None:
    """Parameters that were first cast under no_grad still have their gradients."""
    module, x = build(name), input_of(name)
    for without in (torch.no_grad, torch.inference_mode):
        with region():
            with without():
                unroll(module, x)
            loss = unroll(module, x)
        assert all(g.any() for g in torch.autograd.grad(loss, list(module.parameters())))


def test_torchs_switch_of_the_cache_is_ours() -> None:
    module, x = build("GRUCell"), input_of("GRUCell")
    with region(cache_enabled=False):
        loss = unroll(module, x)
    assert set(casts(loss, module)) == {STEPS}


@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_frozen_and_computed_weights(name: str) -> None:
    module, x = build(name), input_of(name)
    module.requires_grad_(False)
    with region():
        assert not unroll(module, x).requires_grad
    for p in ("weight_hh", "weight_hh_l0"):
        if hasattr(module, p):
            nn.utils.parametrize.register_parametrization(module, p, nn.Softplus())
    with region():
        loss = unroll(module.requires_grad_(), x)
    assert all(g.any() for g in torch.autograd.grad(loss, list(module.parameters())))


@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_compilers_and_transforms(name: str) -> None:
    module, x = build(name), input_of(name)
    parameters = {n: p.detach() for n, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        with region():
            out = torch.func.functional_call(module, parameters, (x,))
            return tensors(out)[0].float().square().sum()

    leaves = {n: p.clone().requires_grad_() for n, p in parameters.items()}
    want = torch.autograd.grad(loss(leaves, x), list(leaves.values()))
    got = torch.func.grad(loss)(parameters, x)
    torch.testing.assert_close(list(got.values()), list(want), rtol=0.05, atol=0.05)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    again = torch.autograd.grad(compiled(leaves, x), list(leaves.values()))
    assert same_bits(again, want)
    torch._dynamo.reset()


def test_a_cast_takes_a_tensor_and_a_dtype() -> None:
    """And leaves float64 alone, as autocast does; what it cannot read it hands back."""
    assert _ops._C is not None
    t, cast = torch.randn(3), _ops._C.cast
    assert cast(t, torch.bfloat16).dtype == torch.bfloat16
    assert cast(t.double(), torch.bfloat16).dtype == torch.float64
    assert cast([1.0], torch.bfloat16) is None
    with Dispatch():
        assert cast(t, torch.bfloat16) is None
    with pytest.raises(TypeError, match="expected 2 arguments, got 1"):
        cast(t)
    with pytest.raises(TypeError, match="expected a dtype, got str"):
        cast(t, "bfloat16")
