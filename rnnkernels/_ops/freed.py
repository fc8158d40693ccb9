"""What is freed together, and taken again by the next call, stays with this process.

The C library of Linux hands what is free at the end of its memory back to the system where that is
more than twice the largest block that it has seen freed; then every page is faulted in anew, call
after call. ``csrc/autograd/gradients.cpp`` does the same for the gradients of a step.
"""

from __future__ import annotations

import torch

_MOST = 32 << 20  # it learns no more
_shown = 0


def show(size: int) -> None:
    """Lets it see a block of so many bytes freed, if it has seen none of that size."""
    global _shown
    size = min(size, _MOST)
    if size > _shown:
        _shown = size
        torch.empty(size, dtype=torch.uint8)
