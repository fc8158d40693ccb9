"""The libraries, each resting on the one before: sources, flags and where they lie.

The kernels know neither torch nor Python, and one library of them serves all. A binding is what
belongs to one minor version of torch: the ops, without Python, and the Python module.
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from build_support import settings
from build_support.choice import cuda_toolkit
from build_support.plan import Plan
from build_support.processor import without
from build_support.torches import Torch

#: What a cell that a user writes is compiled from.
HEADERS: dict[str, Any] = runpy.run_path(
    str(Path(__file__).parents[1] / "rnnkernels" / "_backends" / "headers.py")
)
#: Names of files and folders, which rnnkernels/_ops/binding.py looks for.
NAMES: dict[str, Any] = runpy.run_path(
    str(Path(__file__).parents[1] / "rnnkernels" / "_ops" / "binding_names.py")
)
KERNELS, OPS = NAMES["KERNELS"], NAMES["OPS"]
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
#: What nvcc makes, in the folder of the build.
CUDA_OBJECTS = Path("kernels", "cuda")
#: What registers the kernels of a backend, beside them: of the ops, not of the kernels.
KNOW_TORCH = ("packs.cpp", "products.cpp", "register.cpp", "single.cpp", "tangents.cpp")


def build_folder() -> Path:
    """Objects, in a folder for the kernels and one for each torch; relative to the sources, since
    the compiler's output may hold the path it was given."""
    return Path("build", settings.FOLDER)


