"""Run all programs of the gallery and print how each did beside its baseline.

python examples/gallery/run_all.py --quick             # what takes seconds
python examples/gallery/run_all.py --record FILE       # what the documentation's tables are made of
python examples/gallery/run_all.py --record FILE --resume    # goes on where that was stopped
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import _path
from _cli import Parser, UsageError, exit_code
from _gallery import Program, require_folder, step_times
from _pictures import publish
from _row import Row, entry

if str(_path.ROOT) not in sys.path:
    sys.path.append(str(_path.ROOT))
from benchmarks import gallery, record
from benchmarks.device import Cpu


@dataclass(frozen=True)
class Run:
    """A program with its arguments, and the shape of its task: what goes in, and what comes out."""

    program: str
    shape: str
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The command line without what is the same for all."""
        return " ".join([self.program, *self.arguments])

    @property
    def stem(self) -> str:
        """The name as one of a file."""
        told = [word for word in self.arguments if not word.startswith("--epochs")]
        return "_".join([self.program, *told]).replace("--", "")


RUNS = (
    Run("one_to_one", "one to one"),
    Run("digits", "many to one"),
    Run("digits", "many to one", ("--pixels", "--epochs=60")),
    Run("own_cell", "many to one"),
    Run("exploding", "many to one"),
    Run("keras_example", "many to one"),
    Run("sentiment", "many to one"),
    Run("speech", "many to one"),
    Run("video", "many to one"),
    Run("tagging", "many to many, equal"),
    Run("forecasting", "many to many, equal"),
    Run("forecasting", "many to many, equal", ("--series", "sunspots")),
    Run("dna", "many to many, equal"),
    Run("translation", "many to many, unequal"),
    Run("captions", "one to many"),
    Run("music", "one to many"),
    Run("cartpole", "many to many, by trial and error"),
    Run("data_parallel", "many to many, equal"),
    Run("voice_activity", "many to many, served"),
)
"""In the order of the table."""


class Options(argparse.Namespace):
    """The command line, typed."""

    quick: bool
    compare: bool
    only: list[str]
    record: Path | None
    resume: bool
    plots: Path | None


def parse_options(argv: Sequence[str] | None) -> Options:
    """Parse and check the command line."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="small data and models")
    add("--compare", action="store_true", help="time a step of torch.nn's layers, too")
    add("--only", nargs="+", choices=sorted({run.program for run in RUNS}), default=[],
        metavar="PROGRAM", help="leave the others out")  # fmt: skip
    add("--record", type=Path, metavar="FILE",
        help="write the table there as JSON, after each program; implies --compare")  # fmt: skip
    add("--resume", action="store_true",
        help="leave out what --record has of the same commit, torch and threads")  # fmt: skip
    add("--plots", type=Path, metavar="DIR", help="put the pictures there, small ones")
    options = parser.parse_args(argv, namespace=Options())
    options.compare |= options.record is not None
    if options.resume and options.record is None:
        raise UsageError("argument --resume: expected --record FILE beside it, which it continues")
    return options


def run_one(run: Run, options: Options) -> tuple[Row, str, Path]:
    """Run a program with its own defaults; return the row, the cell, and where its picture is."""
    module = importlib.import_module(run.program)
    plot = Path(f"runs/gallery/{run.stem}.png")
    start = time.perf_counter()
    if not hasattr(module, "PROGRAM"):  # it trains nothing, or in processes of its own
        row: Row = module.row(options.quick, plot)
        row.seconds = round(time.perf_counter() - start, 1)
        return row, "LSTM", plot
    program: Program = module.PROGRAM
    argv = [*run.arguments, f"--checkpoint={plot.with_suffix('.pt')}", f"--plot={plot}"]
    argv += ["--quick"] * options.quick
    result = program.run(argv)
    if not result.finished:
        raise KeyboardInterrupt
    seconds = round(time.perf_counter() - start, 1)
    task, last = result.task, result.history[-1]["metric"]
    row = Row(
        task.data, result.parameters, task.metric, format(last, task.show), task.baseline,
        format(task.baseline_value, task.show), task.beaten_by(last), seconds,
        step_times(task) if options.compare else [],
    )  # fmt: skip
    return row, program.parse(argv)[0].cell.upper(), plot


def surroundings() -> record.Record:
    """Say what the figures depend on, and which command makes them."""
    found = record.environment("cpu", Cpu(), torch.get_num_threads())
    found["commit"] = of_sources(found["commit"])
    return {**found, "command": " ".join(["python examples/gallery/run_all.py", *sys.argv[1:]])}


def of_sources(commit: str) -> str:
    """Leave the ``-dirty`` of a commit away where nothing differs from it but what a run writes:
    one that was stopped and goes on is of the same commit."""
    written = (":(top)", ":(top,exclude)docs/gallery*", ":(top,exclude)benchmarks/results")
    command = ["git", "diff", "--quiet", "HEAD", "--", *written]
    clean = commit.endswith("-dirty") and not subprocess.run(command, cwd=_path.ROOT).returncode
    return commit.removesuffix("-dirty") if clean else commit


def kept(options: Options, now: record.Record) -> list[dict[str, Any]]:
    """Read what is in the record and was not asked for again."""
    if options.record is None or not options.record.exists():
        return []
    try:
        found = record.read(options.record)
    except ValueError as error:
        raise UsageError(f"argument --record: {error}; name another file") from error
    rows = [row for row in found["rows"] if row["shape"] in {run.name for run in RUNS}]
    same = all(found[key] == now[key] for key in ("commit", "torch", "threads", "processor"))
    if options.resume and same:
        return [row for row in rows if row["quick"] == options.quick]
    again = options.only or {run.program for run in RUNS}
    return [row for row in rows if row["variant"] not in again]


def run(options: Options) -> int:
    """Run what was asked for; return 1 where a program could not run, or is worse than simple."""
    for name in ("record", "plots"):
        path = getattr(options, name)
        if path is not None:
            require_folder(name, path / "picture" if name == "plots" else path)
    now = surroundings()
    before = {row["shape"]: row for row in kept(options, now)}
    rows: dict[str, dict[str, Any]] = {}
    failed = []
    for each in RUNS:
        known = before.get(each.name)
        if known is not None or (options.only and each.program not in options.only):
            rows |= {} if known is None else {each.name: known}
            continue
        print(f"\n=== {each.name}", flush=True)
        try:
            row, cell, plot = run_one(each, options)
        except UsageError as error:
            print(f"left out: {error}", file=sys.stderr)
            failed.append(each.name)
            continue
        rows[each.name] = entry(
            row, each.program, each.shape, list(each.arguments), cell, options.quick
        )
        if options.plots is not None:
            publish(plot, options.plots / plot.name)
        if options.record is not None:
            order = [run.name for run in RUNS]
            all_rows = sorted(({**before, **rows}).values(), key=lambda r: order.index(r["shape"]))
            record.write(options.record, {**now, "rows": all_rows})
    print(f"\n{gallery.overview(list(rows.values()))}")
    worse = [name for name, row in rows.items() if row["beats"] is False]
    for what, names in (("left out", failed), ("no better than the baseline", worse)):
        if names:
            print(f"\n{what}: {', '.join(names)}", file=sys.stderr)
    return 1 if failed or (worse and not options.quick) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return exit_code("run_all.py", lambda: run(parse_options(argv)))


if __name__ == "__main__":
    sys.exit(main())
