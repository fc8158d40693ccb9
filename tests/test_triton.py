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


@pytest.mark.parametrize("name", ["triton_exchange", "triton_parity"])
def test_interpreted(name: str) -> None:
    """All tests of that file, in a process that interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / f"{name}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
