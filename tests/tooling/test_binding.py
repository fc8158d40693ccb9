"""Which compiled part is taken for the torch and the Python of a process, and what is said where
none is."""

from __future__ import annotations

import _ctypes
import importlib.machinery
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rnnkernels
from rnnkernels._ops import binding
from rnnkernels._ops.binding_names import BINDINGS, KERNELS, OPS, RECORD

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
MODULE = f"_C{SUFFIX}"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One for torch 2.13 and 2.14 whose files are empty; it is the one that is looked into."""
    folder = tmp_path / "lib/rnnkernels"
    for minor in ("2.13", "2.14"):
        here = folder / BINDINGS / f"torch{minor}"
        here.mkdir(parents=True)
        for name in (OPS, MODULE):
            (here / name).touch()
        (here / RECORD).write_text(json.dumps({"torch": f"{minor}.5+cpu"}))
    (folder / KERNELS).touch()
    monkeypatch.setattr(binding, "PACKAGE", folder)
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    monkeypatch.delitem(sys.modules, "rnnkernels._C", raising=False)
    monkeypatch.setattr(rnnkernels, "_C", None, raising=False)  # an import leaves it there, too
    return folder


def message() -> str:
    before = list(rnnkernels.__path__)
    with pytest.raises(binding.Missing) as caught:
        binding.load()
    assert list(rnnkernels.__path__) == before
    return str(caught.value)


def test_the_binding_of_this_torch(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rest of its version says; what Python finds in its folder is loaded."""
    for version, minor in (("2.13.1", "2.13"), ("2.14.0a0+git5", "2.14"), ("2.14.1", "2.14")):
        monkeypatch.setattr(torch, "__version__", version)
        assert binding.place() == package / BINDINGS / f"torch{minor}"
    (binding.place() / MODULE).unlink()
    monkeypatch.setattr(importlib.machinery, "EXTENSION_SUFFIXES", [".py"])
    (binding.place() / "_C.py").write_text("here = __file__")
    monkeypatch.setattr(rnnkernels, "__path__", list(rnnkernels.__path__))
    assert binding.load().here == str(binding.place() / "_C.py")


def test_another_torch(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of another is tried: it might load, and crash."""
    for minor in ("2.9", "2.11"):
        (package / BINDINGS / f"torch{minor}").mkdir()
        (package / BINDINGS / f"torch{minor}" / OPS).touch()
    monkeypatch.setattr(torch, "__version__", "2.15.0")
    found = message()
    assert found.startswith("built for torch 2.9, 2.11, 2.13 and 2.14, running torch 2.15.0. ")
    assert "--no-build-isolation" in found


def test_another_python(package: Path) -> None:
    for name in ("_C.cpython-39-x86_64-linux-gnu.so", "_C.cpython-310-x86_64-linux-gnu.so"):
        (binding.place() / name).touch()
    (binding.place() / MODULE).unlink()
    found = message()
    tag = sys.implementation.cache_tag
    wanted = (
        f"built for cpython-310-x86_64-linux-gnu and cpython-39-x86_64-linux-gnu, running {tag}."
    )
    assert found.startswith(wanted) and "--no-build-isolation" in found


@pytest.mark.parametrize("name", [KERNELS, OPS])
def test_a_library_that_is_missing(package: Path, name: str) -> None:
    path = package / name if name == KERNELS else binding.place() / name
    path.unlink()
    assert message() == f"{path} is missing. Install rnnkernels again"


def test_a_broken_file(package: Path) -> None:
    """The loader's own words, and what the file was built for."""
    found = message()
    assert re.search(rf"{re.escape(MODULE)}: file too short", found)
    assert (
        "(built for torch 2.14.5+cpu, running torch 2.14.1+cu130). Install rnnkernels again"
        in found
    )
    (binding.place() / RECORD).write_text("{")
    assert "(built for torch 2.14, running" in message()


@pytest.mark.parametrize("name", [KERNELS, OPS, MODULE])
@pytest.mark.parametrize("kept", [0.001, 0.5, 0.999])
def test_a_file_that_was_cut(package: Path, name: str, kept: float) -> None:
    """It is told before it is loaded, which would end the process."""
    path = package / name if name == KERNELS else binding.place() / name
    whole = Path(_ctypes.__file__).read_bytes()
    path.write_bytes(whole)
    assert not binding._is_cut(path)
    path.write_bytes(whole[: int(len(whole) * kept)])
    wanted = f"{path} ends before it should: it was not written whole. Install rnnkernels again"
    assert message() == wanted


def test_a_module_that_is_missing(package: Path) -> None:
    (binding.place() / MODULE).unlink()
    assert message() == f"{binding.place() / MODULE} is missing. Install rnnkernels again"


def test_a_file_that_may_not_be_read(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader says why."""

    def refuse(*_: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "open", refuse)
    assert "file too short" in message()


def remove_all(package: Path) -> None:
    for path in [package / KERNELS, *package.glob(f"{BINDINGS}/*/*")]:
        path.unlink()


def sources_alone(package: Path) -> str:
    (package.parent / "setup.py").touch()
    return f"nothing is built in the sources in {package.parent}, which were imported. Build there"


def sources_before_an_installed_one(package: Path) -> str:
    (package.parent / "setup.py").touch()
    other = package.parents[1] / "site/rnnkernels"
    other.mkdir(parents=True)
    (other / KERNELS).touch()
    sys.path.append(str(other.parent))
    return f"in place of the installed {other}. Start Python in another folder, or with -P"


@pytest.mark.parametrize(
    "prepare",
    [lambda package: "this installation has none", sources_alone, sources_before_an_installed_one],
)
def test_nothing_compiled(
    package: Path, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Path], str]
) -> None:
    remove_all(package)
    monkeypatch.setattr(sys, "path", [str(package.parent)])
    wanted = prepare(package)
    assert wanted in message()


def test_the_library_for_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnnkernels._ops.missing", "gone")
    with pytest.raises(RuntimeError, match="library_path: the compiled part is missing: gone"):
        rnnkernels.library_path()
