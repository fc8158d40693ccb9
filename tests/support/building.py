"""Where tests build what they compile themselves: kept for the next run, and made once for all
processes of one run. `make clean` removes it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import rnnkernels

ROOT = Path(__file__).parents[2]
#: Where the kernels lie, which every library of ops rests on.
PACKAGE = Path(rnnkernels.__file__).parent


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@contextmanager
def folder(name: str, *settings: str) -> Iterator[Path]:
    """Of what is built with these settings, by this compiler, for this torch: nobody else is in it.

    A lock of the system goes with the process that holds it, however that ends.
    """
    of = [sys.implementation.cache_tag, torch.__version__, os.environ.get("CXX", "c++")]
    path = ROOT / "build/tests" / f"{name}-{digest(*of, *settings)}"
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".held").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield path


def load_ops(
    name: str,
    sources: list[str],
    flags: list[str],
    instrument: list[str],
    objects: Sequence[str] = (),
) -> Path:
    """Compiles what is out of date of these sources, by ninja, through ccache where there is one,
    and loads it beside the package's libraries: what is there is not compiled again. Returns the
    folder of what it was made of.

    `instrument` is for the compiler and for the linker, which is given `objects` too.
    """
    pytest.importorskip("ninja")
    ops = rnnkernels.library_path()
    link = [f"-L{ops.parent}", f"-Wl,-rpath,{ops.parent}", f"-l:{ops.name}"]
    link += [f"-L{PACKAGE}", f"-Wl,-rpath,{PACKAGE}", "-l:librnnkernels_kernels.so"]
    with (
        folder(name, *sources, *flags, *instrument, *objects, *link) as path,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.delenv("LD_PRELOAD", raising=False)  # of the sanitizers: not for the compiler
        (path / "lock").unlink(missing_ok=True)  # torch's, which a process that died leaves behind
        cpp_extension.load(
            name,
            [str(ROOT / source) for source in sources],
            extra_include_paths=[str(ROOT / "csrc"), str(ROOT / "tests/emulator")],
            extra_cflags=[*flags, *instrument, "-DAT_PER_OPERATOR_HEADERS"],  # as setup.py
            extra_ldflags=[*instrument, *objects, *link],
            build_directory=str(path),
            is_python_module=False,
        )
        return path


def contents(*folders: str) -> str:
    """A digest of all sources in these folders."""
    suffixes = {".h", ".cuh", ".cpp", ".cu", ".inc"}
    found = [path for each in folders for path in (ROOT / each).rglob("*")]
    paths = sorted(path for path in found if path.suffix in suffixes)
    return digest(*(f"{path.relative_to(ROOT)}\0{path.read_text()}" for path in paths))
