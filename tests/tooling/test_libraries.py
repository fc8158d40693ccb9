"""What the three compiled libraries rest on."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import rnnkernels
from rnnkernels import _ops

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)
if shutil.which("readelf") is None or shutil.which("nm") is None:
    pytest.skip("needs readelf and nm (binutils)", allow_module_level=True)

FOLDER = Path(rnnkernels.__file__).parent
OPS = rnnkernels.library_path().relative_to(FOLDER)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def needed(library: str | Path) -> list[str]:
    lines = output("readelf", "-d", str(FOLDER / library))
    return re.findall(r"\(NEEDED\).*\[(.+)\]", lines)


def undefined(library: str | Path) -> str:
    return output("nm", "-D", "-C", "--undefined-only", str(FOLDER / library))


def test_kernels_know_neither_torch_nor_python() -> None:
    names = needed("librnnkernels_kernels.so")
    assert names and not [n for n in names if re.search("torch|c10|python", n)]
    found = undefined("librnnkernels_kernels.so")
    assert found and not re.findall(r"\b(?:at|c10|torch)::|\bPy[A-Z_]", found)


def test_ops_know_no_python() -> None:
    names = needed(OPS)
    assert "librnnkernels_kernels.so" in names and "libtorch_cpu.so" in names
    assert not [n for n in names if re.search("python|rnnkernels.so", n)]
    found = undefined(OPS)
    assert "c10::" in found and not re.findall(r"\bTHP|\bPy[A-Z_]", found)


def test_each_finds_those_below_beside_itself() -> None:
    """Wherever the package is put."""
    for path in (FOLDER / OPS).parent.glob("*.so"):
        (found,) = re.findall(r"RUNPATH.*\[(.+)\]", output("readelf", "-d", str(path)))
        places = {path.parent / place.replace("$ORIGIN", ".") for place in found.split(":")}
        ours = [name for name in needed(path) if name.startswith("librnnkernels")]
        assert ours and all(any((p / name).exists() for p in places) for name in ours), path
