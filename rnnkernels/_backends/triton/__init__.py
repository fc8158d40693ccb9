"""The portable GPU backend: the sequence loops as Triton kernels.

``cells`` knows the gates; ``sequence`` has the two kernels for every cell, made of what is in
``blocks``; ``plan`` lays a layer out over programs; ``launch`` is what the compiled part calls.
``normed`` and ``normed_launch`` are the same for cells whose products are normalised. None of them
is imported before a layer runs here, so that Triton need not be installed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from rnnkernels import _ops
from rnnkernels._backends import devices
from rnnkernels._core.call import Call

INSTALLED = find_spec("triton") is not None
#: Triton runs kernels on the CPU, one program after the other: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The family of kernels of cells whose products are normalised, as a check knows it; the others are
#: the kinds of layouts.
ROWS = "rows"
#: Sizes that the kernels count in 32 bits: places of a weight, rows of a pass, signals of a pass.
LARGEST = 2**31


class _Forced(threading.local):
    """The kind of layout that this thread takes, or None: whatever fits."""

    kind: str | None = None

    @contextmanager
    def to(self, kind: str) -> Iterator[None]:
        """Only this kind inside the block, unvetted."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before


forced = _Forced()


def refusal(call: Call) -> str | None:
    """None where the kernels can run this call, else the reason why not."""
    if _ops.missing is not None:
        return f"the compiled part, which checks and differentiates, is missing ({_ops.missing})"
    if not INSTALLED:
        return "Triton is not installed"
    if call.x.device.type != "cuda" and not (INTERPRETED and call.x.device.type == "cpu"):
        return f"it runs tensors on a GPU, and the input is on {call.x.device.type}"
    if call.x.dtype not in DTYPES:
        return f"it has no kernels for {call.x.dtype}"
    if call.projected:
        return "it has no kernels for proj_size"
    T, B, H = call.T, call.B, call.h0.size(2)
    if max(call.cell.G * H * H, 4 * T * B, T * H) >= LARGEST:
        return f"T={T}, B={B}, H={H} is more than it counts"
    return devices.too_old(call.x.device) if call.x.device.type == "cuda" else None


def family_of(call: Call) -> str:
    """Which kernels stand in for all others in this call."""
    return ROWS if call.cell.normed else "step"


def numbers(family: str, dtype: torch.dtype, device: torch.device) -> str:
    """What numbers of this dtype are in products of a family, as a check has it."""
    from rnnkernels._backends.triton import launch, normed_launch

    if family == ROWS:
        return normed_launch.numbers(dtype)
    return launch.numbers(dtype, torch.empty(0, device=device))


def describe(call: Call) -> str:
    """How a call that is not refused is laid out, in words."""
    from rnnkernels._backends.triton import launch, normed_launch

    return normed_launch.describe(call) if call.cell.normed else launch.describe(call)
