"""Which compiled part belongs to the torch and the Python of this process, or why there is none.

The kernels are one library for all; what calls them for torch is built for one minor version of it,
and a package may hold several of these (``_bindings/torch2.13`` ...). One that does not belong to
this torch is never loaded: it would end in an undefined symbol, or in worse than that.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import struct
import sys
from pathlib import Path
from types import ModuleType

import torch

from rnnkernels._ops.binding_names import BINDINGS, KERNELS, OPS, RECORD, folder

PACKAGE = Path(__file__).parents[1]
MODULE = "_C"

AGAIN = "Install rnnkernels again"
REBUILD = (
    "Install a wheel of rnnkernels for this one, or build it, in its sources: "
    "'pip install --no-build-isolation --force-reinstall --no-deps .'"
)


#: The head of a library of 64 bits, lowest byte first: where the tables of segments and sections
#: lie, and after flags and the head's own size, how large an entry of each is and how many it has.
ELF64 = b"\x7fELF\x02\x01"
ELF = struct.Struct("<32sQQIHHHHH2x")
#: Of a segment: where it lies in the file, and how long it is there.
SEGMENT = struct.Struct("<8xQ16xQ")


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
            raise Missing(f"{needed} is missing. {AGAIN}")
    names = [f"{MODULE}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    module = next((path / name for name in names if (path / name).exists()), None)
    if module is None:
        tags = sorted(each.name.split(".")[1] for each in path.glob(f"{MODULE}.*"))
        if not tags:
            raise Missing(f"{path / names[0]} is missing. {AGAIN}")
        raise Missing(f"built for {_and(tags)}, running {sys.implementation.cache_tag}. {REBUILD}")
    for needed in (PACKAGE / KERNELS, path / OPS, module):
        if _is_cut(needed):
            raise Missing(f"{needed} ends before it should: it was not written whole. {AGAIN}")
    # Found there by Python's ordinary import, before one that an older build has left elsewhere.
    places = sys.modules["rnnkernels"].__path__
    places.insert(0, str(path))
    try:
        return importlib.import_module(f"rnnkernels.{MODULE}")
    except ImportError as error:
        places.remove(str(path))
        built = f"built for torch {built_for(path)}, {running}"
        advice = f"{AGAIN}; where that does not help, build it, in its sources"
        raise Missing(f"{error} ({built}). {advice}") from error


def _is_cut(path: Path) -> bool:
    """Whether a library lacks its end: loading one ends the process (SIGBUS), as the loader maps
    what the headers name, and nobody looks whether it is there. Files of another kind, and those
    that may not be read, are left to the loader, which has words for them.
    """
    try:
        with path.open("rb") as file:
            size, head = os.fstat(file.fileno()).st_size, file.read(ELF.size)
            if len(head) < ELF.size or head[:6] != ELF64:
                return False
            _, segments, sections, _, _, one, count, section, number = ELF.unpack(head)
            file.seek(segments)
            table = file.read(one * count)
    except OSError:
        return False
    ends: list[int] = [segments + one * count, sections + section * number]
    for start in range(0, len(table) - SEGMENT.size + 1, max(one, SEGMENT.size)):
        offset, length = SEGMENT.unpack_from(table, start)
        ends.append(offset + length)
    return max(ends) > size


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
