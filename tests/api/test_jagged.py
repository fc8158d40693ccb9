"""Jagged nested tensors as input: what each row gives alone, in the layout of the input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnkernels as rk
from helpers import draw, tensors
from rnnkernels.testing import assert_close

I, H = 3, 4
F64 = torch.float64
LENGTHS = (3, 0, 5, 1)
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "RNN": ("RNN", {}),
    "GRU both ways, two layers": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "LSTM projected, merged": (
        "LSTM",
        {"proj_size": 2, "bidirectional": True, "merge_mode": "sum"},
    ),
    "GRU windows": ("GRU", {"truncate": 2}),
    "LSTM overlapping windows": ("LSTM", {"truncate": (1, 2)}),
    "GRU bounded": ("GRU", {"grad_clip": 0.01}),
    "GRU recomputed": ("GRU", {"recompute": 2}),
}


def build(name: str) -> Any:
    kind, options = LAYERS[name]
    torch.manual_seed(0)
    return getattr(rk, kind)(I, H, batch_first=True, dtype=F64, **options)


def nested(values: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Any:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(values, offsets)


def state_of(layer: Any, rows: int) -> Any:
    L = layer.num_layers * (2 if layer.bidirectional else 1)
    h = draw(L, rows, layer.proj_size or H, seed=2, dtype=F64).requires_grad_()
    if layer.mode != "LSTM":
        return h
    return h, draw(L, rows, H, seed=3, dtype=F64).requires_grad_()


def gradients(out: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    loss = torch.stack([(t * draw(*t.shape, seed=i, dtype=F64)).sum() for i, t in enumerate(out)])
    return list(torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("name", LAYERS)
def test_as_padded_with_lengths(name: str, with_state: bool) -> None:
    """Outputs, states, resets and every gradient; in the padded call they are padded."""
    layer, B, T = build(name), len(LENGTHS), max(LENGTHS)
    values = draw(sum(LENGTHS), I, seed=1, dtype=F64).requires_grad_()
    hx = state_of(layer, B) if with_state else None
    exists = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    marks = torch.arange(sum(LENGTHS)) % 3 == 1
    leaves = [values, *tensors(hx), *layer.parameters()]

    x = nested(values)
    y, states, every = layer(x, hx, reset=nested(marks), return_all_states=True)
    assert y.is_nested and y.size(1) == x.size(1), "the output has the offsets of the input"
    all_states = [*every.h, *(every.c or ())]
    assert all(torch.equal(t.offsets(), x.offsets()) for t in (y, *all_states))
    found = [y.values(), *tensors(states), *(t.values() for t in all_states)]

    rows, reset = torch.zeros(B, T, I, dtype=F64), torch.zeros(B, T, dtype=torch.bool)
    reset[exists] = marks
    y, states, every = layer(
        rows.index_put(exists.nonzero(as_tuple=True), values),
        hx,
        lengths=LENGTHS,
        reset=reset,
        return_all_states=True,
    )
    want = [y[exists], *tensors(states), *(t[exists] for t in (*every.h, *(every.c or ())))]
    for got, expected in zip(found, want, strict=True):
        assert_close(got, expected)
    for got, expected in zip(gradients(found, leaves), gradients(want, leaves), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("lengths", [(0, 0), (2,), (1, 1, 1)], ids=str)
def test_few_steps(lengths: tuple[int, ...]) -> None:
    layer = build("GRU both ways, two layers")
    values = draw(sum(lengths), I, seed=1, dtype=F64)
    y, h_n = layer(nested(values, lengths))
    assert y.values().shape == (sum(lengths), 2 * H) and h_n.shape == (4, len(lengths), H)
    begin = 0
    for i, n in enumerate(lengths):
        alone = layer(values[None, begin : begin + n])
        assert_close(y.values()[begin : begin + n], alone[0][0])
        assert_close(h_n[:, i], alone[1][:, 0])
        begin += n


def test_the_output_goes_on_like_the_input() -> None:
    """Through other layers, into sums with the input, and back to its leaf."""
    model = nn.ModuleList([rk.GRU(I, I, batch_first=True), rk.LSTM(I, H, batch_first=True)])
    x = nested(draw(sum(LENGTHS), I, seed=1, dtype=torch.float32)).detach().requires_grad_()
    y = model[1](x + model[0](x)[0])[0]
    padded = y.to_padded_tensor(0.0)
    assert padded.shape == (len(LENGTHS), max(LENGTHS), H)
    padded.sum().backward()
    assert x.grad is not None and x.grad.is_nested and x.grad.values().isfinite().all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's
def test_inside_a_compiled_model() -> None:
    """The layer is left to run by itself: its layout follows from values."""
    layer, x = build("GRU both ways, two layers"), nested(draw(sum(LENGTHS), I, seed=1, dtype=F64))
    torch._dynamo.reset()
    y = torch.compile(lambda x: layer(x * 2)[0], backend="eager")(x)
    assert_close(y.values(), layer(x * 2)[0].values())
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_errors() -> None:
    layer = build("RNN")
    x = nested(draw(sum(LENGTHS), I, seed=1, dtype=F64))
    with pytest.raises(ValueError, match="batch_first: expected True for a nested tensor"):
        rk.RNN(I, H, dtype=F64)(x)
    with pytest.raises(ValueError, match="lengths: a nested tensor brings its own lengths"):
        layer(x, lengths=LENGTHS)
    with pytest.raises(ValueError, match=r"layout=torch.jagged, got torch.strided"):
        layer(torch.nested.nested_tensor([x.values()], layout=torch.strided))
    with pytest.raises(ValueError, match="whose second dimension is the jagged one"):
        layer(x.transpose(1, 2))
    with pytest.raises(ValueError, match="whose second dimension is the jagged one"):
        layer(nested(x.values()[:, 0]))
    ends = torch.tensor([2, 0, 3, 1])
    with pytest.raises(ValueError, match="holes between them"):
        layer(torch.nested.nested_tensor_from_jagged(x.values(), x.offsets(), ends))
    marks = torch.ones(sum(LENGTHS), dtype=torch.bool)
    with pytest.raises(ValueError, match="reset: expected a nested tensor of bool"):
        layer(x, reset=marks)
    with pytest.raises(ValueError, match="got one with other offsets"):
        layer(x, reset=nested(marks, LENGTHS[::-1]))
    with pytest.raises(TypeError, match="reset: expected dtype bool"):
        layer(x, reset=nested(marks.float()))
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        layer(x, torch.zeros(1, 2, H, dtype=F64))
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        rk.RNN(I + 1, H, batch_first=True, dtype=F64)(x)
