"""The probe of tools/probe, with the emulator as its machine: its cases pass, and what a GPU may do
wrong is read rightly, by the probe itself and by what runs it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import building
import emulated
import probing
from probing import Case, Program

ROOT = Path(__file__).parents[2]
LIMIT = 300  # seconds of a case, which only a fault takes


@pytest.fixture(scope="session")
def program() -> Program:
    """Linked with the objects that the emulator's ops are made of."""
    if emulated.SANITIZE:
        pytest.skip("the probe is compiled without sanitizers")
    made = emulated.build()
    found = [str(made / f"{name}.o") for name in (*emulated.STORAGE, "emulator")]
    machine = ["tests/emulator/probe_machine.cpp", "csrc/cuda/plan.cpp", *found]
    sources = building.contents("tools/probe", "tests/emulator", "csrc/cuda", "csrc/common")
    with building.folder("probe", sources) as folder:
        if not (folder / "probe").exists():
            probing.build(folder, machine, [f"-I{ROOT / 'tests/emulator'}"])
        return Program(folder / "probe")


def faulty(program: Program, fault: str) -> Program:
    return Program(program.path, environment=(("PROBE_FAULT", fault),))


def named(program: Program, name: str) -> Case:
    return next(case for case in program.cases() if case.name == name)


def run(program: Program, name: str, limit: float = LIMIT) -> dict[str, Any]:
    return probing.run_case(program, named(program, name), limit)


@pytest.mark.slow
def test_cases_pass(program: Program) -> None:
    """All but the large ones, which have more threads than an emulator runs in a test."""
    cases = [case for case in program.cases() if not case.large]
    records = list(probing.run_cases(program, cases, LIMIT))
    assert [r for r in records if r["outcome"] != "passed"] == []
    assert len(records) > 80


def test_order(program: Program) -> None:
    """What a case needs comes before it; each family adds one thing to another."""
    seen: set[str] = set()
    for case in program.cases():
        assert not case.needs or case.needs in seen, case
        seen.add(case.name)
    assert len(seen) == len(program.cases())
    blocks = [run(program, f"cluster-{n}/forward/bfloat16")["layout"] for n in (2, 4)]
    assert [text.split(" with")[0] for text in blocks] == [
        "cluster of 2 blocks", "cluster of 4 blocks",
    ]  # fmt: skip


GRID = "grid-2/backward/bfloat16"


@pytest.mark.parametrize(
    ("fault", "outcome", "detail"),
    [
        (
            "wrong",
            "wrong",
            r"1 of \d+ numbers of dgates .* wrong, 0 of them never",
        ),
        (
            "idle",
            "unwritten",
            r"(\d+) of \1 numbers of dgates .* wrong, \1 of them never",
        ),
        ("stray", "stray", "byte -1 before dgates"),
        ("refuse", "refused", "too many resources requested for launch"),
        ("fail", "failed", "illegal memory access"),
        ("crash", "crashed", ""),
    ],
)
def test_faults(program: Program, fault: str, outcome: str, detail: str) -> None:
    found = run(faulty(program, fault), GRID)
    assert found["outcome"] == outcome
    assert re.search(detail, found["detail"])


def test_a_case_that_never_ends(program: Program) -> None:
    found = run(faulty(program, "hang"), GRID, limit=0.5)
    assert found["outcome"] == "out of time"


def test_a_place_is_named(program: Program) -> None:
    """In the middle of dgates: t, b and the column."""
    detail = run(faulty(program, "wrong"), GRID)["detail"]
    assert re.search(r"the first at t=\d b=\d d=0 column \d+ of 124: 8, not -?\d", detail)


def test_what_needs_a_failed_case_is_left_out(program: Program) -> None:
    """With the same pass and numbers; the others run."""
    cases = [case for case in program.cases() if case.name.startswith(("grid-1/", "grid-2/"))]
    answers = {True: {"outcome": "wrong"}, False: {"outcome": "passed"}}

    class Scripted(Program):
        def answer(self, limit: float, *arguments: str) -> Any:
            return [{"case": arguments[1], **answers["forward/tf32" in arguments[1]]}], "", ""

    records = {r["case"]: r["outcome"] for r in probing.run_cases(Scripted(program.path), cases, 9)}
    assert records["grid-1/forward/tf32"] == "wrong"
    assert records["grid-2/forward/tf32"] == "left out"
    assert records["grid-2/backward/tf32"] == records["grid-2/forward/bfloat16"] == "passed"
    listed = [{"case": case, "outcome": outcome} for case, outcome in records.items()]
    assert probing.summary(listed) == {"grid-1": "wrong", "grid-2": "left out"}


def test_no_time_left(program: Program) -> None:
    (record,) = probing.run_cases(program, program.cases()[:1], 9, left=lambda: 0.5)
    assert (record["outcome"], record["detail"]) == ("left out", "no time was left")


def test_measuring(program: Program) -> None:
    """Of every shape; here the smallest alone, since the machine runs it."""
    assert "B16-H256" in program.measured()
    answers, wrong, _ = program.answer(LIMIT, "measure", program.measured()[0], "8")
    assert not wrong
    assert [(a["pass"], a["family"]) for a in answers] == [
        (which, family) for which in ("forward", "backward") for family in ("cluster", "grid")
    ]
    assert all(a["cycles"] > 0 for a in answers)
    # The emulator's launches take 1 µs whatever they run: all of it is before the first step.
    assert all((a["us_per_step"], a["us_before"]) == (0, 1) for a in answers)


def test_an_unknown_name(program: Program) -> None:
    answers, wrong, said = program.answer(LIMIT, "run", "grid-3")
    assert (answers, wrong) == ([], "no answer")
    assert "no case grid-3" in said
