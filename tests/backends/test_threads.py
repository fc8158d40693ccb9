"""Threads and processes around the CPU kernels: callers at once, OpenMP, forks, the interpreter.

Each program of thread_programs.py runs in a process of its own, so that a hang is a failure.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import thread_programs
from helpers import require_backend, run_python

PROGRAMS = [
    thread_programs.one_module_in_many_threads,
    thread_programs.changing_numbers_of_threads,
    thread_programs.number_of_threads_is_obeyed,
    thread_programs.cores_are_shared,
    thread_programs.an_error_gives_its_threads_back,
    thread_programs.child_of_a_fork,
    thread_programs.workers_of_a_data_loader,
    thread_programs.the_interpreter_is_free_meanwhile,
]


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_threads(program: object) -> None:
    require_backend("cpu")
    name = program.__name__  # type: ignore[attr-defined]
    result = run_python(str(Path(thread_programs.__file__)), name)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "done\n"
