"""Which compiled part belongs to the torch and the Python of this process, or why there is none.

The kernels are one library for all; what calls them for torch is built for one minor version of it,
and a package may hold several of these (``_bindings/torch2.13`` ...). One that does not belong to
this torch is never loaded: it would end in an undefined symbol, or in worse than that.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import sys
from pathlib import Path
from types import ModuleType

import torch

from rnnkernels._ops.binding_names import BINDINGS, KERNELS, OPS, RECORD, folder

PACKAGE = Path(__file__).parents[1]
MODULE = "_C"

AGAIN = "'pip install --no-build-isolation --force-reinstall --no-deps .'"
REBUILD = f"Build it for this one, in its sources: {AGAIN}"


class Missing(Exception):
    """There is no compiled part for this process; says why, and what to do."""


def minor(version: str) -> str:
    """``2.13`` of ``2.13.0+cpu``: versions that share it take the same binding."""
    return ".".join(version.split(".")[:2])


def place() -> Path:
    """The folder of the binding for the torch of this process, whether it is there or not."""
    return PACKAGE / folder(minor(torch.__version__))


def known() -> list[str]:
    """The minor versions of torch that this package has a binding for, oldest first."""
    found = [path.parent.name.removeprefix("torch") for path in PACKAGE.glob(f"{BINDINGS}/*/{OPS}")]
    return sorted(found, key=lambda text: [int(n) if n.isdigit() else 0 for n in text.split(".")])


def built_for(path: Path) -> str:
    """The version of torch that the binding in a folder was built with, as it has noted it."""
    try:
        return str(json.loads((path / RECORD).read_text(encoding="utf-8"))["torch"])
    except (OSError, ValueError, KeyError, TypeError):
        return path.name.removeprefix("torch")


def load() -> ModuleType:
    """The module ``rnnkernels._C`` for the torch and the Python of this process.

    Raises:
        Missing: there is none, or it cannot be loaded.
    """
    path, running = place(), f"running torch {torch.__version__}"
    if not (PACKAGE / KERNELS).exists() and not known():
        raise Missing(_nothing())
    if not path.is_dir():
        raise Missing(f"built for torch {_and(known()) or '(none)'}, {running}. {REBUILD}")
    for needed in (PACKAGE / KERNELS, path / OPS):
        if not needed.exists():
            raise Missing(f"{needed} is missing. Install rnnkernels again")
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    if not any((path / f"{MODULE}{suffix}").exists() for suffix in suffixes):
        tags = sorted(each.name.split(".")[1] for each in path.glob(f"{MODULE}.*"))
        tag = sys.implementation.cache_tag
        raise Missing(f"built for {_and(tags) or 'no Python'}, running {tag}. {REBUILD}")
    # Found there by Python's ordinary import, before one that an older build has left elsewhere.
    places = sys.modules["rnnkernels"].__path__
    places.insert(0, str(path))
    try:
        return importlib.import_module(f"rnnkernels.{MODULE}")
    except ImportError as error:
        places.remove(str(path))
        built = f"built for torch {built_for(path)}, {running}"
        raise Missing(f"{error} ({built}). {REBUILD}") from error


def _and(words: list[str]) -> str:
    return " and ".join([*filter(None, [", ".join(words[:-1])]), *words[-1:]])


def _nothing() -> str:
    """What to say where there is no compiled part at all."""
    if not (PACKAGE.parent / "setup.py").exists():
        return (
            "this installation has none. Install rnnkernels again, with a C++ compiler and without "
            "RNNKERNELS_EXTENSION=0 where that is from sources"
        )
    for entry in sys.path:
        other = Path(entry, PACKAGE.name).resolve()
        if other != PACKAGE and (other / KERNELS).exists():
            return (
                f"the sources in {PACKAGE.parent} were imported, where nothing is built, in place "
                f"of the installed {other}. Start Python in another folder, or with -P"
            )
    return (
        f"nothing is built in the sources in {PACKAGE.parent}, which were imported. Build there: "
        "'pip install --no-build-isolation -e .', with a C++ compiler"
    )


def users_level() -> int:
    """The ``stacklevel`` by which a warning of the caller names the line that imports the package,
    outside of it."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and (ours := _is_ours(frame.f_code.co_filename)) is not False:
        level += bool(ours)
        frame = frame.f_back
    return level


def _is_ours(file: str) -> bool | None:
    """None: of Python's import, whose frames its warnings do not count."""
    if "importlib" in file and "_bootstrap" in file:
        return None
    return Path(file).is_relative_to(PACKAGE)
