"""What several of these tests stand on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def kernels(tmp_path: Path) -> Iterator[object]:
    """A GPU whose kernels are a stand-in: see support/stand_in.py."""
    from stand_in import on_gpu

    with on_gpu(tmp_path) as runner:
        yield runner
