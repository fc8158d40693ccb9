"""Kernels of cells that users write: compiled on first use for the machine at hand, and kept in the
user's cache folder. Those of the package's own cells may come compiled with it (``shipped``).

A library has a cell's own few functions for one storage type, and for the instruction set that the
CPU kernels in use are for (``csrc/cpu/user_cell.inc``) or for the GPUs that are here
(``csrc/cuda/user_cell.inc``, by nvcc); the loops are those of the package.
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
from rnnkernels._core.users_line import users_level
from rnnkernels.cells import DefinedCell, find

PACKAGE = Path(__file__).parents[1]
FLAGS = (
    "-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-Wno-psabi", "-fPIC",
    "-fvisibility=hidden",
)  # fmt: skip
NVCC_FLAGS = (
    "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-x", "cu", "-shared",
    "-Xcompiler", "-fPIC,-fvisibility=hidden",
    # Its runtime is its own: torch's, which may be of another version, is not bound to it.
    "-cudart", "static", "-Xlinker", "--exclude-libs", "-Xlinker", "libcudart_static.a",
)  # fmt: skip
#: The types in C++.
TYPES = {
    torch.float32: "float", torch.float64: "double",
    torch.bfloat16: "BFloat16", torch.float16: "Float16",
}  # fmt: skip
#: For a processor whose best kernels for bfloat16 are others than those for the rest: the latter.
REST = {"amx": "avx512", "avx512_bf16": "avx512"}
#: Where libraries lie that came with the package.
SHIPPED = PACKAGE / "_cells"
PATIENCE = 300.0  # seconds that a process waits for another one that compiles the same

_lock = threading.Lock()
#: By a cell's name, a type and a backend, ``'cpu'`` or ``'cuda'``: '' where its kernels are loaded,
#: else the reason why they cannot be.
_found: dict[tuple[str, torch.dtype, str], str] = {}
#: Of those that are loaded: which came with the package.
_came: set[tuple[str, torch.dtype, str]] = set()
_told: set[str] = set()


def refusal(call: Call) -> str | None:
    """Why there are no kernels of a call's cell for its device, as far as that is known without
    compiling."""
    return _reason(call.cell_name, call.x.dtype, call.x.device.type)


@constant_result  # torch.compile would have its code hold while nothing is found
def _reason(name: str, dtype: torch.dtype, backend: str) -> str | None:
    found = _found.get((name, dtype, backend)) or None
    if found is None and backend == "cuda" and written_by_user(name):
        return None if find_compiler("cuda") else no_compiler("cuda")
    return found


def ready(call: Call) -> str | None:
    """The same, found out: compiles and loads the kernels of the call's cell where that was not
    done yet."""
    if not written_by_user(call.cell_name):
        return None
    return prepare(call.cell_name, call.x.dtype, call.x.device.type)


def describe(call: Call) -> str:
    """Whether the kernels of a call's cell came with the package."""
    came = (call.cell_name, call.x.dtype, call.x.device.type) in _came
    return "kernels of this cell came compiled with the package" if came else ""


def written_by_user(name: str) -> bool:
    return "-" in name  # as no built-in one is called


@constant_result
def prepare(name: str, dtype: torch.dtype, backend: str = "cpu") -> str | None:
    """Has the kernels of a cell for a type and a backend loaded. Returns the reason where that
    cannot be."""
    wanted = name, dtype, backend
    with _lock:
        if wanted not in _found:
            cell = find(name)
            assert isinstance(cell, DefinedCell)
            _found[wanted] = _prepare(cell, dtype, backend)
    return _found[wanted] or None


@constant_result
def tell(name: str, dtype: torch.dtype, backend: str) -> None:
    """Warns, once, of a cell that runs on the reference since its kernels cannot be had."""
    reason = _found.get((name, dtype, backend))
    if reason and name not in _told:
        _told.add(name)
        warnings.warn(
            f"rnnkernels: the cell {find(name)} runs on the slow reference: {reason}",
            stacklevel=users_level(),
        )


