"""The rooms of the package rest on each other in one order, and what is public is said once."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import rnnkernels
from helpers import run_python

PACKAGE = Path(rnnkernels.__file__).parent
#: From the ground up; a room knows those before it and no other.
ROOMS = (
    "_C", "cells", "_core", "_ops", "_backends", "functional", "nn", "torch_types", "streaming",
    "serving", "interop", "diagnostics", "testing", "rnnkernels", "__main__",
)  # fmt: skip


def room(module: str) -> str:
    """``rnnkernels._core.call`` is in ``_core``; the package itself is the last."""
    return [*module.split("."), "rnnkernels"][1]


def imports(source: Path) -> Iterator[tuple[int, str]]:
    """Lines and modules of the package that a file imports, inside of functions too."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "rnnkernels":
            modules = [f"rnnkernels.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: expected absolute imports"
            modules = [node.module or ""]
        else:
            continue
        yield from ((node.lineno, m) for m in modules if m.split(".")[0] == "rnnkernels")


def test_imports_point_downwards() -> None:
    seen, wrong = 0, []
    for source in PACKAGE.rglob("*.py"):
        path = source.relative_to(PACKAGE.parent).with_suffix("")
        here = room(".".join(path.parts).removesuffix(".__init__"))
        for line, module in imports(source):
            seen += 1
            there = room(module)
            if there != here and ROOMS.index(there) > ROOMS.index(here):
                wrong.append(f"{path}:{line}: {here} imports {module}")
    assert not wrong
    assert seen > 50


def test_every_room_is_known() -> None:
    found = {p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__"}
    found |= {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert found == set(ROOMS) - {"_C", "rnnkernels"}


def test_public_names_are_exported_and_documented() -> None:
    for module in (
        rnnkernels, rnnkernels.functional, rnnkernels.nn, rnnkernels.diagnostics,
        rnnkernels.interop, rnnkernels.torch_types, rnnkernels.streaming, rnnkernels.serving,
        rnnkernels.cells,
    ):  # fmt: skip
        assert module.__doc__
        for name in module.__all__:
            assert getattr(getattr(module, name), "__doc__", None), f"{module.__name__}.{name}"
    top = set(rnnkernels.__all__)
    assert {"LSTM", "convert", "explain"} <= top and len(top) == len(rnnkernels.__all__)


def test_importing_leaves_compilers_out() -> None:
    """torch._dynamo takes more than a second to import, Triton some tenths, for which the counter
    of operations asks, too: torch itself spares its users these."""
    late = {"torch._dynamo", "torch._inductor", "torch.utils.flop_counter", "triton", "matplotlib"}
    code = f"import sys, torch, rnnkernels; print({late} & set(sys.modules))"
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "set()\n"


#: Where the sources are: an installed package is tried without them.
CSRC = PACKAGE.parent / "csrc"


def reached(header: Path, seen: set[Path]) -> set[str]:
    """The headers from outside, ``<...>``, that one of ours includes, itself or by another."""
    found = set[str]()
    if header not in seen:
        seen.add(header)
        text = header.read_text()
        found.update(re.findall(r"#include <(.+)>", text))
        for other in re.findall(r'#include "(.+)"', text):
            beside = header.parent / other
            found |= reached(beside if beside.exists() else CSRC / other, seen)
    return found


@pytest.mark.skipif(not CSRC.is_dir(), reason="the sources are not here")
def test_headers_from_outside_come_before_an_instruction_set() -> None:
    """Else what they define is compiled for it, and the linker may keep that copy for all."""
    ahead = reached(CSRC / "cpu/system_headers.h", set())
    for kernels in ("cpu/kernels.inc", "cpu/user_cell.inc"):
        assert reached(CSRC / kernels, set()) - ahead == set()
    chosen = [path for path in CSRC.glob("cpu/kernels_*.cpp") if "target(" in path.read_text()]
    assert len(chosen) == 4
    for path in chosen:
        text = path.read_text()
        assert "#include" not in text[text.index("target(") : text.index("#define RNN_ISA")]
        assert '#include "cpu/system_headers.h"' in text[: text.index("target(")]
