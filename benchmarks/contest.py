"""Several ways to do the same: results compared, then times or memory measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks import correctness, device, timing
from benchmarks.cases import Case
from benchmarks.correctness import WrongResult
from benchmarks.problem import Problem, Results, Runner

Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What holds for all cases of a run: threads, samples, and who takes part."""

    threads: int
    repeats: int
    others: tuple[str, ...]
    backends: tuple[str, ...]


@dataclass(frozen=True)
class Way:
    """One way: what is timed, and how it is checked.

    ``check`` gives the largest relative error of the results; None where there is nothing that
    could be wrong. ``sampler`` stands in for the usual way to time ``run``.
    """

    run: Callable[[], object]
    check: Callable[[], float] | None = None
    sampler: timing.Sampler | None = None


@dataclass(frozen=True)
class Contest:
    """All ways through one case in one mode, and why others take no part."""

    ways: dict[str, Way]
    redraw: Callable[[], object]
    grad: bool = True
    refused: dict[str, str] = field(default_factory=dict)


def of_runners(
    problem: Problem,
    mode: str,
    runners: Mapping[str, Runner],
    refused: Mapping[str, str] | None = None,
    right: Callable[[str], Results] | None = None,
) -> Contest:
    """The contest between ``runners`` in one of :data:`~benchmarks.cases.MODES`.

    ``right`` gives the right results of a runner of this name; torch.nn's in float64, if None.
    """
    gradients = mode in ("training", "memory")

    def check(name: str, runner: Runner) -> float:
        if right is not None:
            expected = right(name)
        else:
            expected = problem.gradients if gradients else problem.outputs
        found = runner.results(problem.checked, gradients)
        return correctness.largest_error(
            found, runner.expected(expected), correctness.arithmetic(problem.case)
        )

    def run(runner: Runner) -> object:
        inputs = problem.next()
        return runner.gradients(inputs) if gradients else runner.forward(inputs)

    ways = {
        name: Way(partial(run, runner), partial(check, name, runner))
        for name, runner in runners.items()
    }
    return Contest(ways, problem.redraw, mode != "inference", dict(refused or {}))


def judge(contest: Contest) -> tuple[dict[str, float], dict[str, str]]:
    """The largest error of every way that is right, and what is wrong with the others."""
    errors: dict[str, float] = {}
    wrong: dict[str, str] = {}
    for name, way in contest.ways.items():
        try:
            errors[name] = way.check() if way.check is not None else 0.0
        except WrongResult as problem:
            wrong[name] = str(problem)
    return errors, wrong


def time_all(contest: Contest, case: Case, repeats: int, floors: tuple[str, ...]) -> Row:
    """Times the ways that are right, and the floors with them; the fields of a record's row."""
    errors, wrong = judge(contest)
    where = device.get(case.device)
    with torch.set_grad_enabled(contest.grad):
        samplers = {
            name: way.sampler or timing.sampler(way.run, where)
            for name, way in contest.ways.items()
            if name in errors
        }
        extra = timing.floors(floors, where, case.device, case.torch_dtype)
        times = timing.in_turns({**samplers, **extra}, repeats, contest.redraw)
    results = {
        name: {
            **timing.summary(times[name]),
            "error": errors[name],
            "samples_ms": [float(f"{ms:.5g}") for ms in times[name]],
        }
        for name in samplers
    }
    row: Row = {"results": results, "refused": contest.refused, "wrong": wrong}
    for name in extra:
        found = timing.summary(times[name])
        row.setdefault("floors", {})[name] = {
            **found,
            "rate": timing.rate(name, where, found["ms"]),
        }
    return row
