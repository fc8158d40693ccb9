"""What the compiled part calls for cells whose products are normalised (:mod:`.normed`): for every
step a product by torch, and behind it one launch.

Tensors are as in :mod:`.launch`. Such a cell has neither heads nor noise, and its hidden bias is
among its parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnkernels._backends import float32, vetting
from rnnkernels._backends.triton import ROWS, forced, launch, normed
from rnnkernels._backends.triton.cells import EMITS, pair
from rnnkernels._backends.triton.plan import Rows, rows_of
from rnnkernels._core.call import Call
from rnnkernels.cells import find


def layout_of(h0: Tensor) -> Rows:
    """Of both passes; how many rows there are does not matter to it.

    Raises:
        RuntimeError: the kernels were found wrong on the GPU of these states [D, B, H]. There they
            are checked, where nothing is known of them.
    """
    if h0.is_cuda and forced.kind is None:
        vetting.settle("triton", h0.device, ROWS, numbers(h0.dtype))
        reason = vetting.refusal("triton", h0.device, ROWS)
        if reason is not None:
            raise RuntimeError(f"triton: {reason}")
    return rows_of(h0.size(2))


def numbers(dtype: torch.dtype) -> str:
    """What numbers of this dtype are in torch's products, as a check has it."""
    if dtype == torch.float32 and float32.tf32_in_matmul():
        return "tf32"
    return str(dtype).removeprefix("torch.")


def describe(call: Call) -> str:
    """The layout, and how torch multiplies float32."""
    words = f"step by step: a product by torch, then {rows_of(call.h0.size(2))}"
    if call.x.dtype != torch.float32:
        return words
    return float32.in_words("tf32" if float32.tf32_in_matmul() else "ieee", "cuda.matmul") + words


def _constants(cell: str, backward: bool, layout: Rows, h0: Tensor) -> dict[str, Any]:
    """Of the kernels for a step, and how they are to be compiled."""
    contract = find(cell)
    emit = EMITS[cell][backward] if contract.emits else None
    return {
        "CELL": pair(cell)[backward], "EMIT": emit, "G": contract.G, "K": contract.K,
        "P": contract.P, "ALONE": contract.alone, **_sizes(layout, h0),
    }  # fmt: skip


def _sizes(layout: Rows, h0: Tensor) -> dict[str, Any]:
    D, _, H = h0.shape
    sizes = {"D": D, "H": H, "BLOCK_B": layout.block_b, "BLOCK_H": layout.block_h}
    return sizes | launch.compiled(launch.device_of(h0)[0], layout.warps, 1)


def forward(
    cell: str, gx: Tensor, w_hh: Tensor, b_ih: Tensor | None, h0: Tensor, c0: Tensor | None,
    y: Tensor, h_n: Tensor, c_n: Tensor | None, c: Tensor | None, saved: Tensor | None,
    lengths: Tensor | None, starts: Tensor | None, reset: Tensor | None, T: int,
    params: Tensor, h_mask: Tensor | None = None, **_: object,
) -> None:  # fmt: skip
    """The loop of ``sequence_forward``. Raises RuntimeError where an earlier call gave up."""
    launch.raise_fault(y.device)
    D, B, _H = h0.shape
    layout = layout_of(h0)
    grid = (layout.programs(B), 1, D)
    more = _constants(cell, False, layout, h0)
    weights = w_hh.transpose(1, 2)
    gh = torch.empty(D, B, w_hh.size(1), dtype=h0.dtype, device=h0.device)
    h_n.copy_(h0)  # carries h
    c_now = None if c0 is None else c0.to(torch.float32, copy=True)
    masked = None if h_mask is None else h0 * h_mask
    for s in range(T):
        torch.bmm(h_n if masked is None else masked, weights, out=gh)
        normed.forward[grid](
            gx, gh, b_ih, params, h_mask, h_n, masked, c_now, y, c, saved, lengths, starts, reset,
            T, B, s, **more,
        )  # fmt: skip
    if c_n is not None and c_now is not None:
        c_n.copy_(c_now)


def backward(
    cell: str, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dc: Tensor | None,
    w_hh: Tensor, h0: Tensor, c0: Tensor | None, y: Tensor, c: Tensor | None, saved: Tensor,
    dgates: Tensor, dh0: Tensor | None, dc0: Tensor | None, flow: Tensor | None,
    lengths: Tensor | None, starts: Tensor | None, reset: Tensor | None, T: int, steps: int,
    rows: int, clip: str, bound: float, params: Tensor, dunit: Tensor,
    h_mask: Tensor | None = None, **_: object,
) -> None:  # fmt: skip
    """The loop of ``sequence_backward``, over `rows` windows of `steps` steps. Raises RuntimeError
    where an earlier call gave up."""
    launch.raise_fault(y.device)
    if saved.data_ptr() == dgates.data_ptr() and torch.version.hip:
        saved = saved.clone()  # there, a barrier does not keep loads before stores of other waves
    (D, B, H), emits = h0.shape, find(cell).emits
    layout = layout_of(h0)
    grid = (layout.programs(rows), 1, D)
    more = _constants(cell, True, layout, h0) | {"CLIP": clip}

    # What a product takes starts as zeros: libraries may multiply what lies behind a row by zero.
    dproduct = torch.zeros(D, rows, w_hh.size(1), dtype=h0.dtype, device=h0.device)
    through = torch.empty(D, rows, H, dtype=h0.dtype, device=h0.device)
    carry = torch.empty(1 + emits, D, rows, H, dtype=torch.float32, device=h0.device)
    for n in range(steps):
        if n > 0:
            torch.bmm(dproduct, w_hh, out=through)
        normed.backward[grid](
            dy, dh_n, dc_n, dc, params, h_mask, h0, c0, y, c, saved, dgates, through, dproduct,
            carry, dunit, flow, lengths, starts, reset, T, B, steps, rows, n, bound, **more,
        )  # fmt: skip
    if dh0 is None:
        return
    torch.bmm(dproduct, w_hh, out=through)
    normed.finish[grid](
        h_mask, through, carry, dh0, dc0, lengths, starts, reset, T, B, steps, rows, EMITS=emits,
        **_sizes(layout, h0),
    )  # fmt: skip
