"""The threads of the CPU kernels under ThreadSanitizer: ``make sanitize-threads``.

What is watched is a program of its own (thread_team/team.cpp), linked with the kernels and nothing
else: torch and Python are not compiled for the sanitizer, which would not see what orders their
threads.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import building
from build_support import processor

pytestmark = pytest.mark.skipif(
    os.environ.get("RNNKERNELS_SANITIZE") != "thread", reason="runs by make sanitize-threads"
)

KERNELS = ["kernels", "digest_keys", "thread_budget", "contention"]
FLAGS = ["-std=c++20", "-O1", "-g1", "-fopenmp", "-ffp-contract=fast", "-fsanitize=thread"]
FLAGS += ["-Wall", "-Wno-psabi", "-Icsrc"]
#: Addresses that are drawn over all of memory are more than some versions of the sanitizer know.
FIXED_ADDRESSES = ["setarch", "-R"] if shutil.which("setarch") else []


def compile_team(folder: Path) -> Path:
    # Of the instruction sets the widest; kernels for bfloat16 have the same threads.
    left_out = list(dict.fromkeys([*processor.without(), *processor.FOR_BFLOAT16]))
    levels = [name for name in ("default", *processor.LEVELS) if name not in left_out]
    sources = [f"csrc/cpu/{name}.cpp" for name in (*KERNELS, *(f"kernels_{x}" for x in levels))]
    macros = [f"-DRNNKERNELS_WITHOUT_{name.upper()}" for name in left_out]
    cxx = shlex.split(os.environ.get("CXX") or "c++")
    team = "tests/backends/thread_team/team.cpp"
    program = folder / "team"
    command = [*cxx, *FLAGS, *macros, team, *sources, "-o", str(program)]
    done = subprocess.run(command, cwd=building.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def test_no_race_and_the_same_bits() -> None:
    with building.folder("thread-team") as folder:
        program = compile_team(folder)
        done = subprocess.run(
            [*FIXED_ADDRESSES, str(program)],
            env={**os.environ, "TSAN_OPTIONS": "exitcode=66"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "done\n"
