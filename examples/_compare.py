"""What a comparison with torch.nn takes: its way to truncate gradients, and times in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rnnkernels import streaming

WARM_UP_STEPS = 3
TIMED_STEPS = 15


class InWindows(nn.Module):
    """A layer of torch.nn run window by window, so that no gradient flows from one to another."""

    def __init__(self, rnn: nn.Module, window: int) -> None:
        """Wrap ``rnn``; windows have ``window`` steps, but for the last."""
        super().__init__()
        self.rnn = rnn
        self.window = window

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """Map ``input`` ``[T, B, I]`` and the state ``hx`` to the output and the final state."""
        outputs: list[Tensor] = []
        for x in streaming.chunks(input, self.window):
            output, hx = self.rnn(x, streaming.detach(hx) if outputs else hx)
            outputs.append(output)
        return torch.cat(outputs), hx


def in_turns(steps: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Time all ``steps`` in turns; return the median of each, in milliseconds."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(WARM_UP_STEPS + TIMED_STEPS):
        for step, taken in zip(steps, seconds, strict=True):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            taken.append(time.perf_counter() - start)
    return [1e3 * statistics.median(taken[WARM_UP_STEPS:]) for taken in seconds]


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
