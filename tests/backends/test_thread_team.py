"""The threads of the CPU kernels under ThreadSanitizer: ``make sanitize-threads``.

What is watched are programs of their own (in thread_team/), one linked with the kernels, one of the
table of packed weights, and nothing else: torch and Python are not compiled for the sanitizer,
which would not see what orders their threads.
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


def kernels() -> list[str]:
    """What the compiler takes for the kernels: of the instruction sets the widest; kernels for
    bfloat16 have the same threads."""
    left_out = list(dict.fromkeys([*processor.without(), *processor.FOR_BFLOAT16]))
    levels = [name for name in ("default", *processor.LEVELS) if name not in left_out]
    sources = [f"csrc/cpu/{name}.cpp" for name in (*KERNELS, *(f"kernels_{x}" for x in levels))]
    return [*(f"-DRNNKERNELS_WITHOUT_{name.upper()}" for name in left_out), *sources]


def compiled(folder: Path, name: str, more: list[str]) -> Path:
    cxx = shlex.split(os.environ.get("CXX") or "c++")
    command = [*cxx, *FLAGS, f"tests/backends/thread_team/{name}.cpp", *more]
    program = folder / name
    done = subprocess.run(
        [*command, "-o", str(program)], cwd=building.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.parametrize("name", ["team", "packs"])
def test_no_race_and_the_same_results(name: str) -> None:
    with building.folder("thread-team") as folder:
        program = compiled(folder, name, kernels() if name == "team" else [])
        done = subprocess.run(
            [*FIXED_ADDRESSES, str(program)],
            env={**os.environ, "TSAN_OPTIONS": "exitcode=66"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "done\n"
