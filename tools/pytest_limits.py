"""A plugin of pytest for tests that may hang a GPU or spoil it for their process.

    python -m pytest -p pytest_limits tests/backends/test_cuda.py

RNNKERNELS_TEST_RECORD names a file that gets a line for every test as it begins and as it ends;
tests that stand there already are not run again, so that a process can take over where another
ended. RNNKERNELS_TEST_LIMIT are the seconds of a test, after which the process ends: it may wait
for a GPU, where no exception reaches it. It ends too after a test that failed with an error of
CUDA, since whatever follows in the process would fail with the same.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

SPOILED = 86  # exit status
OF_CUDA = ("CUDA error", "AcceleratorError", "a CUDA kernel", "illegal memory access")


def record() -> Path:
    return Path(os.environ["RNNKERNELS_TEST_RECORD"])


def write(**line: object) -> None:
    with record().open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> dict[str, str]:
    """Outcomes by test; that of one that only began is "began"."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["test"]: line["outcome"] for line in map(json.loads, lines)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    done = read(record())
    items[:] = [item for item in items if item.nodeid not in done]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    write(test=item.nodeid, outcome="began", process=os.getpid())
    # Whose default is to end the process.
    signal.alarm(int(os.environ.get("RNNKERNELS_TEST_LIMIT", "30")))
    yield
    signal.alarm(0)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3))
    if report.failed and any(words in report.longreprtext for words in OF_CUDA):
        print(report.longreprtext, flush=True)
        os._exit(SPOILED)
