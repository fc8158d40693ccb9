"""The backends for GPUs as the table has them: refusals, checks on first use, faults."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnnkernels import _ops
from rnnkernels._backends import cuda_plan, devices, float32, triton, user_cells, vetting
from rnnkernels._core.call import Call, Result, needs_gradient


def _real(call: Call) -> bool:
    """Whether the call runs now, on tensors with memory behind them."""
    return not torch.compiler.is_compiling() and type(call.x) in (Tensor, nn.Parameter)


def cuda_refusal(call: Call) -> str | None:
    """Why the CUDA kernels cannot run a call that is on a GPU, as far as that is known."""
    device = call.x.device
    cannot = devices.cannot_run(device) or vetting.refusal("cuda", device)
    return cannot or user_cells.refusal(call)


def triton_refusal(call: Call) -> str | None:
    """The same for Triton's."""
    refused = triton.refusal(call)
    return refused or vetting.refusal("triton", call.x.device, triton.family_of(call))


def cuda_ready(call: Call) -> str | None:
    """Checks what a call is about to run, where nothing is known of it; why it is refused after
    that, or None.

    From the first call on, compiled code asks by itself for kernels that are new.
    """
    device = call.x.device
    reason = user_cells.ready(call)
    if reason is not None or not _real(call) or _ops.short_ways_open(device.index):
        return reason
    reason = vetting.prepare("cuda", device, float32.numbers(call.x.dtype))
    if reason is None:
        for backward in (False, True)[: 1 + needs_gradient(call.tensors)]:
            cuda_plan.of_pass(call, backward, device.index)
        _ops.open_short_ways(device.index, not vetting.not_now(device))
    return reason


def triton_ready(call: Call) -> str | None:
    """The same for Triton, whose launches ask by themselves for what is new."""
    if not _real(call) or call.x.device.type != "cuda":
        return None
    device, family = call.x.device, triton.family_of(call)
    return vetting.prepare("triton", device, triton.numbers(family, call.x.dtype, device), family)


def cuda_run(call: Call) -> Result:
    """Runs a call by the CUDA kernels.

    Raises:
        RuntimeError: a kernel that ran before has recorded a fault, such as a wait without end.
    """
    fault = vetting.take_fault(call.x.device) if _real(call) else ""
    if fault:
        raise vetting.EarlierFault(call.x.device, fault)
    return _ops.run(call)


def cuda_detail(call: Call) -> str:
    """How the CUDA kernels lay a call out, of those that are not refused."""
    return cuda_plan.of_call(call, call.x.device.index)


def _inspect(index: int, family: str, numbers: str) -> bool:
    return vetting.settle("cuda", torch.device("cuda", index), family, numbers)


if _ops.missing is None:
    _ops.set_cuda_inspector(_inspect)
