"""The input part of the gates of a layer whose products are normalised: ``W_ih x`` of all steps at
once, and its norm, but for the bias.

Where nobody looks on, it is one function, whose backward reads what it kept in parts that stay in
the cache: as torch operations, each of which reads and writes all steps, it would take as long as
both of its products. Results do not depend on the number of threads either way, as they would if
:func:`torch.nn.functional.layer_norm` multiplied by the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from rnnkernels import _backends
from rnnkernels._core.call import norms_dtype
from rnnkernels.cells.normed import EPSILON, standardized

_ROWS = 128  # of a part, which is then small beside the cache


def input_part(x: Tensor, w_ih: Tensor, weight: Tensor, groups: Sequence[int]) -> Tensor:
    """``weight * (u - mean) / deviation`` [.., G*H] of ``u = W_ih x``, x [.., I], each group of
    rows of W_ih by itself."""
    invariant, plain = _backends.is_batch_invariant(), _plain(x, w_ih, weight)
    if invariant and not plain:
        raise NotImplementedError(
            "batch_invariant: a layer with layer_norm has it as it stands alone, not inside of "
            "torch.compile, torch.jit.trace, of transforms or of subclasses of tensors. Switch one "
            "of them off"
        )
    if not plain:
        return _in_torch(x, w_ih, weight, groups)
    normed: Tensor = _Normed.apply(x, w_ih, weight, groups, invariant)  # type: ignore[no-untyped-call]
    return normed


def _in_torch(x: Tensor, w_ih: Tensor, weight: Tensor, groups: Sequence[int]) -> Tensor:
    u = F.linear(x, w_ih)
    parts = [standardized(p) for p in torch.split(u, list(groups), -1)]
    return (torch.cat(parts, -1) if len(parts) > 1 else parts[0]) * weight


def _plain(*tensors: Tensor) -> bool:
    """Whether neither compilers nor recorders, transforms or subclasses of tensors take part."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and not any(map(_transformed, tensors))
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and tensors[0].device.type == "cpu"
    )


def _transformed(t: Tensor) -> bool:
    """Whether it is what a transform of torch's makes of a tensor."""
    keys = torch._C._dispatch_keys(t)
    kinds = "Batched", "FuncTorchBatched", "FuncTorchGradWrapper"
    return any(keys.has(kind) for kind in kinds)


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_ih: Tensor, weight: Tensor, groups: Sequence[int], invariant: bool
    ) -> Tensor:
        kept, parts = [], []
        own = (torch.split(t, list(groups)) for t in (w_ih, weight))
        for w, scale in zip(*own, strict=True):
            u = _row_by_row(x, w.t()) if invariant else F.linear(x, w)
            part, mean, deviation = torch.native_layer_norm(u, w.shape[:1], scale, None, EPSILON)
            parts.append(part)
            kept += [u, mean, deviation]
        ctx.groups, ctx.invariant = list(groups), invariant
        ctx.save_for_backward(x, w_ih, weight, *kept)
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w_ih, weight, *kept = ctx.saved_tensors
        wanted, groups = ctx.needs_input_grad[:3], ctx.groups
        further = torch.is_grad_enabled()
        if further or _transformed(dy):
            inputs = x, w_ih, weight
            return (*_gradients_in_torch(inputs, wanted, groups, dy, further), None, None)
        dx, dw_ih, dweight = None, [], []
        flat = x.flatten(0, -2)
        own = [torch.split(t, groups) for t in (w_ih, weight)]
        pieces = zip(*own, torch.split(dy, groups, -1), strict=True)
        for i, (w, scale, dpart) in enumerate(pieces):
            u, mean, deviation = kept[3 * i : 3 * i + 3]
            dweight.append(_of_weight(dpart, u, mean, deviation) if wanted[2] else scale)
            du, _, _ = torch.ops.aten.native_layer_norm_backward(
                dpart, u, w.shape[:1], mean, deviation, scale, None, [True, False, False]
            )
            if wanted[1]:
                dw_ih.append(du.flatten(0, -2).t() @ flat)
            if wanted[0]:
                part = _row_by_row(du, w) if ctx.invariant else du @ w
                dx = part if dx is None else dx.add_(part)
        return (
            dx,
            torch.cat(dw_ih) if wanted[1] else None,
            torch.cat(dweight) if wanted[2] else None,
            None,
            None,
        )


def _gradients_in_torch(
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    groups: Sequence[int],
    dy: Tensor,
    further: bool,
) -> list[Tensor | None]:
    """Of the same as torch operations, for a further derivative, or a batch of gradients."""
    with torch.enable_grad():
        own = [t.view_as(t) if further else t.detach().requires_grad_() for t in inputs]
        y = _in_torch(own[0], own[1], own[2], groups)
    asked = [t for t, want in zip(own, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(y, asked, dy, create_graph=further))
    return [next(found) if want else None for want in wanted]


def _of_weight(dy: Tensor, u: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """The sum of ``dy * (u - mean) * deviation`` over all rows, in one order of additions."""
    dy, u, dtype = dy.flatten(0, -2), u.flatten(0, -2), norms_dtype(u.dtype)
    mean, deviation = mean.to(dtype).view(-1, 1), deviation.to(dtype).view(-1)
    total = mean.new_zeros(u.size(1))
    for first in range(0, len(u), _ROWS):
        rows = slice(first, first + _ROWS)
        product = (u[rows].to(dtype) - mean[rows]).mul_(dy[rows])
        total.addmv_(product.t(), deviation[rows])
    return total.to(u.dtype)


def _row_by_row(x: Tensor, w: Tensor) -> Tensor:
    """x [.., K] times w [K, N], each row by itself."""
    found: Tensor = torch.ops.rnnkernels.input_gradient(x.unsqueeze(-2), [w.contiguous()])
    return found
