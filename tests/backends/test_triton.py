"""The Triton backend: its kernels in Triton's interpreter, where no GPU is needed.

Triton decides when it is imported whether to interpret, and torch.compile may have imported it:
such tests run in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rnnkernels._C", reason="needs the compiled extension")
pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("greenlet", reason="needs greenlet, which runs programs side by side")

TESTS = Path(__file__).parent
#: Without what nothing here uses; at the end of a run hypothesis is imported, for a summary.
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")
AGAINST_REFERENCE = ("triton_parity.py", "triton_cells.py", "triton_normed.py")
#: Files of tests, and which of them: in two processes that take about as long.
SHARES = {
    "grids": ["triton_exchange.py", *AGAINST_REFERENCE, "-k", "grid or triton_exchange"],
    "others": [*AGAINST_REFERENCE, "-k", "not grid"],
}


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
def test_interpreted(share: str, pytestconfig: pytest.Config) -> None:
    which = [str(TESTS / word) if word.endswith(".py") else word for word in SHARES[share]]
    if pytestconfig.getoption("full"):
        which.append("--full")
    done = subprocess.run(
        [sys.executable, *PYTEST, *which],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=TESTS.parents[1],
    )
    assert done.returncode == 0, done.stdout[-20_000:]
