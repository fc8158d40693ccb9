"""The custom ops as Python sees them: how one is called, fake kernels, and double backward.

``torch.ops.rnnkernels.sequence_forward`` projects the input and runs the loop over time;
``sequence_backward`` runs the loop backwards and returns the gradients of the gates;
``torch.ops.rnnkernels_triton`` has the same, on Triton. ``stack_forward`` and ``stack_backward``
run all layers of one direction. The autograd formula between them is C++ (``csrc/autograd``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rnnkernels import checks, reference
from rnnkernels.call import Call, Clip, Result
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
MaybeList = Sequence[Tensor] | None


def build_info() -> dict[str, Any]:
    """How the compiled part was built: compiler, CUDA architectures (None: no CUDA), and the
    instruction set its CPU kernels use on this machine. Empty where there is none."""
    return {} if _C is None else dict(_C.build_info())


if _C is not None:
    #: The short way of a cell: the state after one step, or None where anything is unusual.
    cell_step = _C.cell_step
    #: The short way of layers: output and last states, or None where anything is unusual.
    layers_call = _C.layers_call
    #: How a layer would be laid out over a GPU; see rnnkernels.cuda_plan.
    cuda_plan = _C.cuda_plan


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast makes of a tensor: float64 stays, and a parameter is cast once per region."""
    if t.dtype in (dtype, torch.float64):
        return t
    if _C is not None and not torch.compiler.is_compiling():
        found = _C.cast(t, dtype)
        if found is not None:
            return found
    return t.to(dtype)


def set_batch_invariant(on: bool) -> None:
    """See :func:`rnnkernels.set_batch_invariant`, which this is for the kernels alone."""
    _C.set_batch_invariant(on)


#: Types of device that the compiled part brings kernels for.
kernel_devices: frozenset[str] = frozenset(
    device
    for device in ("cpu", "cuda")
    if _C is not None
    and torch._C._dispatch_has_kernel_for_dispatch_key(
        "rnnkernels::sequence_forward", device.upper()
    )
)


def run(call: Call) -> Result:
    """Runs one layer through the compiled op for the device of its input."""
    return _run(torch.ops.rnnkernels.sequence_forward, call)


def run_triton(call: Call) -> Result:
    """Runs one layer through the op whose kernels are Triton's."""
    return _run(torch.ops.rnnkernels_triton.sequence_forward, call)


def _run(forward: Callable[..., Any], call: Call) -> Result:
    if call.flow is None:
        return _called(forward, call)
    _C.set_flow_sink(call.flow)
    try:
        return _called(forward, call)
    finally:
        _C.set_flow_sink(None)


def _called(forward: Callable[..., Any], call: Call) -> Result:
    y, h_n, c_n, c, _, _ = forward(
        call.cell_name,
        call.x,
        call.w_ih,
        call.w_hh,
        call.b_ih or None,
        call.b_hh or None,
        call.w_hr or None,
        call.h0,
        call.c0,
        call.lengths,
        call.starts,
        call.reset,
        False,  # autograd has it save what a backward needs
        call.all_c,
        call.layer,
        call.window,
        *call.clip,
    )
    if call.c0 is None:
        return Result(y, h_n, None, None)
    return Result(y, h_n, c_n, c if call.all_c else None)


def run_stack(calls: list[Call], masks: Sequence[Tensor] = ()) -> list[Result]:
    """Runs layers of one direction, each on the y of the one before it, through one compiled op.

    ``masks`` are the factors of these y, one of their shape between any two layers, or none. The
    first call's options are those of all; no layer has a projection or another x than that y.
    """
    first = calls[0]
    y, h_n, c_n, c, _ = torch.ops.rnnkernels.stack_forward(
        first.cell_name,
        first.x,
        [w for call in calls for w in call.w_ih],
        [w for call in calls for w in call.w_hh],
        [b for call in calls for b in call.b_ih] or None,
        [b for call in calls for b in call.b_hh] or None,
        [call.h0 for call in calls],
        [call.c0 for call in calls if call.c0 is not None] or None,
        masks or None,
        first.lengths,
        first.starts,
        first.reset,
        False,  # autograd has it save what a backward needs
        first.all_c,
        first.window,
        *first.clip,
    )
    return [
        Result(y[i], h_n[i], c_n[i] if c_n else None, c[i] if c and first.all_c else None)
        for i in range(len(calls))
    ]


