"""Calls of one layer made of random numbers, and their results and gradients by any runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import counted, same_bits
from op_calls import backward, forward, run
from rnnkernels._core import reference
from rnnkernels._core.call import Layer, LayerResult
from rnnkernels.cells import CELLS, find

NAMES = list(CELLS)
#: How far float64 results may be apart that add the same numbers in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


def make_call(
    cell: str = "lstm",
    T: int = 5,
    B: int = 3,
    inputs: int = 4,
    H: int = 5,
    D: int = 1,
    *,
    heads: int = 1,
    proj: int = 0,
    bias: str = "double",
    lengths: Sequence[int] | bool = False,
    reset: bool | Tensor = False,
    all_states: bool = False,
    grad: bool = True,
    gain: float = 1.0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> Layer:
    """One layer's call; every number is one of the dtype, so that a wider dtype sees the same.

    Args:
        bias: ``'double'``, ``'single'`` or ``'none'``.
        lengths: the lengths, or whether to draw some from 0 to T.
        reset: the mask, or whether to draw one.
        grad: whether every floating tensor asks for a gradient.
        heads: of each direction, with H units each.
        gain: a factor of all weights; less than 1 keeps long sums of 16-bit numbers small.
    """
    gen = torch.Generator().manual_seed(seed)
    contract, R = find(cell), proj or H
    rows = heads * contract.G * H
    # Of a cell whose products are normalised, x is the input part of its gates.
    features, columns = (D * rows, 0) if contract.normed else (inputs, inputs)
    hidden_bias = bias == "double" and contract.recurrent and not contract.normed

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=gen, dtype=torch.float64) * scale
        return values.to(device, dtype).requires_grad_(grad)

    def each(yes: bool, *shape: int, scale: float) -> list[Tensor]:
        return [tensor(*shape, scale=scale * gain) for _ in range(D * yes)]

    drawn = torch.randint(0, T + 1, (B,), generator=gen)
    mask = torch.rand(T, B, generator=gen) < 0.3
    if isinstance(lengths, (list, tuple)):
        drawn = torch.tensor(lengths, dtype=torch.int64)
    if isinstance(reset, Tensor):
        mask = reset
    return Layer(
        cell,
        tensor(T, B, features),
        w_ih=each(True, rows, columns, scale=max(1, columns) ** -0.5),
        w_hh=each(contract.recurrent, rows, R, scale=R**-0.5),
        b_ih=each(bias != "none", rows, scale=0.5),
        b_hh=each(hidden_bias, rows, scale=0.5),
        w_hr=each(proj > 0, R, H, scale=H**-0.5),
        h0=tensor(D * heads, B, R),
        c0=tensor(D * heads, B, contract.C * H) if contract.C else None,
        lengths=drawn.to(device) if lengths is not False else None,
        reset=mask.to(device) if reset is not False else None,
        all_states=all_states,
        params=[[tensor(heads * H) for _ in contract.params] for _ in range(D)],
        heads=heads,
    )


def convert(call: Layer, change: Callable[[Tensor], Tensor]) -> Layer:
    """The call with every floating tensor replaced by ``change`` of it."""

    def new(value: Any) -> Any:
        if isinstance(value, list):
            return [new(v) for v in value]
        if isinstance(value, Tensor) and value.is_floating_point():
            return change(value.detach()).requires_grad_(value.requires_grad)
        return value

    return Layer(*map(new, call))


def both(call: Layer) -> list[Tensor]:
    """Every output of the forward and the backward op, for fixed random gradients."""
    outs = forward(call)
    douts: list[Tensor | None] = list(random_like(outs[:4]))
    if call.c0 is None:
        douts[2:] = [None, None]
    return [*outs, *backward(call, outs, douts)]


def assert_keeping_the_graph_changes_no_bit(
    cell: str, loss: Tensor, inputs: Sequence[Tensor]
) -> None:
    """Also the last backward of a graph that was kept, which goes over the saved values."""
    found: list[tuple[Tensor, ...]] = []

    def backward(keep: bool) -> dict[str, int]:
        return counted(lambda: found.append(torch.autograd.grad(loss, inputs, retain_graph=keep)))

    apart, over = "rnnkernels::sequence_backward", "rnnkernels::sequence_backward_"
    used = [backward(keep) for keep in (True, True, False)]
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])
    assert all(apart in u and over not in u for u in used[:2])
    fits = find(cell).K == find(cell).G + find(cell).A
    assert (over in used[2]) == fits and (apart in used[2]) == (not fits)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        backward(False)


def present(result: LayerResult) -> list[Tensor]:
    return [t for t in result if t is not None]


def random_like(tensors: Sequence[Tensor], seed: int = 9) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=gen, dtype=torch.float64).to(t) for t in tensors]


def gradients(
    runner: Callable[[Layer], LayerResult], call: Layer, used: Sequence[bool] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Results of a call and its gradients in all of ``call.tensors``, for a fixed random loss.

    ``used`` says which of the results the loss reads.
    """
    outs = present(runner(call))
    douts = random_like(outs)
    pairs = [p for p, use in zip(zip(outs, douts, strict=True), used or [True] * 4) if use]  # noqa: B905
    loss = torch.stack([(out * dout).sum() for out, dout in pairs]).sum()
    return outs, list(torch.autograd.grad(loss, call.tensors, materialize_grads=True))


def assert_equals_reference(
    call: Layer, used: Sequence[bool] | None = None, rtol: float = 1e-9, atol: float = 1e-11
) -> None:
    """The compiled op against the reference in float64: results and gradients."""
    outs, grads = gradients(run, call, used)
    wide = convert(call, Tensor.double)
    expected_outs, expected_grads = gradients(reference.run_layer, wide, used)
    for got, expected in zip(outs + grads, expected_outs + expected_grads, strict=True):
        assert got.dtype == call.x.dtype
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol)
