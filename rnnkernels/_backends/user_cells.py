"""CPU kernels of cells that users write: compiled on first use for the machine at hand, and kept in
the user's cache folder.

A library has a cell's own few functions for one storage type and the instruction set that the
kernels in use are for; the loops are those of the package (``csrc/cpu/user_cell.inc``).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from functools import cache as remembered
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch

from rnnkernels import _ops
from rnnkernels._backends import cache, headers
from rnnkernels._core.call import Call
from rnnkernels._core.compiling import constant_result
from rnnkernels.cells import DefinedCell, find

PACKAGE = Path(__file__).parents[1]
FLAGS = (
    "-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-Wno-psabi", "-fPIC",
    "-fvisibility=hidden",
)  # fmt: skip
#: The types in C++.
TYPES = {
    torch.float32: "float", torch.float64: "double",
    torch.bfloat16: "BFloat16", torch.float16: "Float16",
}  # fmt: skip
#: For a processor whose best kernels for bfloat16 are others than those for the rest: the latter.
REST = {"amx": "avx512", "avx512_bf16": "avx512"}
PATIENCE = 300.0  # seconds that a process waits for another one that compiles the same

_lock = threading.Lock()
#: By a cell's name and a type: '' where its kernels are loaded, else the reason why they cannot be.
_found: dict[tuple[str, torch.dtype], str] = {}
_told: set[str] = set()


def refusal(call: Call) -> str | None:
    """Why the CPU kernels cannot run a call, as far as that is known without compiling."""
    return _reason(call.cell_name, call.x.dtype)


@constant_result  # torch.compile would have its code hold while nothing is found
def _reason(name: str, dtype: torch.dtype) -> str | None:
    return _found.get((name, dtype)) or None


def ready(call: Call) -> str | None:
    """The same, found out: compiles and loads the kernels of the call's cell where that was not
    done yet."""
    return prepare(call.cell_name, call.x.dtype) if written_by_user(call.cell_name) else None


def written_by_user(name: str) -> bool:
    return "-" in name  # as no built-in one is called


@constant_result
def prepare(name: str, dtype: torch.dtype) -> str | None:
    """Has the kernels of a cell for a type loaded. Returns the reason where that cannot be."""
    wanted = name, dtype
    with _lock:
        if wanted not in _found:
            cell = find(name)
            assert isinstance(cell, DefinedCell)
            _found[wanted] = _prepare(cell, dtype)
    return _found[wanted] or None


@constant_result
def tell(name: str, dtype: torch.dtype) -> None:
    """Warns, once, of a cell that runs on the reference since its kernels cannot be had."""
    reason = _found.get((name, dtype))
    if reason and name not in _told:
        _told.add(name)
        warnings.warn(
            f"rnnkernels: the cell {find(name)} runs on the slow reference: {reason}",
            stacklevel=2,
        )


def forget() -> None:
    """What was found of all cells, for tests: what is loaded stays so."""
    _found.clear()
    _told.clear()


def find_compiler() -> list[str] | None:
    """The compiler's command, which the environment variable CXX may name."""
    asked = os.environ.get("CXX")
    for command in [shlex.split(asked)] if asked else (["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return command
    return None


@remembered
def _version(command: tuple[str, ...]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0] if done.stdout else ""


@remembered
def _digest(csrc: Path) -> str:
    return headers.digest(csrc)


def _prepare(cell: DefinedCell, dtype: torch.dtype) -> str:
    if _ops.missing is not None:
        return f"the compiled part, which its kernels go with, is missing ({_ops.missing})"
    csrc = headers.folder(PACKAGE)
    if csrc is None:
        return f"the C++ sources that it is compiled with are missing from {PACKAGE}"
    build = _ops.build_info()
    if _digest(csrc) != build["headers"]:
        return f"the C++ sources in {csrc} are others than this build's. Build rnnkernels again"
    compiler = find_compiler()
    if compiler is None:
        asked = os.environ.get("CXX")
        looked = f"CXX={asked}" if asked else "c++, g++, clang++ on PATH"
        return f"no C++ compiler was found to compile its kernels with ({looked}). Install one"
    try:
        library = Library(cell, TYPES[dtype], build["cpu_capability"], build["headers"])
        return _load(library, csrc, compiler)
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "")
        return f"{shlex.join(compiler)} did not compile its kernels ({first or error})"
    except (OSError, RuntimeError) as error:
        return f"its kernels could not be compiled and kept in the cache folder ({error})"


class Library(NamedTuple):
    """What a cell is compiled to."""

    cell: DefinedCell
    type: str  # in C++
    instructions: str
    digest: str  # of the sources


def _load(library: Library, csrc: Path, compiler: list[str]) -> str:
    """Loads a cell's library from the cache, where it is put if it is not there."""
    cell, *rest = library
    parts = (cell.cpp, *rest, *compiler, _version(tuple(compiler)), *FLAGS)
    key = sha256("\0".join([*parts, torch.__version__]).encode()).hexdigest()[:16]
    path = cache.folder() / "cells" / f"{cell.name}-{library.type.lower()}-{key}.so"
    if _is_whole(path) and not _ops.load_cell(cell.name, str(path)):
        return ""
    path.parent.mkdir(parents=True, exist_ok=True)
    with cache.turn(path, PATIENCE):
        if _is_whole(path) and not _ops.load_cell(cell.name, str(path)):
            return ""  # another process has made it
        begin = time.perf_counter()
        _compile(library, csrc, compiler, path)
        seconds = time.perf_counter() - begin
        print(
            f"rnnkernels: compiled the cell {cell.title} ({cell.name}) for {library.type} on "
            f"{library.instructions} in {seconds:.1f} s, once for this machine: {path}",
            file=sys.stderr,
            flush=True,
        )
    return _ops.load_cell(cell.name, str(path))


def _is_whole(path: Path) -> bool:
    """Whether a library is there as it was written: loading a part of one ends the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    end = sha256().digest_size
    return content[-end:] == sha256(content[:-end]).digest()


def _compile(library: Library, csrc: Path, compiler: list[str], path: Path) -> None:
    """
    Raises:
        CalledProcessError: the compiler failed.
        OSError: a file could not be written.
    """
    cell, type, instructions, digest = library
    file = instructions if type == "BFloat16" else REST.get(instructions, instructions)
    with tempfile.TemporaryDirectory(prefix=cell.name, dir=path.parent) as folder:
        (header := Path(folder, "cell.h")).write_text(cell.cpp, encoding="utf-8")
        made = Path(folder, "made.so")
        macros = {
            "CELL": f'"{header}"',
            "CELL_TYPE": type,
            "CELL_HEADERS": f'"{digest}"',
            "CELL_KERNELS": f'"{instructions}"',
        }
        command = [*compiler, *FLAGS, f"-I{csrc}", *(f"-DRNN_{n}={v}" for n, v in macros.items())]
        source = csrc / "cpu" / f"kernels_{file}.cpp"
        command += ["-shared", str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        content = made.read_bytes()
        made.write_bytes(content + sha256(content).digest())  # loaders take no notice of an end
        os.replace(made, path)  # at once: nobody loads half of it


if _ops.missing is None:
    _ops.set_cell_compiler(lambda name, type: prepare(name, getattr(torch, type)) or "")
