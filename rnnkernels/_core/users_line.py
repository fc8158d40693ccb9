"""The line of the user that a warning is about, which Python shows, and shows once for each."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent


def users_level() -> int:
    """The ``stacklevel`` by which a warning of the caller names the first line on the way here that
    is not the package's, nor torch's, which calls a module's forward."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and (ours := _is_ours(frame.f_code.co_filename)) is not False:
        level += bool(ours)
        frame = frame.f_back
    return level


def _is_ours(file: str) -> bool | None:
    """None: of Python's import, whose frames its warnings do not count."""
    if "importlib" in file and "_bootstrap" in file:
        return None
    return any(Path(file).is_relative_to(folder) for folder in (PACKAGE, TORCH))
