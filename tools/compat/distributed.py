"""Several processes: the cases of :mod:`compat.two_processes` as rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

from compat.registry import Library, Section

with warnings.catch_warnings():  # of torch's own, as torch.distributed is imported
    warnings.simplefilter("ignore", DeprecationWarning)
    from compat import two_processes

distributed = Section("Distributed, two processes under gloo")


@cache
def results(library: Library) -> dict[str, str]:
    """Of all cases, which one start of two processes tries."""
    return two_processes.started(library, range(len(two_processes.CASES)))


def look_up(title: str) -> Callable[[Library], None]:
    def run(library: Library) -> None:
        if reason := results(library)[title]:
            raise RuntimeError(reason)

    return run


for each in two_processes.CASES:
    distributed.row(each.title, costly=True)(look_up(each.title))
