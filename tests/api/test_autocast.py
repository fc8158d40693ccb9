"""Autocast gives outputs of torch.nn's dtypes, and casts each parameter once per region, on every
way that a layer or a cell can go."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import rnnkernels
from helpers import draw, same_bits, tensors
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


def input_of(name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Of the type that autocast casts to: the state of a GRU or a cell then has it, too."""
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


CLASSES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
NARROW = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CLASSES)
def test_dtypes_are_those_of_torch_nn(kind: str, way: str) -> None:
    """Of outputs and states, for inputs, states and weights of every type. torch.nn's LSTM layer
    has no float16 on a CPU: ours gives what autocast casts to, as for bfloat16."""
    wide = (torch.float32, torch.bfloat16)
    for to, weights, given in itertools.product(NARROW, wide, wide):
        for of_state in (None, *wide):
            found = []
            for library in (nn, rnnkernels):
                module = getattr(library, kind)(I, H, dtype=weights)
                hx = None if of_state is None else states(kind, of_state)
                if kind == "LSTM" and library is nn and to == torch.float16:
                    found.append([to, to, to])
                    continue
                ours = WAYS[way]() if library is rnnkernels else nullcontext()
                with torch.autocast("cpu", dtype=to), ours:
                    found.append([t.dtype for t in tensors(module(input_of(kind, given), hx))])
            assert found[0] == found[1], (to, weights, given, of_state)


def states(kind: str, dtype: torch.dtype) -> Any:
    h = draw(*((B, H) if kind.endswith("Cell") else (1, B, H)), seed=2, dtype=dtype)
    return (h, h) if "LSTM" in kind else h


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["GRU", "GRUCell", "LSTMCell"])
def test_a_kept_state_is_not_rounded(kind: str, way: str) -> None:
    """A float32 state stays float32 through a loop, whatever the input: to the last bit of the same
    loop without autocast, but for the reference, whose products autocast rounds."""
    module, x, hx = getattr(rnnkernels, kind)(I, H), input_of(kind), states(kind, torch.float32)
    with region(), WAYS[way]():
        first = tensors(module(x, hx))
    plain = tensors(module(x.float(), hx))
    assert {t.dtype for t in first} == {torch.float32}
    if way == "reference":
        torch.testing.assert_close(first, plain, rtol=0.03, atol=0.03)
    else:
        assert same_bits(first, plain)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_float64_is_left_alone(name: str, way: str) -> None:
    module, x = build(name, torch.float64), input_of(name, torch.float64)
    with region(), WAYS[way]():
        result = module(x)
        state = result if isinstance(module, nn.RNNCellBase) else result[1]
        again = module(x, state)
    assert {t.dtype for t in tensors([result, again])} == {torch.float64}


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
