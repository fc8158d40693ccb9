"""Dropout that a call draws once for all of its steps, against the same done by hand."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import rnnkernels
from helpers import require_backend, same_bits, tensors
from rnnkernels import functional

T, B, I, H = 5, 3, 4, 6
LAYERS = {"RNN": functional.rnn, "LSTM": functional.lstm, "GRU": functional.gru}
F64: dict[str, Any] = {"dtype": torch.float64}


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Any:
    require_backend(request.param)
    with rnnkernels.use_backend(request.param):
        yield request.param


def layer(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(rnnkernels, name)(I, H, num_layers=2, bidirectional=True, **F64, **options)


def pulled(outputs: Any, module: torch.nn.Module) -> list[Tensor]:
    """Outputs, and the gradients of all parameters for a fixed random loss."""
    torch.manual_seed(2)
    found = tensors(outputs)
    loss = torch.stack([(t * torch.randn_like(t)).sum() for t in found]).sum()
    return [*found, *torch.autograd.grad(loss, list(module.parameters()))]


@pytest.mark.parametrize("name", LAYERS)
def test_weight_drop_is_a_call_with_dropped_weights(name: str, backend: str) -> None:
    module, x = layer(name, weight_drop=0.4), torch.randn(T, B, I, **F64)
    torch.manual_seed(1)
    found = pulled(module(x), module)
    torch.manual_seed(1)
    dropped = [[w[0], F.dropout(w[1], 0.4), *w[2:]] for w in module.all_weights]
    assert all((w[1] == 0).any() for w in dropped)
    by_hand = LAYERS[name](x, None, dropped, bidirectional=True)
    for a, b in zip(found, pulled(by_hand, module), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


OPTIONS = ("weight_drop",)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("asks", [nullcontext, lambda: rnnkernels.use_backend("cpu")])
def test_only_training_draws(option: str, asks: Any) -> None:
    """Calls without gradients, which may keep packed weights and take the short way past Python,
    or the long one where a backend is asked for."""
    require_backend("cpu")
    module, x = layer("LSTM", **{option: 0.4}), torch.randn(T, B, I, **F64)
    plain = tensors(layer("LSTM")(x))
    with torch.no_grad(), asks():
        for _ in range(3):
            state = torch.get_rng_state()
            assert same_bits(tensors(module.eval()(x)), plain)
            assert torch.equal(torch.get_rng_state(), state)
            torch.manual_seed(4)
            drawn = tensors(module.train()(x))
            assert not same_bits(drawn, tensors(module(x)))
            torch.manual_seed(4)
            assert same_bits(drawn, tensors(module(x)))


@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_no_probability(option: str) -> None:
    for value in (1, -0.1, 2, float("nan")):
        with pytest.raises(ValueError, match=rf"{option} should be a number in range \[0, 1\)"):
            rnnkernels.LSTM(2, 3, **{option: value})
    for value in (None, "0.5", True):
        with pytest.raises(TypeError, match=rf"{option} should be a number in range \[0, 1\)"):
            functional.gru(
                torch.zeros(1, 1, 2), None, [[torch.zeros(9, 2), torch.zeros(9, 3)]],
                **{option: value},
            )  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_torch_has_no_such_option(option: str) -> None:
    module = rnnkernels.GRU(2, 3, **{option: 0.25})
    assert f"{option}=0.25" in repr(module)
    with pytest.raises(ValueError, match=f"torch.nn has no {option}=0.25"):
        rnnkernels.revert(module)
