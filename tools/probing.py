"""Builds the probe (tools/probe) and runs its cases, each in a process of its own under a limit.

    python tools/probing.py --program build/gpu/probe

The probe needs neither torch nor Python. A case that needs another, which did not pass with the
same pass and numbers, is left out: it would show nothing new, and might hang.

Exit status: 0 all cases passed or the machine lacks what they need, 1 one did not.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [f"tools/probe/{name}.cpp" for name in ("cases", "problem", "attempt", "main")]
GOOD = ("passed", "absent")


class Case(NamedTuple):
    name: str
    needs: str
    large: bool


@dataclass(frozen=True)
class Program:
    """The probe, and what is put in front of it, such as a sanitizer."""

    path: Path
    before: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def lines(self, *arguments: str) -> list[str]:
        command = [str(self.path), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.splitlines()

    def cases(self) -> list[Case]:
        rows = (line.split("\t") for line in self.lines("list"))
        return [Case(name, needs, large == "1") for name, needs, large in rows]

    def measured(self) -> list[str]:
        return self.lines("measured")

    def answer(self, limit: float, *arguments: str) -> tuple[list[dict[str, Any]], str, str]:
        """What it answers, what went wrong with the process, and the end of what it said of that.

        After the limit, the process and all that it started are ended.
        """
        command = [*self.before, str(self.path), *arguments]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=os.environ | dict(self.environment), start_new_session=True,
        )  # fmt: skip
        wrong = ""
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            wrong = "out of time"
        answers = []
        for line in said.splitlines():
            try:
                answers.append(json.loads(line))
            except ValueError:
                continue  # of a sanitizer, of the loader
        if not wrong and process.returncode < 0:
            wrong = "crashed"
        elif not wrong and not answers:
            wrong = "no answer"
        return answers, wrong, said[-2000:]


def run_case(program: Program, case: Case, limit: float) -> dict[str, Any]:
    """What became of a case: a record with at least its name, an outcome and seconds."""
    start = time.monotonic()
    answers, wrong, said = program.answer(limit, "run", case.name)
    found = answers[-1] if answers else {"case": case.name, "detail": said.strip()}
    if wrong:
        found["outcome"] = wrong
    return found | {"seconds": round(time.monotonic() - start, 3)}


def run_cases(
    program: Program,
    cases: Iterable[Case],
    limit: float,
    left: Callable[[], float] = lambda: float("inf"),
) -> Iterator[dict[str, Any]]:
    """Records of all cases in order, each as soon as it is there.

    Args:
        limit: seconds of a case.
        left: seconds that are left for all; with less than a second, the rest is left out.
    """
    outcomes: dict[str, str] = {}
    for case in cases:
        needed = outcomes.get(case.needs, "passed")
        if needed != "passed":
            found = {"case": case.name, "outcome": "left out", "detail": f"needs {case.needs}"}
        elif left() < 1:
            found = {"case": case.name, "outcome": "left out", "detail": "no time was left"}
        else:
            found = run_case(program, case, min(limit, left()))
        outcomes[case.name] = found["outcome"]
        yield found


def summary(records: list[dict[str, Any]]) -> dict[str, str]:
    """Of each family in a word: passed where all of its cases did, else the first that did not."""
    families: dict[str, str] = {}
    for record in records:
        family = record["case"].split("/")[0]
        if families.get(family, "passed") == "passed":
            families[family] = record["outcome"]
    return families


def build(folder: Path, machine: list[str], flags: list[str]) -> Path:
    """Compiles the probe for a machine: its sources and objects, and flags for compiler and
    linker."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "probe"
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    base = [
        *compiler,
        "-std=c++20",
        "-O2",
        "-g0",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'tools/probe'}",
    ]
    objects = []
    for source in [*SOURCES, *(name for name in machine if name.endswith(".cpp"))]:
        objects.append(str(folder / f"{Path(source).stem}.o"))
        command = [*base, *(f for f in flags if f.startswith("-I")), "-c", str(ROOT / source)]
        subprocess.run([*command, "-o", objects[-1]], check=True)
    objects += [name for name in machine if not name.endswith(".cpp")]
    libraries = [flag for flag in flags if not flag.startswith("-I")]
    subprocess.run([*compiler, "-o", str(program), *objects, *libraries], check=True)
    return program


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--program", type=Path, required=True, help="the probe, built")
    parser.add_argument("--limit", type=float, default=15, help="seconds of a case (default: 15)")
    parser.add_argument("--only", default="", help="cases whose names begin so")
    parser.add_argument("--small", action="store_true", help="without what is large")
    args = parser.parse_args()
    program = Program(args.program.resolve())
    chosen = [
        case
        for case in program.cases()
        if case.name.startswith(args.only) and not (args.small and case.large)
    ]
    records = []
    for record in run_cases(program, chosen, args.limit):
        records.append(record)
        print(json.dumps(record), flush=True)
    for family, outcome in summary(records).items():
        print(f"{family:24} {outcome}")
    return 0 if records and all(r["outcome"] in GOOD for r in records) else 1


if __name__ == "__main__":
    sys.exit(main())
