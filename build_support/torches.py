"""The versions of torch that a build is for."""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

from build_support import settings
from build_support.settings import fail

#: The oldest whose headers and libraries fit; pyproject.toml says the same.
OLDEST = (2, 11)


class Torch(NamedTuple):
    """Headers and libraries of one."""

    folder: Path
    version: str  # such as 2.13.0+cpu

    @property
    def minor(self) -> str:
        """What a binding is chosen by: 2.13.0 and 2.13.1 take the same."""
        return ".".join(self.version.split(".")[:2])

    def includes(self) -> list[Path]:
        include = self.folder / "include"
        return [include, include / "torch/csrc/api/include"]

    @property
    def libraries(self) -> Path:
        return self.folder / "lib"


def read(folder: Path) -> Torch | None:
    """The one in this folder, or in the package `torch` below it; None where none is."""
    for place in (folder, folder / "torch"):
        version = place / "version.py"
        if version.exists() and (place / "include" / "ATen").exists():
            found = re.search(r"""^__version__\s*=\s*['"]([^'"]+)""", version.read_text(), re.M)
            if found:
                return Torch(place.resolve(), found[1])
    return None


def _here() -> list[Path]:
    """Where the torch of this Python may lie. An isolated build hides the packages of the
    environment that it is for, and still runs in its Python."""
    spec = importlib.util.find_spec("torch")  # does not import it
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(name)) for name in ("platlib", "purelib")]
    if sys.prefix == sys.base_prefix:
        places.append(Path(site.getusersitepackages()))
    return places


@cache
def torches() -> tuple[Torch, ...]:
    """Those that RNNKERNELS_TORCH names, or else the one of this environment."""
    if settings.TORCH:
        named = [Path(name) for name in settings.TORCH.split(os.pathsep) if name]
        found = [read(folder) for folder in named]
        for folder, torch in zip(named, found, strict=True):
            if torch is None:
                fail(f"RNNKERNELS_TORCH: expected folders that hold a torch, got {folder}")
    else:
        found = [next((torch for torch in map(read, _here()) if torch), None)]
    chosen = tuple(torch for torch in found if torch)
    if not chosen:
        fail(
            f"no torch was found for {sys.executable}, and the compiled part is built for one. "
            "Install it first ('pip install torch'), then 'pip install --no-build-isolation .'; "
            "RNNKERNELS_TORCH=FOLDER names one that lies elsewhere, and RNNKERNELS_EXTENSION=0 "
            "installs the Python package alone, which runs on torch.nn's kernels"
        )
    for torch in chosen:
        if tuple(map(int, re.findall(r"\d+", torch.version)[:2])) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            fail(f"torch {torch.version} in {torch.folder} is too old: {oldest} or newer is needed")
    minors = [torch.minor for torch in chosen]
    if len(set(minors)) < len(minors):
        fail(f"RNNKERNELS_TORCH: expected one torch of each minor version, got {minors}")
    return chosen
