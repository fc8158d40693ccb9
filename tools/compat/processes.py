"""Python code in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import rnnkernels

#: Where the package is, for processes that start there.
WHERE = str(Path(rnnkernels.__file__).parents[1])


def run(code: str, *, flags: Sequence[str] = ("-W", "ignore"), **environment: str) -> str:
    """What the code prints.

    Raises:
        RuntimeError: it failed; the message is the last line of its errors.
    """
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=WHERE, env={**os.environ, **environment}
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(lines[-1])
    return done.stdout
