"""Gradients of weights and inputs on the CPU: its kernels take the products themselves, of 16 bits
where torch has no fast ones, and add those up in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkernels
from helpers import counted, multiplies_itself, require_backend, same_bits
from op_calls import run
from op_parity import (
    Case,
    backward,
    converted,
    forward,
    make,
    parameter_gradients,
    random_gradients,
)
from rnnkernels._core.call import Layer

kernels = torch.ops.rnnkernels
#: The largest error in units of the largest value. Of 16 bits the sum is rounded, and before it,
#: where there are two (of both directions; of h0 and of later states), the first of them, up to
#: twice as large. The others are rounded at every addition, of hundreds.
ROUNDINGS = {
    torch.float64: 1e-14,
    torch.float32: 5e-6,
    torch.bfloat16: 3 * 2**-9,
    torch.float16: 3 * 2**-12,
}
ALL: dict[str, Any] = {"lengths": True, "reset": True}
CASES = [
    Case("lstm", T=1, B=1),
    Case("gru", T=1, B=3, H=20, I=1),
    Case("rnn_tanh", T=3, B=2, H=5, I=9),
    Case("lstm", T=40, B=9, H=270, I=33),  # more than one block of rows, and part of the steps
    Case("gru", D=2, T=40, B=11, H=37, I=70),
    Case("lstm", T=30, B=5, H=256, I=70),  # rows 4 KiB apart are copied for dx
    Case("rnn_relu", T=9, B=4, H=129, I=8),
    Case("lstm", D=2, T=8, B=5, H=24, R=7, I=40),
    Case("lstm", D=2, T=7, B=5, H=33, R=130, I=3, bias=False),
    *(Case(cell, D=2, T=6, H=21, I=17, **ALL) for cell in ("lstm", "gru")),
    *(Case(cell, D=2, T=6, B=4, H=21, I=17, packed=True, reset=True) for cell in ("lstm", "gru")),
    *(Case("gru", D=2, T=T, B=B, lengths=True) for T, B in ((0, 3), (3, 0))),
]


@pytest.fixture(autouse=True)
def _kernels() -> None:
    require_backend("cpu")


def gradients(call: Layer) -> tuple[list[Tensor], list[Tensor]]:
    """In all tensors of a call: by autograd, and in float64 from the same gradients of gates."""
    out = forward(kernels, call)
    grads = random_gradients(call, out)
    back = backward(kernels, call, out, grads)
    want = parameter_gradients(*(converted(t, torch.float64) for t in (call, out, back)))
    for t in call.tensors:
        t.requires_grad_()
    pairs = [(o, g) for o, g in zip(run(call), grads, strict=True) if o is not None]
    got = torch.autograd.grad([o for o, _ in pairs], call.tensors, [g for _, g in pairs])
    return list(got), want


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_are_exact_but_for_the_result(case: Case, dtype: torch.dtype) -> None:
    for got, want in zip(*gradients(make(case, dtype)), strict=True):
        assert got.shape == want.shape and got.dtype == dtype
        if got.numel():
            error = (got.double() - want).abs().max()
            assert error <= ROUNDINGS[dtype] * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("layers", [1, 2])
def test_whose_products_are_used(layers: int, dtype: torch.dtype) -> None:
    """Of many steps, of every weight and of the input; and of one, whose gradient of the state is
    torch's product in float32 and float64."""
    for steps in (1, 5) if dtype.itemsize == 2 else (5,):
        module = rnnkernels.LSTM(3, 4, layers, proj_size=2, dtype=dtype)
        x = torch.randn(steps, 3, 3, dtype=dtype, requires_grad=True)
        y = module(x)[0]
        used = counted(lambda y=y: y.sum().backward())  # type: ignore[misc]
        assert bool({"aten::mm", "aten::addmm_"} & set(used)) != multiplies_itself(dtype)


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
def test_the_same_bits_with_any_number_of_threads(dtype: torch.dtype) -> None:
    if not multiplies_itself(dtype):
        pytest.skip("torch's products are used")
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(gradients(make(Case("gru", D=2, T=30, B=9, H=70, I=50), dtype))[0])
    for other in results[1:]:
        assert same_bits(results[0], other)