def forget() -> None:
    """What was found of all cells, for tests: what is loaded stays so."""
    _found.clear()
    _came.clear()
    _told.clear()


def find_compiler(backend: str = "cpu") -> list[str] | None:
    """The compiler's command: for the CPU that of the environment variable CXX, where it names
    one; for GPUs nvcc."""
    if backend == "cuda":
        home = os.environ.get("CUDA_HOME")
        folders = [os.path.join(home, "bin")] if home else []
        folders += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
        nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
        return [nvcc] if nvcc else None
    asked = os.environ.get("CXX")
    for command in [shlex.split(asked)] if asked else (["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return command
    return None


def no_compiler(backend: str = "cpu") -> str:
    if backend == "cuda":
        return (
            "no nvcc was found to compile its kernels with (in CUDA_HOME/bin, PATH, "
            "/usr/local/cuda/bin). Install the CUDA toolkit"
        )
    asked = os.environ.get("CXX")
    looked = f"CXX={asked}" if asked else "c++, g++, clang++ on PATH"
    return f"no C++ compiler was found to compile its kernels with ({looked}). Install one"


def no_sources() -> str:
    return f"the C++ sources that it is compiled with are missing from {PACKAGE}"


def gpus() -> str:
    """What kernels are compiled for, of the GPUs that are here."""
    every = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return " ".join(f"sm_{major}{minor}" for major, minor in sorted(set(every)))


@remembered
def _version(command: tuple[str, ...]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    return done.stdout


@remembered
def _digest(csrc: Path, backend: str) -> str:
    return headers.digest(csrc, backend)


def _prepare(cell: DefinedCell, dtype: torch.dtype, backend: str) -> str:
    if _ops.missing is not None:
        return f"the compiled part, which its kernels go with, is missing ({_ops.missing})"
    build = _ops.build_info()
    digest = build["headers" if backend == "cpu" else "cuda_headers"]
    type = TYPES[dtype]
    made_for = target(build["cpu_capability"], type) if backend == "cpu" else gpus()
    library = Library(cell, type, made_for, digest, backend)
    if _loads(library, shipped(library)):
        _came.add((cell.name, dtype, backend))
        return ""
    csrc = headers.folder(PACKAGE)
    if csrc is None:
        return no_sources()
    if _digest(csrc, backend) != digest:
        return f"the C++ sources in {csrc} are others than this build's. Build rnnkernels again"
    compiler = find_compiler(backend)
    if compiler is None:
        return no_compiler(backend)
    if not made_for:
        return "there is no GPU here to compile its kernels for"
    try:
        return _load(library, csrc, compiler)
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "")
        return f"{shlex.join(compiler)} did not compile its kernels ({first or error})"
    except (OSError, RuntimeError) as error:
        return (
            f"its kernels could not be compiled and kept in the cache folder ({error}). "
            "XDG_CACHE_HOME names another folder for it"
        )


class Library(NamedTuple):
    """What a cell is compiled to."""

    cell: DefinedCell
    type: str  # in C++
    target: str  # the instruction set, or architectures of GPUs
    digest: str  # of the sources
    backend: str = "cpu"

    def file(self, *others: str) -> str:
        """A name for it, by its content and what else it depends on."""
        parts = (self.cell.cpp, self.type, self.target, self.digest, self.backend, *others)
        key = sha256("\0".join(parts).encode()).hexdigest()[:16]
        return f"{self.cell.name}-{self.type.lower()}-{key}.so"


def target(capability: str, type: str) -> str:
    """The instruction set of the kernels for a type, where those in use have this name."""
    return capability if type == "BFloat16" else REST.get(capability, capability)


def shipped(library: Library) -> Path:
    """Where it lies if it came with the package, whatever compiled it."""
    return SHIPPED / library.file()


def _loads(library: Library, path: Path) -> bool:
    """Whether it is there, whole, and loaded now."""
    return _is_whole(path) and not _ops.load_cell(library.cell.name, str(path), library.backend)


def _load(library: Library, csrc: Path, compiler: list[str]) -> str:
    """Loads a cell's library from the cache, where it is put if it is not there."""
    cell = library.cell
    flags = FLAGS if library.backend == "cpu" else NVCC_FLAGS
    file = library.file(*compiler, _version(tuple(compiler)), *flags, torch.__version__)
    path = cache.folder() / "cells" / file
    if _loads(library, path):
        return ""
    path.parent.mkdir(parents=True, exist_ok=True)
    with cache.turn(path, PATIENCE):
        if _loads(library, path):
            return ""  # another process has made it
        begin = time.perf_counter()
        compile(library, csrc, compiler, path)
        seconds = time.perf_counter() - begin
        print(
            f"rnnkernels: compiled the cell {cell.title} ({cell.name}) for {library.type} on "
            f"{library.target} in {seconds:.1f} s, once for this machine: {path}",
            file=sys.stderr,
            flush=True,
        )
    return _ops.load_cell(cell.name, str(path), library.backend)


def _is_whole(path: Path) -> bool:
    """Whether a library is there as it was written: loading a part of one ends the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    end = sha256().digest_size
    return content[-end:] == sha256(content[:-end]).digest()


def compile(library: Library, csrc: Path, compiler: list[str], path: Path) -> None:
    """Makes the library at `path`.

    Raises:
        CalledProcessError: the compiler failed.
        OSError: a file could not be written.
    """
    with tempfile.TemporaryDirectory(prefix=library.cell.name, dir=path.parent) as folder:
        (header := Path(folder, "cell.h")).write_text(library.cell.cpp, encoding="utf-8")
        made = Path(folder, "made.so")
        command = _nvcc if library.backend == "cuda" else _cxx
        command_line = [*compiler, *command(library, csrc, header), "-o", str(made)]
        subprocess.run(command_line, check=True, capture_output=True, text=True)
        content = made.read_bytes()
        made.write_bytes(content + sha256(content).digest())  # loaders take no notice of an end
        os.replace(made, path)  # at once: nobody loads half of it


def _cxx(library: Library, csrc: Path, header: Path) -> list[str]:
    """What the CPU's compiler is told but for its output."""
    macros = {
        "CELL": f'"{header}"',
        "CELL_TYPE": library.type,
        "CELL_HEADERS": f'"{library.digest}"',
        "CELL_KERNELS": f'"{library.target}"',
    }
    said = [*FLAGS, f"-I{csrc}", *(f"-DRNN_{name}={value}" for name, value in macros.items())]
    return [*said, "-shared", str(csrc / "cpu" / f"kernels_{library.target}.cpp")]


def _nvcc(library: Library, csrc: Path, header: Path) -> list[str]:
    """The same of nvcc. It is handed quotes in a file: it has a shell between it and others."""
    macros = {
        "CELL": f'"{header}"',
        "CELL_TYPE": library.type,
        "CELL_HEADERS": f'"{library.digest}"',
        "CELL_TARGET": f'"{library.target}"',
    }
    lines = [f"#define RNN_{name} {value}" for name, value in macros.items()]
    source = header.with_name("cell.cu")
    source.write_text("\n".join([*lines, '#include "cuda/user_cell.inc"', ""]), encoding="utf-8")
    codes = [
        f"-gencode=arch=compute_{number},code=sm_{number}"
        for number in library.target.replace("sm_", "").split()
    ]
    return [*NVCC_FLAGS, *codes, f"-I{csrc}", str(source)]


def _prepare_for(backend: str) -> None:
    """The ops ask for what no call before has asked for."""
    _ops.set_cell_compiler(
        lambda name, type: prepare(name, getattr(torch, type), backend) or "", backend
    )


if _ops.missing is None:
    for each in headers.PATTERNS:
        _prepare_for(each)
