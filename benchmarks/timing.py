"""Times several ways to do the same, fairly: warmed up, in turns, as medians with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

import torch

from benchmarks.device import Device

#: Takes one sample: milliseconds per call.
Sampler = Callable[[], float]

#: A sample runs for at least so long, in as many calls as that takes.
SAMPLE_MS = 5.0
MOST_CALLS = 1000


def sampler(run: Callable[[], object], device: Device) -> Sampler:
    """Warms ``run`` up and finds how many calls make a sample.

    Where these are several, a call before them is not timed: it finds the caches as the way
    before it has left them.
    """
    run()
    calls = min(MOST_CALLS, math.ceil(SAMPLE_MS / device.time(run, 1)))

    def sample() -> float:
        if calls > 1:
            run()
        return device.time(run, calls)

    return sample


def in_turns(
    samplers: Mapping[str, Sampler], repeats: int, redraw: Callable[[], object]
) -> dict[str, list[float]]:
    """A sample of each in every round: A B C, B C A, C A B, ... so that none is always first.

    ``redraw`` comes before each round, untimed.
    """
    names = list(samplers)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % max(1, len(names))
        redraw()
        for name in names[first:] + names[:first]:
            times[name].append(samplers[name]())
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median in milliseconds, and the distance between the quartiles relative to it."""
    low, median, high = statistics.quantiles(times, n=4)
    return {"ms": median, "spread": (high - low) / median}


def floors(
    names: tuple[str, ...], device: Device, name: str, dtype: torch.dtype
) -> dict[str, Sampler]:
    """Samplers of what the machine itself does: ``gemm`` and ``copy``; see :func:`rate`."""
    found: dict[str, Sampler] = {}
    if "gemm" in names:
        a, b = torch.randn(2, device.gemm_size, device.gemm_size, device=name).to(dtype)
        found["gemm"] = sampler(lambda: torch.mm(a, b), device)
    if "copy" in names:
        source = torch.randn(device.copy_bytes // 4, device=name)
        target = torch.empty_like(source)
        found["copy"] = sampler(lambda: target.copy_(source), device)
    return found


def rate(name: str, device: Device, ms: float) -> float:
    """GFLOP/s of ``gemm``; GB/s of ``copy``, every byte read and written counted as two."""
    work = 2 * device.gemm_size**3 if name == "gemm" else 2 * device.copy_bytes
    return work / ms / 1e6
