"""The memory that one training step needs, in a fresh process, measured in two ways.

``peak_mib``: the most that torch's allocator had given out at once, to the byte, from the memory
events of ``torch.profiler`` (on a GPU, from the allocator's own statistics). It is exact and the
same in every run, but does not see what libraries allocate past torch, nor whether what was asked
for is ever touched.

``resident_mib``: by how much the resident memory of the process grew at most, as the system
counts it: every page in use, whoever asked for it, and with it the steps and the habits of the
C library's allocator. The check on the other. Where the system does not let a peak be forgotten,
what the process needed to start hides as much of it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

from benchmarks import device

#: What the server of fresh processes has imported before it forks them.
_PRELOADED = ["torch", "torch.profiler", "rnnkernels", "benchmarks.suites"]

MIB = 2**20


def in_fresh_process(measure: Callable[..., dict[str, float]], *args: object) -> dict[str, float]:
    """``measure(*args)``, with nothing but imports done before in its process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as child:
        return child.submit(measure, *args).result()


def measure(run: Callable[[], object], warm_up: Callable[[], object], on: str) -> dict[str, float]:
    """Both figures for ``run``, with its result alive; ``warm_up`` is the same, but short."""
    warm_up()
    _forget_peak()
    before = _peak()
    run()
    resident = _peak() - before
    allocated = device.get(on).peak_allocated(run)
    return {"peak_mib": allocated / MIB, "resident_mib": resident / MIB}


def _forget_peak() -> None:
    """Sets the peak to what is in use now, where the system is Linux and allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Bytes; ``getrusage`` would tell the parent's peak where that was higher."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
