"""What holds for every test: a fixed seed, two threads, and memory poisoned with NaN."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read when torch loads OpenMP. Several processes with two threads each share the cores, and threads
# that spin while they wait keep off it those they wait for: tests took several times as long. Tests
# of threads go without it (`helpers.run_python`).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from torch.utils import deterministic

import collection
import rnnkernels
from helpers import require_backend

# Deterministic mode asks for this on a GPU, before the first use of one.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# benchmarks/ and tools/ are not installed; last, so that the package under test stays the one
# installed.
_ROOT = Path(__file__).parents[1]
sys.path += [str(_ROOT), str(_ROOT / "tools")]

# Only the poison is wanted of deterministic mode: an op that is not deterministic may run.
_MAY_WARN = "ignore:.*does not have a deterministic implementation:UserWarning"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run what is marked as full, too")
    parser.addoption(
        "--shuffle", type=int, metavar="SEED", help="run in a random order, slow ones first"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    collection.choose(config, items)
    for item in items:
        item.add_marker(pytest.mark.filterwarnings(_MAY_WARN))


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seeds every test alike and fills fresh memory (``torch.empty`` and ``at::empty``, the
    kernels' own included) with NaN, so that an element which nobody wrote fails a comparison."""
    # torch.manual_seed notes it, with a trace of the stack, for every device that is not there.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    memory: Any = deterministic  # a property that mypy does not see
    fill, mode = memory.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # which loads no compiler, as its namesake does
    memory.fill_uninitialized_memory = True
    yield
    memory.fill_uninitialized_memory = fill
    torch.set_deterministic_debug_mode(mode)
    torch.set_num_threads(threads)
    left = {
        "grad mode": torch.is_grad_enabled(),
        "autocast cache": torch.is_autocast_cache_enabled(),
    }
    torch.set_grad_enabled(True)
    torch.set_autocast_cache_enabled(True)
    assert all(left.values()), f"left switched off: {[n for n, on in left.items() if not on]}"


@pytest.fixture
def one_thread() -> None:
    """For thousands of tiny calls, in which threads would only wait for each other, and for counts
    of memory, of which each thread takes some; the number of threads comes back after every test.
    """
    torch.set_num_threads(1)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on each backend that has a CPU."""
    require_backend(request.param)
    with rnnkernels.use_backend(request.param):
        yield request.param


@pytest.fixture
def fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before, be it by another version of the ops, is found again."""
    import graphs  # which loads the compiler

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with graphs.few_kernels():
        yield
    torch._dynamo.reset()
