"""Two processes under gloo train as one does: the cases of ``tools/compat/two_processes.py``,
which the table of compatibility tries with torch.nn's layers, too."""

from __future__ import annotations

import pytest
import torch

from rnnkernels import _ops

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.distributed, imported
def test_two_processes() -> None:
    """Started once for all cases: most of their time is spent on imports."""
    from compat import two_processes
    from compat.registry import LIBRARIES

    (ours,) = (library for library in LIBRARIES if library.ours)
    cases = [i for i, case in enumerate(two_processes.CASES) if not case.costly]
    assert len(cases) >= 11
    found = two_processes.started(ours, cases)
    assert {title: reason for title, reason in found.items() if reason} == {}
