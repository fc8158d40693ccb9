"""The Triton backend: its kernels in Triton's interpreter, where no GPU is needed.

Triton decides when it is imported whether to interpret, and torch.compile may have imported it:
such tests run in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("rnnkernels._C", reason="needs the compiled extension")
pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("greenlet", reason="needs greenlet, which runs programs side by side")

TESTS = Path(__file__).parent
#: Files of tests, and which of them; all at once.
SHARES = {
    "exchange": ["triton_exchange.py"],
    "parity of grids": ["triton_parity.py", "-k", "grid"],
    "other parity": ["triton_parity.py", "-k", "not grid"],
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple]]:
    """Processes that interpret, and what each writes to."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    running = {}
    for share, (file, *which) in SHARES.items():
        output = tmp_path_factory.mktemp("interpreted") / "output"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        with output.open("w") as to:
            process = subprocess.Popen(
                [*command, str(TESTS / file), *which],
                env=environment,
                stdout=to,
                stderr=subprocess.STDOUT,
                cwd=TESTS.parent,
            )
        running[share] = process, output
    yield running
    for process, _ in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("share", SHARES)
def test_interpreted(interpreted: dict[str, tuple], share: str) -> None:
    process, output = interpreted[share]
    assert process.wait() == 0, output.read_text()[-20_000:]
