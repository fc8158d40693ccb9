"""Kernels of cells that come compiled with the package: found without a compiler, or passed
over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

import rnnkernels
from rnnkernels import _ops
from rnnkernels._backends import user_cells
from rnnkernels.cells import DefinedCell, define, zoned_out
from rnnkernels.cells.statements import STATEMENTS
from rnnkernels.diagnostics import _report
from rnnkernels.functional._noise import cell_of
from rnnkernels.nn import shipped

pytest.importorskip("rnnkernels._C", reason="needs the compiled extension")

X = torch.ones(3, 2, 4)


@rnnkernels.cell
def carried(a: Any, *, h: Any) -> Any:
    return torch.tanh(a) + 0.25 * h


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package's folder with kernels of one cell, as setup.py has them compiled."""
    folder = tmp_path_factory.mktemp("package") / "_cells"
    target = user_cells.target(_ops.build_info()["cpu_capability"], "float")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "cells", lambda: [carried])
        assert shipped.main([str(folder), "float32", target]) == 0
    yield folder


@pytest.fixture(autouse=True)
def without_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nor anything that an earlier process has compiled; yields the package's folder."""
    folder = tmp_path / "_cells"
    folder.mkdir()
    monkeypatch.setattr(user_cells, "SHIPPED", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    user_cells.forget()
    yield folder
    user_cells.forget()


def explained(cell: DefinedCell = carried, dtype: torch.dtype = torch.float32) -> Any:
    module = rnnkernels.layer(cell)(4, 5, dtype=dtype)
    (choice,) = rnnkernels.explain(module, X.to(dtype)).choices
    return choice


def put(made: Path, folder: Path, old: bytes = b"", new: bytes = b"", cut: int = 0) -> None:
    """The library, with a text in it that is another, or without its last bytes."""
    (library,) = made.iterdir()
    content = library.read_bytes()[: -sha256().digest_size]
    if old:
        assert old in content and len(old) == len(new)
        content = content.replace(old, new)
    whole = content + sha256(content).digest()
    (folder / library.name).write_bytes(whole[: len(whole) - cut])


def test_found_without_a_compiler(
    made: Path, without_compiler: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(made, without_compiler)
    choice = explained()
    assert choice.backend == "cpu"
    assert "came compiled with the package" in choice.detail
    layer = rnnkernels.layer(carried)(4, 5)
    y = layer(X)[0]
    with rnnkernels.use_backend("reference"):
        torch.testing.assert_close(y, layer(X)[0])
    assert not (tmp_path / "cache").exists()
    assert capfd.readouterr().err == ""
    assert explained(dtype=torch.float64).backend == "reference"  # which did not come


@pytest.mark.parametrize("what", ["headers", "instructions", "damaged"])
def test_passed_over(made: Path, without_compiler: Path, what: str) -> None:
    """What was made of other sources, for another processor, or is no whole library; then the
    ordinary way follows, which here finds no compiler."""
    target = user_cells.target(_ops.build_info()["cpu_capability"], "float").encode()
    if what == "headers":
        put(made, without_compiler, _ops.build_info()["headers"].encode(), b"0123456789abcdef")
    elif what == "instructions":
        put(made, without_compiler, b"\0" + target + b"\0", b"\0" + b"x" * len(target) + b"\0")
    else:
        put(made, without_compiler, cut=1)
    choice = explained()
    assert choice.backend == "reference"
    assert "no C++ compiler was found" in choice.refusals["cpu"]


def test_found_by_all_that_it_depends_on() -> None:
    """But for the compiler, which is another's."""
    library = user_cells.Library(carried, "float", "avx2", "digest")
    others = {"type": "double", "target": "avx512", "digest": "other", "backend": "cuda"}
    changed = [library._replace(**{name: value}) for name, value in others.items()]
    changed.append(library._replace(cell=replace(carried, cpp=carried.cpp + "\n")))
    assert len({user_cells.shipped(each) for each in (library, *changed)}) == 6


def test_the_same_bits(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Wherever it is compiled: wheels are compared."""
    monkeypatch.undo()  # a compiler is there
    (first,) = made.iterdir()
    again = tmp_path_factory.mktemp("somewhere-else")
    monkeypatch.setattr(shipped, "cells", lambda: [carried])
    target = user_cells.target(_ops.build_info()["cpu_capability"], "float")
    assert shipped.main([str(again), "float32", target]) == 0
    (second,) = again.iterdir()
    assert (second.name, second.read_bytes()) == (first.name, first.read_bytes())


def test_which_cells() -> None:
    """All that the package has written by itself, with zoneout of any states of torch.nn's."""
    names = {cell.name for cell in shipped.cells()}
    assert len(names) == 12
    gated = ("MGU", "CIFG", "PeepholeLSTM", "IndRNN", "SLSTM")
    assert {getattr(rnnkernels, name).definition.name for name in gated} <= names
    for cell, zoned in (
        ("rnn_tanh", [True]), ("rnn_relu", [True]), ("rnn_sigmoid", [True]), ("gru", [True]),
        ("lstm", [True, True]), ("lstm", [False, True]), ("lstm", [True, False]),
    ):  # fmt: skip
        assert cell_of(cell, tuple(zoned)) in names
        # As where it is the first, or the only one, that a process makes.
        assert zoned_out(define(STATEMENTS[cell]), tuple(zoned)).name in names


def test_which_libraries() -> None:
    """Instruction sets that are for bfloat16 alone have no others."""
    every = ["default", "avx2", "avx512", "amx", "avx512_bf16"]
    found = shipped.libraries(["float32", "bfloat16"], every, "digest")
    assert {each.target for each in found if each.type == "float"} == set(every[:3])
    assert {each.target for each in found if each.type == "BFloat16"} == set(every)
    assert len(found) == 12 * (3 + 5) == len({each.file() for each in found})


def test_what_is_here(made: Path, without_compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "cells", lambda: [carried])
    assert _report._build()["cells in the package"] == "compiled on first use, as others"
    put(made, without_compiler)
    assert _report._build()["cells in the package"] == "float32"


def test_nothing_to_compile_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shipped.main([str(tmp_path / "out"), "float32", "default"]) == 1
    assert "no C++ compiler was found" in capsys.readouterr().err