def _same_device(like: Tensor, layer: int = -1, **others: MaybeTensor | MaybeList) -> None:
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
    b_ih: MaybeList,
    b_hh: MaybeList,
    w_hr: MaybeList,
    h0: Tensor,
    c0: MaybeTensor,
    lengths: MaybeTensor,
    starts: MaybeTensor,
    reset: MaybeTensor,
    save: bool,
    all_c: bool,
    layer: int,
    window: int,
    clip: str,
    bound: float,
) -> tuple[Tensor, ...]:
    _same_device(x, hx=h0, cx=c0, lengths=lengths, starts=starts, reset=reset)
    weights = {"weight_ih": w_ih, "weight_hh": w_hh, "bias_ih": b_ih, "bias_hh": b_hh}
    _same_device(x, layer, **weights, weight_hr=w_hr)
    steps, B, D = x.shape[:-1], h0.size(1), len(w_hh)  # steps: [T, B], or packed [N]
    H, R = (h0 if c0 is None else c0).size(2), h0.size(2)
    K = CELLS[cell].K

    def kept(yes: bool, *shape: int | torch.SymInt) -> Tensor:
        return x.new_empty(shape if yes else (0,))

    return (
        x.new_empty((*steps, D * R)),
        x.new_empty((D, B, R)),
        kept(c0 is not None, D, B, H),
        kept(c0 is not None and (save or all_c), *steps, D, H),
        kept(save and bool(w_hr), *steps, D, H),
        kept(save and K > 0, *steps, D, K * H),
    )


def _fake_backward(
    cell: str,
    dy: MaybeTensor,
    dh_n: MaybeTensor,
    dc_n: MaybeTensor,
    dc: MaybeTensor,
    w_hh: Sequence[Tensor],
    w_hr: MaybeList,
    h0: Tensor,
    c0: MaybeTensor,
    y: Tensor,
    c: Tensor,
    saved: Tensor,
    lengths: MaybeTensor,
    starts: MaybeTensor,
    reset: MaybeTensor,
    window: int,
    clip: str,
    bound: float,
    flow: bool,
    initial: bool,
    invariant: bool,
) -> tuple[Tensor, ...]:
    _same_device(y, dy=dy, dh_n=dh_n, dc_n=dc_n, dc=dc, w_hh=w_hh, w_hr=w_hr, h0=h0, c0=c0)
    _same_device(y, c=c, saved=saved, lengths=lengths, starts=starts, reset=reset)
    steps, B, D = y.shape[:-1], h0.size(1), len(w_hh)
    H, R = (h0 if c0 is None else c0).size(2), h0.size(2)
    contract = CELLS[cell]
    return (
        y.new_empty((*steps, D, (contract.G + contract.A) * H)),
        y.new_empty((D, B, R) if initial else (0,)),
        y.new_empty((D, B, H) if initial and c0 is not None else (0,)),
        y.new_empty((*steps, D, R) if w_hr else (0,)),
        y.new_empty(
            (*steps, D) if flow else (0,),
            dtype=torch.float64 if y.dtype == torch.float64 else torch.float32,
        ),
    )


def _fake_input_gradient(dgates: Tensor, w_ih: Sequence[Tensor]) -> Tensor:
    _same_device(dgates, w_ih=w_ih)
    return dgates.new_empty((*dgates.shape[:-2], w_ih[0].size(1)))


def _fake_backward_over_saved(*arguments: Any) -> tuple[Tensor, ...]:
    return _fake_backward(*arguments)[1:]


def _fake_stack_forward(
    cell: str,
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: MaybeList,
    b_hh: MaybeList,
    h0: Sequence[Tensor],
    c0: MaybeList,
    masks: MaybeList,
    lengths: MaybeTensor,
    starts: MaybeTensor,
    reset: MaybeTensor,
    save: bool,
    all_c: bool,
    window: int,
    clip: str,
    bound: float,
) -> tuple[list[Tensor], ...]:
    _same_device(x, hx=h0, cx=c0, masks=masks, lengths=lengths, starts=starts, reset=reset)
    for layer in range(len(w_hh)):
        weights = {"weight_ih": w_ih, "weight_hh": w_hh, "bias_ih": b_ih, "bias_hh": b_hh}
        _same_device(
            x, layer, **{name: (w or ())[layer : layer + 1] for name, w in weights.items()}
        )
    steps, (_, B, H), K, has_c = x.shape[:-1], h0[0].shape, CELLS[cell].K, bool(c0)

    def each(yes: bool, *shape: int | torch.SymInt) -> list[Tensor]:
        return [x.new_empty(shape) for _ in w_hh] if yes else []

    return (
        each(True, *steps, H),
        each(True, 1, B, H),
        each(has_c, 1, B, H),
        each(has_c and (save or all_c), *steps, 1, H),
        each(save and K > 0, *steps, 1, K * H),
    )


