"""The persistent CUDA kernels in the emulator, once for all tests of a process."""

from __future__ import annotations

from typing import Any

import pytest

import emulated


@pytest.fixture(scope="session")
def ops() -> Any:
    return emulated.load()
