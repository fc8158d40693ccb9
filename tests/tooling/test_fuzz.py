"""The tool that throws random calls at layers and ops: a slice of its inputs, and how it judges."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

import pytest
import torch

import fuzz
import reliability
from fuzzing.judge import Attempt, difference, judged

COUNT = 400


def test_a_slice_of_inputs() -> None:
    threads, before = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    kinds: dict[str, int] = {}
    try:
        for number in range(COUNT):
            drawn, made, verdict = fuzz.tried(11, number, written=False)
            assert not verdict.finding, (number, made.what, drawn.done, verdict)
            kinds[verdict.kind] = kinds.get(verdict.kind, 0) + 1
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(before)
    assert kinds["compared"] > COUNT / 6 and kinds["refused"] > COUNT / 4


def test_an_input_is_drawn_again_as_it_was() -> None:
    first, again = (fuzz.attempt(3, 5, False) for _ in range(2))
    assert (first[1].what, first[0].done) == (again[1].what, again[0].done)


def raises(error: BaseException) -> Any:
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("hx: expected shape [3]"), "refused"),
        (RuntimeError("expected shape [3]"), "names no argument"),
        (RuntimeError("hx INTERNAL ASSERT FAILED"), "unclear"),
        (TypeError("hx: 'int' object is not iterable"), "unclear"),
        (IndexError("hx: list index out of range"), "unexpected exception"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "memory"),
    ],
)
def test_refusals(error: Exception, kind: str) -> None:
    verdict = judged(Attempt("f", ("hx", "input"), raises(error)))
    assert verdict.kind == kind
    assert verdict.finding == (kind not in ("refused", "memory"))


def test_results() -> None:
    t = torch.ones(3)
    assert judged(Attempt("f", (), lambda: t)).kind == "accepted"
    assert judged(Attempt("f", (), lambda: t, lambda: t + 1e-6)).kind == "compared"
    assert judged(Attempt("f", (), lambda: t, lambda: t + 1)).kind == "wrong numbers"
    broken = judged(Attempt("f", (), lambda: t, raises(KeyError("x"))))
    assert broken.kind == "accepted, but not by the reference"
    assert "float64" in difference(t, t.double())
    assert "2 tensors in place of 1" in difference([t, t], t)
    assert "finite" in difference(t / 0, t)


WORKER = """
import json, os, sys
first, count = int(sys.argv[1]), int(sys.argv[2])
for number in range(first, first + count):
    print(number, flush=True)
    if number == 5:
        os._exit(3)
    print(json.dumps({"number": number, "kind": "refused", "what": "f"}), flush=True)
"""


@pytest.mark.parametrize("jobs", [1, 3])
def test_inputs_of_all_jobs(jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once and in order; one that ends its worker is a finding, and the next goes on."""

    def start(command: list[str], log: Any) -> subprocess.Popen[bytes]:
        first, count = (command[command.index(name) + 1] for name in ("--first", "--count"))
        command = [sys.executable, "-S", "-c", WORKER, first, count]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, bufsize=0)

    monkeypatch.setattr(fuzz, "_start", start)
    args = argparse.Namespace(first=0, count=10, seed=0, jobs=jobs, quick=True, log=None)
    rows = fuzz.supervise(args)
    assert [row["number"] for row in rows] == list(range(10))
    assert [row["kind"] for row in rows] == [
        "ended the process: 3" if n == 5 else "refused" for n in range(10)
    ]


def test_the_page_has_the_numbers_of_the_records() -> None:
    text = reliability.PAGE.read_text("utf-8")
    assert reliability.renewed(text) == text
    assert all(f"<!-- record: {name} -->" in text for name in reliability.MAKERS)
    for path in reliability.RECORDS.glob("*.json"):
        assert path.stem in reliability.MAKERS
