"""What tests of the gallery's programs share."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def gallery(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes the programs importable, as running one as a script would; returns what they share."""
    examples = Path(__file__).parents[2] / "examples"
    for folder in (examples, examples / "gallery"):
        monkeypatch.syspath_prepend(str(folder))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("_gallery")
    torch.set_num_threads(threads)