def _fake_stack_backward(
    cell: str,
    dy: Sequence[MaybeTensor],
    dh_n: Sequence[MaybeTensor],
    dc_n: Sequence[MaybeTensor],
    dc: Sequence[MaybeTensor],
    w_ih: MaybeList,
    w_hh: Sequence[Tensor],
    h0: Sequence[Tensor],
    c0: MaybeList,
    masks: MaybeList,
    y: Sequence[Tensor],
    c: MaybeList,
    saved: MaybeList,
    lengths: MaybeTensor,
    starts: MaybeTensor,
    reset: MaybeTensor,
    window: int,
    clip: str,
    bound: float,
    initial: bool,
) -> tuple[list[Tensor], ...]:
    like = y[0]
    outside = {"dy": dy, "dh_n": dh_n, "dc_n": dc_n, "dc": dc}
    given = {name: [t for t in grads if t is not None] for name, grads in outside.items()}
    _same_device(like, -1, **given, w_ih=w_ih, w_hh=w_hh, h0=h0, c0=c0, y=y, c=c, saved=saved)
    _same_device(like, masks=masks, lengths=lengths, starts=starts, reset=reset)
    steps, (_, B, H), contract = like.shape[:-1], h0[0].shape, CELLS[cell]

    def each(yes: bool, *shape: int | torch.SymInt) -> list[Tensor]:
        return [like.new_empty(shape) for _ in w_hh] if yes else []

    return (
        each(True, *steps, 1, (contract.G + contract.A) * H),
        each(initial, 1, B, H),
        each(initial and bool(c0), 1, B, H),
    )


def _fake_stack_backward_over_saved(*arguments: Any) -> tuple[list[Tensor], ...]:
    return _fake_stack_backward(*arguments)[1:]


def _differentiable_gradients(
    cell: str,
    dy: MaybeTensor,
    dh_n: MaybeTensor,
    dc_n: MaybeTensor,
    dc: MaybeTensor,
    x: Tensor,
    w_ih: list[Tensor],
    w_hh: list[Tensor],
    b_ih: list[Tensor] | None,
    b_hh: list[Tensor] | None,
    w_hr: list[Tensor] | None,
    h0: Tensor,
    c0: MaybeTensor,
    lengths: MaybeTensor,
    starts: MaybeTensor,
    reset: MaybeTensor,
    window: int,
    clip: str,
    bound: float,
    wanted: list[int],
    flow: bool,
) -> tuple[list[Tensor], Tensor]:
    """The gradients of a layer as functions of all inputs, through the reference; with a history
    where gradients are enabled."""
    create_graph = torch.is_grad_enabled()
    groups = (w_ih, w_hh, b_ih or [], b_hh or [], w_hr or [])
    inputs: list[Any] = [x, h0, c0, *(w for group in groups for w in group)]
    for i, t in enumerate(inputs):
        if i in wanted and not t.requires_grad:  # torch.func asks outside of its transform
            inputs[i] = t.detach().requires_grad_()
        elif t is not None:  # a node of its own: no path from one input to another counts
            with torch.enable_grad():
                inputs[i] = t.view_as(t)
    x, h0, c0, *rest = inputs
    weights = iter(rest)
    w_ih, w_hh, b_ih, b_hh, w_hr = (list(islice(weights, len(group))) for group in groups)
    norms: list[Tensor] = []
    call = Call(
        cell,
        x,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        w_hr,
        h0,
        c0,
        lengths,
        reset,
        starts=starts,
        all_c=True,
        window=window,
        clip=Clip(clip, bound),
        flow=norms.append if flow else None,
    )
    with torch.enable_grad():
        outs = reference.run(call)
    pairs = [
        (out, dout)
        for out, dout in zip(outs, (dy, dh_n, dc_n, dc), strict=True)
        if out is not None and dout is not None and out.requires_grad
    ]
    found = torch.autograd.grad(
        [out for out, _ in pairs],
        [inputs[i] for i in wanted],
        [dout for _, dout in pairs],
        create_graph=create_graph,
        materialize_grads=True,
    )
    # A backward through this graph hands over more norms, which are none of dL/dh_t.
    return list(found), norms[0] if norms else x.new_zeros(*x.shape[:-1], len(w_hh))


if _C is not None:
    for library in ("rnnkernels", "rnnkernels_triton"):
        torch.library.register_fake(f"{library}::sequence_forward", _fake_forward)
        torch.library.register_fake(f"{library}::sequence_backward", _fake_backward)
        torch.library.register_fake(f"{library}::sequence_backward_", _fake_backward_over_saved)
    torch.library.register_fake("rnnkernels::stack_forward", _fake_stack_forward)
    torch.library.register_fake("rnnkernels::stack_backward", _fake_stack_backward)
    torch.library.register_fake("rnnkernels::stack_backward_", _fake_stack_backward_over_saved)
    torch.library.register_fake("rnnkernels::input_gradient", _fake_input_gradient)
    for key in ("CompositeImplicitAutograd", "Batched"):  # the latter: is_grads_batched
        torch.library.impl("rnnkernels::sequence_gradients", key)(_differentiable_gradients)
