"""Layers for what other frameworks have and the kernels have not: the GRU whose reset gate acts
before the product, and a direction that runs from the end alone. And states as arrays of NumPy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import formulas
import rnnkernels
from formulas import Array
from helpers import draw, tensors
from rnnkernels.interop import GRUResetBefore, Reversed, from_numpy, to_numpy

T, B, I, H = 5, 3, 4, 6
F64 = torch.float64
LENGTHS = [5, 0, 3]


def step(layer: nn.Module, suffix: str) -> formulas.Step:
    weights = {n.removesuffix(suffix): p.detach().numpy() for n, p in layer.named_parameters()}
    (ir, iz, in_), (hr, hz, hn) = (np.split(weights[f"weight_{k}_l0"], 3) for k in ("ih", "hh"))
    zero = np.zeros(3 * H)
    b_r, b_z, b_n = np.split(weights.get("bias_ih_l0", zero) + weights.get("bias_hh_l0", zero), 3)

    def gru(x: Array, states: list[Array]) -> list[Array]:
        (h,) = states
        r = formulas.sigmoid(x @ ir.T + h @ hr.T + b_r)
        return formulas.gru(x @ iz.T + h @ hz.T + b_z, x @ in_.T + (r * h) @ hn.T + b_n, h)

    return gru


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"bias_mode": "single"}, {"bidirectional": True, "batch_first": True}],
    ids=["plain", "no bias", "single bias", "bidirectional"],
)
def test_reset_before(options: dict[str, Any], lengths: list[int] | None) -> None:
    """Outputs and states from hx on; NaN in the padding reaches nothing, gradients neither."""
    layer = GRUResetBefore(I, H, dtype=F64, **options)
    D, first = 1 + layer.bidirectional, layer.batch_first
    x, hx = draw(T, B, I, seed=1, dtype=F64), draw(D, B, H, seed=2, dtype=F64)
    halves, finals = [], []
    for d in range(D):
        suffix = "_reverse" if d else ""
        names = [n for n, _ in layer.named_parameters() if n.endswith("_reverse") == bool(d)]
        part = nn.Module()
        for name in names:
            part.register_parameter(name, getattr(layer, name))
        y, h = formulas.run(step(part, suffix), x.numpy(), [hx[d].numpy()], lengths, d == 1)
        halves.append(y)
        finals += h
    if lengths is not None:
        for b, end in enumerate(lengths):
            x[end:, b] = torch.nan
    x = (x.transpose(0, 1) if first else x).requires_grad_()
    y, h_n = layer(x, hx, lengths=lengths)
    shown = y.transpose(0, 1) if first else y
    np.testing.assert_allclose(
        shown.detach().numpy(), np.concatenate(halves, axis=-1), rtol=0, atol=1e-13
    )
    np.testing.assert_allclose(h_n.detach().numpy(), np.stack(finals), rtol=0, atol=1e-13)
    (y.sum() + h_n.sum()).backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_reset_before_has_the_parameters_of_a_gru() -> None:
    layer = GRUResetBefore(I, H, bidirectional=True)
    theirs = nn.GRU(I, H, bidirectional=True)
    assert {n: p.shape for n, p in layer.named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()
    }
    layer.load_state_dict(theirs.state_dict())
    assert max(float(p.detach().abs().max()) for p in GRUResetBefore(I, H).parameters()) < H**-0.5


def test_merged_directions_and_no_steps() -> None:
    layer = GRUResetBefore(I, H, bidirectional=True, merge_mode="mean", dtype=F64)
    x = draw(T, B, I, seed=1, dtype=F64)
    apart = copy.copy(layer)
    apart.merge_mode = "concat"
    want = apart(x)[0].unflatten(-1, (2, H)).mean(-2)
    torch.testing.assert_close(layer(x)[0], want, rtol=0, atol=1e-15)
    y, h_n = layer(x[:0])
    assert y.shape == (0, B, H) and not h_n.any()


def test_it_says_that_no_kernel_runs_it() -> None:
    layer = GRUResetBefore(I, H, bidirectional=True)
    assert repr(layer) == (
        "GRUResetBefore(4, 6, no kernel: a loop of torch operations, bidirectional=True)"
    )
    model = nn.ModuleDict({"gru": layer})
    says = (
        "gru: rnnkernels.interop.GRUResetBefore {}: its reset gate acts before the recurrent "
        "product, for which there is no kernel: a loop of torch operations runs it"
    )
    assert str(rnnkernels.convertible(model)) == says.format("left alone")
    found = rnnkernels.explain(layer, torch.zeros(T, B, I))
    assert found.choices == [] and "there is no kernel" in str(found)


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        ((torch.zeros(T, I),), ValueError, r"input: expected shape \[T, B, I\], got \[5, 4\]"),
        (([],), TypeError, "input: expected a Tensor, got list"),
        ((torch.zeros(T, B, I + 1),), RuntimeError, "Expected 4, got 5"),
        ((torch.zeros(T, B, I, dtype=F64),), ValueError, "does not match weight dtype"),
        ((torch.zeros(T, B, I), torch.zeros(1, B, I)), RuntimeError, "Expected hidden size"),
    ],
    ids=["dimensions", "type", "size", "dtype", "hx"],
)
@pytest.mark.parametrize("wrapped", [False, True], ids=["GRUResetBefore", "Reversed"])
def test_refuses_what_is_no_input(
    wrapped: bool, args: Any, error: type[Exception], says: str
) -> None:
    layer: nn.Module = GRUResetBefore(I, H)
    with pytest.raises(error, match=says):
        (Reversed(layer) if wrapped else layer)(*args)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_reversed_is_the_second_direction(
    kind: str, batch_first: bool, lengths: list[int] | None
) -> None:
    """Of a bidirectional layer with the same weights, padding of NaN included."""
    cls: Any = getattr(rnnkernels, kind)
    both = cls(I, H, bidirectional=True, batch_first=batch_first, dtype=F64)
    one = cls(I, H, batch_first=batch_first, dtype=F64)
    weights = both.state_dict()
    one.load_state_dict({name: weights[f"{name}_reverse"] for name in one.state_dict()})
    x, hx = draw(T, B, I, seed=1, dtype=F64), draw(2, B, H, seed=2, dtype=F64)
    for b, end in enumerate(lengths or ()):
        x[end:, b] = torch.nan
    x = x.transpose(0, 1) if batch_first else x
    states: Any = (hx, -hx) if kind == "LSTM" else hx
    mine: Any = (hx[1:], -hx[1:]) if kind == "LSTM" else hx[1:]
    y, *want = tensors(both(x, states, lengths=lengths))
    got = tensors(Reversed(one)(x, mine, lengths=lengths))
    for a, b in zip(got, [y[..., H:], *(s[1:] for s in want)], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_reversed_refuses() -> None:
    with pytest.raises(TypeError, match=r"layer: expected an RNN, LSTM or GRU .* got Linear"):
        Reversed(nn.Linear(I, H))
    with pytest.raises(ValueError, match="layer: expected one direction, got a bidirectional"):
        Reversed(rnnkernels.GRU(I, H, bidirectional=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_states_as_arrays_and_back(dtype: torch.dtype) -> None:
    layer = rnnkernels.LSTM(I, H, num_layers=2, bidirectional=True, dtype=dtype)
    arrays = to_numpy(layer)
    assert arrays.keys() == layer.state_dict().keys()
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    assert {a.dtype.name for a in arrays.values()} == {str(wide).removeprefix("torch.")}
    other = rnnkernels.LSTM(I, H, num_layers=2, bidirectional=True, dtype=dtype)
    swapped = {name: a.astype(a.dtype.newbyteorder(">")) for name, a in arrays.items()}
    assert from_numpy(other, swapped) is other  # as files of big-endian numbers are read
    assert all(map(torch.equal, other.parameters(), layer.parameters()))
    arrays["weight_ih_l0"][:] = 0  # copies on both ways
    assert layer.weight_ih_l0.any() and other.weight_ih_l0.any()


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))


def test_states_that_are_refused() -> None:
    layer: Any = rnnkernels.RNN(I, H)
    before = [p.detach().clone() for p in layer.parameters()]
    arrays = to_numpy(layer)
    arrays["weight_ih_l0"] += 1
    name = "bias_hh_l0"
    wrong: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "missing: none, unknown: more", arrays | {"more": arrays[name]}),
        (
            *(ValueError, f"arrays: expected .*missing: {name}, unknown: none"),
            {n: a for n, a in arrays.items() if n != name},
        ),
        (ValueError, r"arrays\['bias_hh_l0'\]: expected shape", arrays | {name: arrays[name][1:]}),
        (
            *(TypeError, r"arrays\['bias_hh_l0'\]: expected float32 for a param.* got float64"),
            arrays | {name: arrays[name].astype("float64")},
        ),
    ]
    for error, says, given in wrong:
        with pytest.raises(error, match=says):
            from_numpy(layer, given)
    assert all(map(torch.equal, layer.parameters(), before))
    with pytest.raises(TypeError, match="module: expected floating point numbers, got"):
        to_numpy(Counted())
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module, got list"):
        to_numpy([])  # type: ignore[arg-type]
