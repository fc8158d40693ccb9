"""The commands of setuptools that build and place the compiled part."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

from build_support import cells, libraries, sbom, settings
from build_support.choice import choice, cuda_toolkit, minutes
from build_support.settings import fail
from build_support.torches import torches

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before version 70.1
    from wheel.bdist_wheel import bdist_wheel

PACKAGE = "rnnkernels"


class BuildPy(build_py):
    """Puts the sources of cells into the package, where it is not used in place."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for path in libraries.HEADERS["files"](Path("csrc")):
            to = Path(self.build_lib, PACKAGE, libraries.HEADERS["INSTALLED"], path)
            to.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(Path("csrc", path)), str(to))


class BuildExt(build_ext):
    """Has one plan build all libraries, and places them."""

    def run(self) -> None:
        check()
        chosen = torches()
        print(f"rnnkernels: building {line()}", file=sys.stderr, flush=True)
        package = self.package_folder()
        for built, place in libraries.build(chosen):
            put(built, package / place)
        if self.inplace:
            clear(package)
        else:  # a wheel has what this build is for, whatever lies there from another
            clear(package, {torch.minor for torch in chosen})
        if cells.types(settings.CELLS):
            if not self.inplace:
                self.run_command("build_py")  # they are derived by the package as it is installed
            cells.build(package.parent.resolve(), package.resolve() / cells.FOLDER)

    def package_folder(self) -> Path:
        return Path(PACKAGE) if self.inplace else Path(self.build_lib, PACKAGE)

    def get_outputs(self) -> list[str]:
        """What an installation notes down as its own."""
        package = self.package_folder()
        found = [*package.glob("*.so"), *package.glob(f"{libraries.NAMES['BINDINGS']}/*/*")]
        found += package.glob(f"{cells.FOLDER}/*.so")
        return sorted(map(str, found))

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """Puts a bill of materials into it."""

    def write_wheelfile(self, wheelfile_base: str, *args: Any, **options: Any) -> None:
        super().write_wheelfile(wheelfile_base, *args, **options)
        version = self.distribution.get_version()
        compiled = settings.EXTENSION
        text = sbom.describe(version, *(torches(), cuda_toolkit()) if compiled else ((), None))
        sbom.write(Path(wheelfile_base), text)


def line() -> str:
    """What is built, and how long that takes."""
    if not settings.EXTENSION:
        return choice().line
    chosen = torches()
    versions = " and ".join(torch.version for torch in chosen)
    took = f"about {minutes(len(chosen))} min where nothing was built before"
    return f"{choice().line}; for torch {versions}; {took}"


def check() -> None:
    """Ends the build where something is missing, and says what to do."""
    if settings.find_cxx() is None:
        fail(
            f"no C++ compiler was found ({settings.CXX[0]}). Install one (Debian, Ubuntu: apt "
            "install g++; Fedora: dnf install gcc-c++) or name one by CXX. RNNKERNELS_EXTENSION=0 "
            "installs the Python package alone, which runs on torch.nn's kernels"
        )
    if importlib.util.find_spec("ninja") is None:
        fail("building needs ninja: 'pip install setuptools wheel ninja', then the same again")
    cells.check()


def put(built: Path, to: Path) -> None:
    """In one step: a process may have the file that is there mapped into its memory."""
    to.parent.mkdir(parents=True, exist_ok=True)
    new = to.with_name(f"{to.name}.new")
    shutil.copy2(built, new)
    os.replace(new, to)


def clear(package: Path, minors: set[str] | None = None) -> None:
    """Takes away what earlier builds have left: of other sources, or of other versions of torch
    than these; and kernels of cells, which each build that is asked to compiles anew."""
    shutil.rmtree(package / cells.FOLDER, ignore_errors=True)
    for path in (package / libraries.OPS, *package.glob("_C.*.so")):
        path.unlink(missing_ok=True)
    for record in package.glob(f"{libraries.NAMES['BINDINGS']}/*/{libraries.NAMES['RECORD']}"):
        built = json.loads(record.read_text())
        minor = ".".join(built["torch"].split(".")[:2])
        if built["sources"] != libraries.digest() or (minors is not None and minor not in minors):
            shutil.rmtree(record.parent)
