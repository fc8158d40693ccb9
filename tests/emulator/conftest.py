"""The persistent CUDA kernels in the emulator, once for all tests of a process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import building


@pytest.fixture(scope="session")
def ops() -> Any:
    building.load_emulator()
    return torch.ops.rnnkernels_simt
