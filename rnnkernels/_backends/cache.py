"""The user's cache folder, and files in it that no other process finds half written."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def folder() -> Path:
    """Where files are kept: ``rnnkernels`` in the user's cache folder."""
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "rnnkernels" / "Cache"
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "rnnkernels" if base else Path.home() / ".cache" / "rnnkernels"


def write(path: Path, text: str) -> None:
    """Writes a file, and puts it in its place at once.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    os.replace(file.name, path)  # at once: nobody reads half of it


@contextmanager
def turn(path: Path, patience: float) -> Iterator[None]:
    """Lets one process at a time make the file at `path`, for as long as others wait: `patience`
    seconds. What is put in its place at once may be made by two without harm, so that a wait in
    vain is no error. The system takes the lock from a process that ends, however it does.

    Raises:
        OSError: the folder cannot be written.
    """
    with open(path.with_name(path.name + ".lock"), "a", encoding="utf-8") as file:
        locked = _lock(file.fileno(), patience)
        try:
            yield
        finally:
            if locked:
                _unlock(file.fileno())


def _lock(file: int, patience: float) -> bool:
    with suppress(ImportError):  # where there is no such lock, all make it
        import fcntl

        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > end:
                    return False
                time.sleep(0.05)
            except OSError:  # a file system without locks
                return False
    return False


def _unlock(file: int) -> None:
    import fcntl

    fcntl.flock(file, fcntl.LOCK_UN)
