"""Which of the collected tests run, and in which order."""

from __future__ import annotations

import random

import pytest


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked as full unless ``--full`` is given; shuffles the others where
    ``--shuffle`` asks for it; puts the slow ones first."""
    full = [item for item in items if item.get_closest_marker("full")]
    if full and not config.getoption("full"):
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    seed = config.getoption("shuffle")
    if seed is not None:
        random.Random(seed).shuffle(items)
    # Where several processes share the tests, none is left with a long one at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
