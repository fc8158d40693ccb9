"""All that differs between a CPU and a GPU: the clock, rotated inputs, floors, peak memory."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from rnnkernels._backends import float32

Run = Callable[[], object]


class Device(Protocol):
    """What a benchmark needs to know of a device."""

    #: The floors: a matrix product of this size, a copy of so many bytes.
    gemm_size: int
    copy_bytes: int

    def time(self, run: Run, calls: int) -> float:
        """Milliseconds per call."""

    def rotations(self, bytes: int) -> int:
        """How many inputs of so many bytes to take in turns, so that none waits in a cache where
        only a benchmark would find it."""

    def peak_allocated(self, run: Run) -> int:
        """The most bytes that torch's allocator had given out at once during ``run``, beyond
        those before it."""

    def describe(self) -> dict[str, Any]:
        """For the record."""


class Cpu:
    gemm_size = 2048
    copy_bytes = 2**28  # no cache of a core holds it

    def time(self, run: Run, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) * 1e3 / calls

    def rotations(self, bytes: int) -> int:
        return 1  # a layer below has just written the input: it is in the cache in earnest, too

    def peak_allocated(self, run: Run) -> int:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it would write through a progress bar
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            kept = run()
        del kept
        events = found.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        peak = now = 0
        for _, change in sorted(changes, key=lambda change: change[0]):
            now += change
            peak = max(peak, now)
        return peak

    def describe(self) -> dict[str, Any]:
        return {"processor": _processor(), "cores": cores()}


class Cuda:
    gemm_size = 8192
    copy_bytes = 2**30

    def time(self, run: Run, calls: int) -> float:
        event: Any = torch.cuda.Event  # it has no annotations
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / calls

    def rotations(self, bytes: int) -> int:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return min(64, 1 + math.ceil(2 * cache / max(1, bytes)))

    def peak_allocated(self, run: Run) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before

    def describe(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(0)
        return {
            "processor": _processor(),
            "cores": cores(),
            "gpu": found.name,
            "compute_capability": f"{found.major}.{found.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "driver": _driver(),
            "tf32": float32.tf32_allowed(torch.float32),
            "tf32_matmul": float32.tf32_in_matmul(),
        }


DEVICES: dict[str, type[Device]] = {"cpu": Cpu, "cuda": Cuda}


def get(name: str) -> Device:
    """The device of this name.

    Raises:
        ValueError: it is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("cuda: torch sees no CUDA device; use cpu, or install a CUDA build of it")
    return DEVICES[name]()


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.exists() else "unknown"
