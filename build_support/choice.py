"""Which kernels are built, in one line that says why and how long it takes."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from build_support import cells, cuda, processor, settings
from build_support.settings import fail


class Choice(NamedTuple):
    """Whether the CUDA kernels are built, and one line that says so and why."""

    cuda: bool
    line: str


def choose(setting: str, nvcc: str | None, gpu: bool) -> Choice:
    """By the value of RNNKERNELS_CUDA, and by what is here."""
    if setting not in ("", "0", "1"):
        fail(f"RNNKERNELS_CUDA must be 0, 1 or empty, got {setting!r}")
    if setting == "0":
        return Choice(False, "kernels for the CPU alone, since RNNKERNELS_CUDA=0")
    if nvcc is None:
        if setting == "1":
            fail(f"RNNKERNELS_CUDA=1, but nvcc was not found ({cuda.PLACES})")
        return Choice(False, f"kernels for the CPU alone, since nvcc was not found ({cuda.PLACES})")
    if setting == "1":
        return Choice(True, f"kernels for CPU and CUDA, since RNNKERNELS_CUDA=1, by {nvcc}")
    if gpu:
        return Choice(True, f"kernels for CPU and CUDA, by {nvcc}")
    # They take minutes, and nothing here could run them.
    advice = f"RNNKERNELS_CUDA=1 builds those for CUDA too, by {nvcc}"
    return Choice(False, f"kernels for the CPU alone, since no GPU is here ({advice})")


@cache
def choice() -> Choice:
    """For this machine, in this environment."""
    if not settings.EXTENSION:
        return Choice(False, "pure Python, without kernels: RNNKERNELS_EXTENSION=0")
    if settings.SANITIZE:
        reason = f"since RNNKERNELS_SANITIZE={settings.SANITIZE}"
        return Choice(False, f"kernels for the CPU alone, {reason}")
    # Where it was said what to build, nobody has to look for a GPU.
    return choose(settings.CUDA, cuda.find_nvcc(), not settings.CUDA and cuda.finds_gpu())


def cuda_toolkit() -> cuda.CudaToolkit | None:
    """Where the CUDA kernels are built."""
    return cuda.toolkit(settings.CUDA_ARCHS) if choice().cuda else None


#: Minutes of one processor: CPU kernels of every instruction set, or of one alone; ops and Python
#: module for one torch; CUDA kernels for one architecture. Builds on two processors took 1.5
#: minutes with one instruction set, 3 with all, 6 with two architectures besides.
CPU, CPU_NATIVE, BINDING, CUDA_ARCH = 4.2, 1.5, 1.5, 3.2
#: Of the package's own cells, for one type and instruction set.
CELLS = 0.35


def minutes(torches: int) -> int:
    """About how long a build takes where nothing was built before."""
    work = CPU_NATIVE if processor.without() else CPU
    work += BINDING * torches
    for_all = set(cells.instructions()) - set(processor.FOR_BFLOAT16)
    work += CELLS * len(cells.types(settings.CELLS)) * len(for_all)
    if toolkit := cuda_toolkit():
        work += CUDA_ARCH * len(toolkit.archs)
    return max(1, round(work / settings.cores()))
