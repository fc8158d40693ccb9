"""What several of these tests stand on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import require_backend
from rnnkernels import serving


@pytest.fixture
def kernels(tmp_path: Path) -> Iterator[object]:
    """A GPU whose kernels are a stand-in: see support/stand_in.py."""
    from stand_in import on_gpu

    with on_gpu(tmp_path) as runner:
        yield runner


@pytest.fixture
def nothing_packed() -> Iterator[None]:
    """No packed weights are kept when a test begins, and the limit is as before when it ends."""
    require_backend("cpu")
    limit = serving.packed_limit()
    serving.drop()
    yield
    serving.set_packed_limit(limit)
    serving.drop()