def sources(pattern: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc").glob(pattern))


def in_one(folder: Path, name: str, files: list[str]) -> list[str]:
    """One file that includes the others: most of the time goes to what torch's headers have every
    file compile again."""
    lines = [f'#include "{os.path.relpath(file, "csrc")}"\n' for file in files]
    return written(folder, f"{name}.cpp", "".join(lines))


def written(folder: Path, name: str, text: str) -> list[str]:
    """A file of this text in a folder of the build."""
    path = folder / name
    # One that has not changed is left as it is: ninja would compile it again.
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [str(path)]


@dataclass
class Library:
    """What one is compiled and linked from."""

    file: Path  # in the folder of the build
    sources: list[str]
    macros: list[str] = field(default_factory=list)
    includes: list[Path] = field(default_factory=list)  # of others: no warnings about them
    links: list[str] = field(default_factory=list)
    rests_on: list[Library] = field(default_factory=list)
    cuda: list[str] = field(default_factory=list)  # sources for nvcc
    flags: list[str] = field(default_factory=list)  # of the compiler, beside those of all

    def compiler(self) -> list[str]:
        """The command, up to its input."""
        cache = ["ccache"] if shutil.which("ccache") else []
        flags = ["-std=c++20", "-O3", "-fopenmp", "-ffp-contract=fast", "-Wall", "-fPIC"]
        # Vectors pass between inlined functions only: their calling convention concerns nobody.
        flags.append("-Wno-psabi")
        # Torch's headers turn this one off where they need to, which a precompiled header forgets.
        flags.append("-Wno-sign-compare")
        flags.append("-DNDEBUG")  # as torch was compiled, whose headers depend on it
        # Optimizing what is instrumented takes longer than the tests save by it; with -fwrapv an
        # overflow of signed integers would be no finding.
        flags += [*instrument(), "-O0"] if settings.SANITIZE else ["-fwrapv"]
        flags += [f"-D{macro}" for macro in self.macros]
        includes = [f"-isystem{folder}" for folder in self.includes]
        return [
            *cache,
            *settings.CXX,
            *flags,
            "-Icsrc",
            *includes,
            *self.flags,
            *from_environment("CXXFLAGS"),
        ]

    def linker(self) -> list[str]:
        flags = ["-shared", "-fopenmp", f"-Wl,-soname,{self.file.name}"]
        if settings.SANITIZE:
            flags += instrument()
        flags += from_environment("LDFLAGS")
        return [*settings.CXX, *flags]


def from_environment(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def instrument() -> list[str]:
    # -g1 is enough for a report to name lines; with -g the kernels take minutes longer.
    return [f"-fsanitize={settings.SANITIZE}", "-fno-omit-frame-pointer", "-g1"]


def macros() -> list[str]:
    """What all libraries are told of what is built."""
    found = [f"RNNKERNELS_WITHOUT_{name.upper()}" for name in without()]
    if toolkit := cuda_toolkit():
        found += ["RNNKERNELS_CUDA", f'RNNKERNELS_CUDA_ARCHS="{";".join(toolkit.archs)}"']
    return found


def kernels() -> Library:
    folder = build_folder() / "kernels"
    files = [path for path in sources("cpu/*.cpp") if Path(path).name not in KNOW_TORCH]
    # These need no CUDA, and answer anywhere.
    files += ["csrc/cuda/plan.cpp", "csrc/cuda/loaded_cells.cpp"]
    left_out = without()
    files = [path for path in files if Path(path).stem.removeprefix("kernels_") not in left_out]
    files += written(
        folder,
        "headers_digest.cpp",
        "".join(
            f'#include "{backend}/cell_libraries.h"\n'
            f"const char* const rnn::{backend}::kHeadersDigest = "
            f'"{HEADERS["digest"](Path("csrc"), backend)}";\n'
            for backend in HEADERS["PATTERNS"]
        ),
    )
    library = Library(folder / KERNELS, files, macros())
    # How a loop lies in memory is 2 % of its time: a change elsewhere is not to move it.
    library.flags += ["-falign-functions=64", "-falign-loops=64"]
    library.links.append("-ldl")  # a part of the C library itself since glibc 2.34
    if toolkit := cuda_toolkit():
        library.cuda = sources("cuda/*.cu")
        library.includes.append(toolkit.include.parent)
        # A CUDA build of torch loads its own libcudart for the whole process; were ours visible
        # too, its functions would be bound to torch's, which may be of another version.
        library.links += [str(toolkit.cudart), "-Wl,--exclude-libs,libcudart_static.a"]
        library.links += ["-lrt", "-lpthread"]
    return library


def binding(torch: Torch, below: Library) -> list[Library]:
    """The ops and the Python module for this torch."""
    folder = build_folder() / f"torch{torch.version}"
    includes = torch.includes()
    if toolkit := cuda_toolkit():
        includes.append(toolkit.include.parent)
    # Torch's headers then declare those of its operations that a file names, in half the time.
    said = ["AT_PER_OPERATOR_HEADERS", *macros()]
    files = [*sources("ops/*.cpp"), *sources("autograd/*.cpp")]
    files += [f"csrc/cpu/{name}" for name in KNOW_TORCH]
    if cuda_toolkit():
        files.append("csrc/cuda/register.cpp")
    links = [f"-L{torch.libraries}", "-lc10", "-ltorch_cpu"]
    ops = Library(
        folder / OPS, in_one(folder, "ops", files), said, includes, links, rests_on=[below]
    )
    module = Library(
        folder / sys.implementation.cache_tag / MODULE,
        in_one(folder, "module", sources("python/*.cpp")),
        said,
        [*includes, Path(sysconfig.get_path("include"))],
        [*links, "-ltorch_python"],
        rests_on=[ops, below],
    )
    return [ops, module]


def in_package(library: Path, torch: Torch | None) -> Path:
    """Where a library lies in the package, relative to it."""
    return Path(NAMES["folder"](torch.minor), library.name) if torch else Path(library.name)


def record(torch: Torch) -> str:
    """What a binding notes of itself, for messages and for the next build."""
    return json.dumps({"torch": torch.version, "sources": digest()}, indent=1) + "\n"


def digest() -> str:
    """Of all sources: a binding of others does not go with the kernels."""
    total = sha256()
    for path in sorted(path for path in Path("csrc").rglob("*") if path.is_file()):
        total.update(f"{path.as_posix()}\0".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def build(torches: tuple[Torch, ...]) -> Iterator[tuple[Path, Path]]:
    """Compiles and links what is out of date.

    Yields:
        each file, and where it belongs in the package.
    """
    plan = Plan(build_folder())
    below = kernels()
    # What takes longest first.
    if toolkit := cuda_toolkit():
        plan.rule("cuda", [toolkit.nvcc, *toolkit.flags()])
    objects = compile_kernels(plan, below)
    bindings = {torch: binding(torch, below) for torch in torches}
    made: list[tuple[Library, list[str], Torch | None]] = [(below, objects, None)]
    for torch, libraries in bindings.items():
        precompiled = precompile(plan, libraries[0])
        for library in libraries:
            made.append((library, compile_binding(plan, library, precompiled), torch))
    for library, objects, of in made:
        link(plan, library, objects, of)
    plan.run()
    for library, _, of in made:
        yield library.file, in_package(library.file, of)
    for torch, (ops, _) in bindings.items():
        (path,) = written(ops.file.parent, NAMES["RECORD"], record(torch))
        yield Path(path), in_package(Path(path), torch)


def build_kernels() -> Path:
    """The kernels alone, which takes no torch; returns where the library is."""
    plan, library = Plan(build_folder()), kernels()
    if toolkit := cuda_toolkit():
        plan.rule("cuda", [toolkit.nvcc, *toolkit.flags()])
    link(plan, library, compile_kernels(plan, library), None)
    plan.run()
    return library.file


def compile_kernels(plan: Plan, library: Library) -> list[str]:
    plan.rule("kernels", library.compiler())
    made = {source: build_folder() / cuda_object(Path(source)) for source in library.cuda}
    for source, path in made.items():
        plan.add("cuda", path, source)
    for source in library.sources:
        made[source] = library.file.parent / f"{Path(source).stem}.o"
        plan.add("kernels", made[source], source)
    return [str(path) for path in made.values()]


def cuda_object(source: Path) -> Path:
    """What is made of a file in csrc/cuda, in the folder of the build."""
    return CUDA_OBJECTS / f"{source.name}.o"


def rule_of(library: Library) -> str:
    """Letters alone, as ninja has them."""
    return "".join(c if c.isalnum() else "_" for c in str(library.file))


def precompile(plan: Plan, ops: Library) -> Path | None:
    """A header whose precompiled form has torch's headers, which g++ then parses but once."""
    if not settings.is_gcc():
        return None
    header = Path("csrc/ops/torch_headers.h")
    (copy,) = written(ops.file.parent / "headers", header.name, f'#include "ops/{header.name}"\n')
    plan.rule(f"headers_{rule_of(ops)}", [*ops.compiler(), "-x", "c++-header"])
    plan.add(f"headers_{rule_of(ops)}", f"{copy}.gch", header)
    return Path(copy)


def compile_binding(plan: Plan, library: Library, precompiled: Path | None) -> list[str]:
    before = ["-include", str(precompiled), "-Winvalid-pch"] if precompiled else []
    plan.rule(rule_of(library), [*library.compiler(), *before])
    objects = []
    for source in library.sources:
        objects.append(str(library.file.parent / f"{Path(source).stem}.o"))
        needs = f"{precompiled}.gch" if precompiled else ""
        plan.add(rule_of(library), objects[-1], source, needs=needs)
    return objects


def link(plan: Plan, library: Library, objects: list[str], torch: Torch | None) -> None:
    # Each finds those below by where they lie beside it, wherever the package is.
    here = in_package(library.file, torch).parent
    runpaths, below = [], []
    for other in library.rests_on:
        place = in_package(other.file, torch if other.rests_on else None)
        runpaths.append(os.path.relpath(Path("$ORIGIN", place.parent), Path("$ORIGIN", here)))
        below += [f"-L{other.file.parent}", f"-l:{other.file.name}"]
    paths = ["$ORIGIN" if path == "." else f"$ORIGIN/{path}" for path in dict.fromkeys(runpaths)]
    rpath = [f"-Wl,-rpath,{':'.join(paths)}"] if paths else []
    plan.link_rule(f"link_{rule_of(library)}", [*library.linker(), *rpath])
    plan.add(
        f"link_{rule_of(library)}",
        library.file,
        objects,
        needs=" ".join(str(other.file) for other in library.rests_on),
        libs=[*below, *library.links],
    )
