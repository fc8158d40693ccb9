"""The custom ops as PyTorch sees them: fake kernels and the autograd formula, above every backend.

``torch.ops.rnnkernels.sequence_forward`` projects the input and runs the loop over time;
``sequence_backward`` runs the loop backwards and returns the gradients of the gates. Everything
that is one large product or sum over those (``dx``, ``dW_ih``, ``dW_hh``, ``dW_hr``, biases) is
written here once.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkernels import checks, reference
from rnnkernels.call import Call, Clip, Result, needs_gradient
from rnnkernels.cells import CELLS

try:
    from rnnkernels import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    #: Why the compiled part is missing, or None.
    missing: str | None = str(error)
    warnings.warn(
        f"rnnkernels runs without its compiled kernels, on the slow reference ({error}). "
        "Install a C++ compiler and reinstall rnnkernels to get them.",
        stacklevel=2,
    )
else:
    missing = None

MaybeTensor = Tensor | None
_NONE: MaybeTensor = None


def build_info() -> dict[str, Any]:
    """How the compiled part was built: compiler, CUDA architectures (None: no CUDA), and the
    instruction set its CPU kernels use on this machine. Empty where there is none."""
    return {} if _C is None else dict(_C.build_info())


#: Types of device that the compiled part brings kernels for.
kernel_devices: frozenset[str] = frozenset(
    device
    for device in ("cpu", "cuda")
    if _C is not None
    and torch._C._dispatch_has_kernel_for_dispatch_key(
        "rnnkernels::sequence_forward", device.upper()
    )
)


class _Running(threading.local):
    """What an op cannot take, since it is no tensor, number or string: who records this call."""

    flow: Callable[[Tensor], None] | None = None


_running = _Running()


def run(call: Call) -> Result:
    """Runs one layer through the op registered for the device of its input."""
    if call.flow is None:
        return _run(call)
    _running.flow = call.flow
    try:
        return _run(call)
    finally:
        _running.flow = None


def _run(call: Call) -> Result:
    save = needs_gradient(call.tensors)
    y, h_n, c_n, c, _, _ = torch.ops.rnnkernels.sequence_forward(
        call.cell_name,
        call.x,
        call.w_ih,
        call.w_hh,
        call.b_ih,
        call.b_hh,
        call.w_hr,
        call.h0,
        call.c0,
        call.lengths,
        call.reset,
        save,
        call.all_c,
        call.layer,
        call.window,
        *call.clip,
    )
    if call.c0 is None:
        return Result(y, h_n, None, None)
    return Result(y, h_n, c_n, c if call.all_c else None)


def _same_device(like: Tensor, layer: int = -1, **others: MaybeTensor | Sequence[Tensor]) -> None:
    """A meta tensor among the arguments brings a call here, whatever the device of the others."""
    for name, value in others.items():
        for d, t in enumerate([value] if isinstance(value, Tensor) else value or ()):
            if t.device != like.device:
                raise RuntimeError(
                    f"{checks.parameter_name(name, layer, d)}: expected device {like.device} like "
                    f"the input, got {t.device}"
                )


def _fake_forward(
    cell: str,
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor],
    b_hh: Sequence[Tensor],
    w_hr: Sequence[Tensor],
    h0: Tensor,
    c0: MaybeTensor,
    lengths: MaybeTensor,
    reset: MaybeTensor,
    save: bool,
    all_c: bool,
    layer: int,
    window: int,
    clip: str,
    bound: float,
) -> tuple[Tensor, ...]:
    _same_device(x, hx=h0, cx=c0, lengths=lengths, reset=reset)
    weights = {"weight_ih": w_ih, "weight_hh": w_hh, "bias_ih": b_ih, "bias_hh": b_hh}
    _same_device(x, layer, **weights, weight_hr=w_hr)
    T, B, D = x.size(0), x.size(1), len(w_hh)
    H, R = (h0 if c0 is None else c0).size(2), h0.size(2)
    K = CELLS[cell].K

    def kept(yes: bool, *shape: int | torch.SymInt) -> Tensor:
        return x.new_empty(shape if yes else (0,))

    return (
        x.new_empty((T, B, D * R)),
        x.new_empty((D, B, R)),
        kept(c0 is not None, D, B, H),
        kept(c0 is not None and (save or all_c), T, B, D, H),
        kept(save and len(w_hr) > 0, T, B, D, H),
        kept(save and K > 0, T, B, D, K * H),
    )


def _fake_backward(
    cell: str,
    dy: MaybeTensor,
    dh_n: MaybeTensor,
    dc_n: MaybeTensor,
    dc: MaybeTensor,
    w_hh: Sequence[Tensor],
    w_hr: Sequence[Tensor],
    h0: Tensor,
    c0: MaybeTensor,
    y: Tensor,
    c: Tensor,
    saved: Tensor,
    lengths: MaybeTensor,
    reset: MaybeTensor,
    window: int,
    clip: str,
    bound: float,
    flow: bool,
) -> tuple[Tensor, ...]:
    _same_device(y, dy=dy, dh_n=dh_n, dc_n=dc_n, dc=dc, w_hh=w_hh, w_hr=w_hr, h0=h0, c0=c0)
    _same_device(y, c=c, saved=saved, lengths=lengths, reset=reset)
    T, B, D = y.size(0), y.size(1), len(w_hh)
    H, R = (h0 if c0 is None else c0).size(2), h0.size(2)
    contract = CELLS[cell]
    return (
        y.new_empty((T, B, D, (contract.G + contract.A) * H)),
        y.new_empty((D, B, R)),
        y.new_empty((0,) if c0 is None else (D, B, H)),
        y.new_empty((T, B, D, R) if len(w_hr) > 0 else (0,)),
        y.new_empty(
            (T, B, D) if flow else (0,),
            dtype=torch.float64 if y.dtype == torch.float64 else torch.float32,
        ),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cell, x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths, reset, save, *options = inputs
    y, _h_n, c_n, c, h_raw, saved = output
    ctx.mark_non_differentiable(h_raw, saved, *([c_n, c] if c0 is None else []))
    ctx.set_materialize_grads(False)
    ctx.save = save
    if not save:
        return
    lists = [w_ih, w_hh, b_ih, b_hh, w_hr]
    all_c, layer, window, clip, bound = options
    ctx.options = all_c, layer, window, Clip(clip, bound), _running.flow
    ctx.cell = cell
    ctx.counts = [len(tensors) for tensors in lists]
    flat = [t for tensors in lists for t in tensors]
    ctx.save_for_backward(x, h0, c0, lengths, reset, y, c, h_raw, saved, *flat)


def _backward(
    ctx: Any,
    dy: MaybeTensor,
    dh_n: MaybeTensor,
    dc_n: MaybeTensor,
    dc: MaybeTensor,
    _dh_raw: MaybeTensor,
    _dsaved: MaybeTensor,
) -> tuple[Any, ...]:
    if not ctx.save:
        raise RuntimeError(
            "sequence_forward: expected save=True where a gradient is asked for, got save=False. "
            "Pass save=True, or call it under torch.no_grad()."
        )
    x, h0, c0, lengths, reset, y, c, h_raw, saved, *flat = ctx.saved_tensors
    lists: list[list[Tensor]] = []
    for count in ctx.counts:
        lists.append(flat[:count])
        flat = flat[count:]
    w_ih, w_hh, b_ih, b_hh, w_hr = lists
    tensors = x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths, reset
    call = Call(ctx.cell, *tensors, *ctx.options)
    if torch.is_grad_enabled():  # the gradient itself will be differentiated
        grads = _differentiable_gradients(call, (dy, dh_n, dc_n, dc))
    else:
        grads = _gradients(ctx.needs_input_grad, call, (dy, dh_n, dc_n, dc), (y, c, h_raw, saved))
    dx, dw_ih, dw_hh, db_ih, db_hh, dw_hr, dh0, dc0 = grads
    return (None, dx, dw_ih, dw_hh, db_ih, db_hh, dw_hr, dh0, dc0, *[None] * 8)


def _gradients(
    needs: Sequence[Any],
    call: Call,
    douts: tuple[MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor],
    kept: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Any, ...]:
    """The gradients of all inputs: the backward loop, then one product or sum each."""
    dy, dh_n, dc_n, dc = douts
    y, c, h_raw, saved = kept
    _, need_x, need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_w_hr, *_ = needs
    dgates, dh0, dc0, dproj, flow = torch.ops.rnnkernels.sequence_backward(
        call.cell_name,
        dy,
        dh_n,
        dc_n,
        dc,
        call.w_hh,
        call.w_hr,
        call.h0,
        call.c0,
        y,
        c,
        saved,
        call.lengths,
        call.reset,
        call.window,
        *call.clip,
        call.flow is not None,
    )
    if call.flow is not None:
        call.flow(flow)
    cell, D = call.cell, len(call.w_hh)
    T, B, I = call.x.shape
    G_H = call.w_hh[0].size(0)
    apart = cell.A * (G_H // cell.G)  # columns of the gates whose hidden gradient is kept apart
    x = call.x.reshape(T * B, I)
    dx: MaybeTensor = None
    lists = (call.w_ih, call.w_hh, call.b_ih, call.b_hh, call.w_hr)
    dw_ih, dw_hh, db_ih, db_hh, dw_hr = ([_NONE] * len(tensors) for tensors in lists)

    for d in range(D):
        dgx = dgates[:, :, d, :G_H].reshape(T * B, G_H)
        dgh = [dgates[:, :, d]]
        if apart:
            dgh = [dgates[:, :, d, : G_H - apart], dgates[:, :, d, G_H:]]
        if need_x:
            dx = dgx @ call.w_ih[d] if dx is None else torch.addmm(dx, dgx, call.w_ih[d])
        if need_w_ih[d]:
            dw_ih[d] = dgx.t() @ x
        if call.b_ih and need_b_ih[d]:
            db_ih[d] = dgx.sum(0)
        if call.b_hh and need_b_hh[d]:
            same = None if apart else db_ih[d]
            sums = [part.sum((0, 1)) for part in dgh] if same is None else [same]
            db_hh[d] = torch.cat(sums)  # memory of its own: callers may change gradients in place
        if need_w_hh[d]:
            dw_hh[d] = torch.cat([_hidden_product(part, y, call, d) for part in dgh])
        if call.w_hr and need_w_hr[d]:
            R, H = call.w_hr[d].shape
            dw_hr[d] = dproj[:, :, d].reshape(T * B, R).t() @ h_raw[:, :, d].reshape(T * B, H)
    if dx is not None:
        dx = dx.view(T, B, I)
    return dx, dw_ih, dw_hh, db_ih, db_hh, dw_hr, dh0, dc0 if call.c0 is not None else None


def _hidden_product(dgh: Tensor, y: Tensor, call: Call, d: int) -> Tensor:
    """Sum over steps and rows of ``dgh^T h``, with the h that entered each step: [N, R].

    ``dgh`` is [T, B, N]. The h of all steps but a row's first stands in ``y``, so nothing is
    copied unless there are resets; the first step takes ``h0``.
    """
    T, B, N = dgh.shape
    R = call.h0.size(2)
    if T == 0:
        return dgh.new_zeros((N, R))
    h = y[:, :, d * R : (d + 1) * R]
    h0 = call.h0[d]
    if d == 0:
        first, later, h = dgh[0], dgh[1:], h[:-1]
        if call.reset is not None:
            h0 = h0.masked_fill(call.reset[0][:, None], 0)
    else:
        first, later, h = dgh[-1], dgh[:-1], h[1:]
        if call.lengths is not None:
            last = (call.lengths - 1).clamp(min=0)[None, :, None].expand(1, B, N)
            first = dgh.gather(0, last)[0]
    if call.lengths is not None:
        h0 = h0.masked_fill((call.lengths == 0)[:, None], 0)
    if call.reset is not None:
        h = h.masked_fill(call.reset[1:, :, None], 0)  # [T-1, B, R]
    steps = (T - 1) * B
    return torch.addmm(first.t() @ h0, later.reshape(steps, N).t(), h.reshape(steps, R))


def _differentiable_gradients(
    call: Call, douts: tuple[MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor]
) -> tuple[Any, ...]:
    """The same gradients as functions of all inputs, through the reference, for double backward."""

    def alias(t: Tensor) -> Tensor:
        # A node of its own: no path from one input to another counts.
        return t.view_as(t)

    def aliases(tensors: list[Tensor]) -> list[Tensor]:
        return [alias(t) for t in tensors]

    flow, norms = call.flow, list[Tensor]()
    call = call._replace(
        x=alias(call.x),
        w_ih=aliases(call.w_ih),
        w_hh=aliases(call.w_hh),
        b_ih=aliases(call.b_ih),
        b_hh=aliases(call.b_hh),
        w_hr=aliases(call.w_hr),
        h0=alias(call.h0),
        c0=None if call.c0 is None else alias(call.c0),
        all_c=True,
        flow=None if flow is None else norms.append,
    )
    inputs = call.tensors
    pairs = [
        (out, dout)
        for out, dout in zip(reference.run(call), douts, strict=True)
        if out is not None and dout is not None and out.requires_grad
    ]
    wanted = [t for t in inputs if t.requires_grad]
    found = torch.autograd.grad(
        [out for out, _ in pairs],
        wanted,
        [dout for _, dout in pairs],
        create_graph=True,
        allow_unused=True,
    )
    if flow is not None and norms:
        flow(norms[0])  # a backward through this graph hands over more, which are no dL/dh_t
    grads = {id(t): grad for t, grad in zip(wanted, found, strict=True)}

    def of(tensors: list[Tensor]) -> list[MaybeTensor]:
        return [grads.get(id(t)) for t in tensors]

    (dx,), (dh0,) = of([call.x]), of([call.h0])
    lists = [of(w) for w in (call.w_ih, call.w_hh, call.b_ih, call.b_hh, call.w_hr)]
    return dx, *lists, dh0, None if call.c0 is None else grads.get(id(call.c0))


if _C is not None:
    torch.library.register_fake("rnnkernels::sequence_forward", _fake_forward)
    torch.library.register_fake("rnnkernels::sequence_backward", _fake_backward)
    torch.library.register_autograd(
        "rnnkernels::sequence_forward", _backward, setup_context=_setup_context
    )
