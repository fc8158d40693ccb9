"""The library of the kernels is of use by itself: a C++ program has layers of it, without torch and
Python. ``make test-aarch64`` has the same program on another processor."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess

import pytest

import building
from rnnkernels import _ops
from rnnkernels._ops.binding_names import KERNELS

SOURCE = building.ROOT / "tests/tooling/kernels_alone/program.cpp"
CXX = shlex.split(os.environ.get("CXX") or "c++")

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)
if shutil.which(CXX[0]) is None:
    pytest.skip(f"no C++ compiler: {CXX[0]}", allow_module_level=True)


def test_layers_of_the_kernels_alone() -> None:
    headers = building.contents("csrc/common", "csrc/cpu")
    with building.folder("kernels_alone", SOURCE.read_text(), headers) as folder:
        path = folder / "program"
        flags = ["-std=c++20", "-O1", "-Icsrc"]
        links = [f"-L{building.PACKAGE}", f"-l:{KERNELS}", f"-Wl,-rpath,{building.PACKAGE}"]
        if not path.exists():
            made = folder / "new"
            command = [*CXX, *flags, str(SOURCE), "-o", str(made), *links]
            subprocess.run(command, cwd=building.ROOT, check=True)
            made.rename(path)
        done = subprocess.run([path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" bytes: ") == 6 and done.stdout.endswith("all right\n")
