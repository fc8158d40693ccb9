"""Run all programs of the gallery and print how each did beside its baseline.

python examples/gallery/run_all.py --quick               # what takes seconds
python examples/gallery/run_all.py --compare --out FILE  # with the time of torch.nn's layers
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import _path  # noqa: F401
from _cli import Parser, UsageError, exit_code
from _gallery import Program, require_folder, step_times
from _results import write_atomically
from _row import Row

PROGRAMS: dict[str, list[str]] = {
    "one_to_one": [],
    "digits": [],
    "digits --pixels": ["--pixels"],
    "own_cell": [],
    "forecasting": [],
    "forecasting --series sunspots": ["--series", "sunspots"],
    "exploding": [],
    "sentiment": [],
    "keras_example": [],
    "speech": [],
    "video": [],
    "tagging": [],
    "translation": [],
    "captions": [],
    "music": [],
    "dna": [],
    "cartpole": [],
    "data_parallel": [],
    "voice_activity": [],
}
"""In the order of the table, each with its arguments."""


class Options(argparse.Namespace):
    """The command line, typed."""

    quick: bool
    compare: bool
    only: list[str]
    out: Path | None


def parse_options(argv: Sequence[str] | None) -> Options:
    """Parse and check the command line."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small data and models")
    parser.add_argument("--compare", action="store_true", help="time a step of torch.nn's layers")
    parser.add_argument(
        "--only", nargs="+", choices=sorted({name.split()[0] for name in PROGRAMS}),
        default=[], metavar="PROGRAM", help="leave the others out",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as JSON too")
    return parser.parse_args(argv, namespace=Options())


def run_one(name: str, more: list[str], options: Options) -> Row:
    """Run a program with its own defaults."""
    module = importlib.import_module(name.split()[0])
    if not hasattr(module, "PROGRAM"):  # it trains nothing, or in processes of its own
        row: Row = module.row(options.quick)
        return row
    program: Program = module.PROGRAM
    stem = f"runs/gallery/{'_'.join(name.replace('--', '').split())}"
    files = [f"--checkpoint={stem}.pt", f"--plot={stem}.png"]
    result = program.run([*more, *files, *(["--quick"] if options.quick else [])])
    if not result.finished:
        raise KeyboardInterrupt
    task = result.task
    times = step_times(task) if options.compare else None
    return Row(
        name,
        task.data,
        result.parameters,
        task.metric,
        format(result.history[-1]["metric"], task.show),
        task.baseline,
        format(task.baseline_value, task.show),
        round(result.seconds, 1),
        *(times or ()),
    )


def table(rows: list[Row]) -> str:
    """Lay out the rows as Markdown."""
    lines = [
        "| program | data | parameters | metric | model | baseline | seconds | ms, torch.nn |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        times = "" if row.torch_nn is None else f"{row.ours:.1f}, {row.torch_nn:.1f}"
        size = "" if row.parameters is None else f"{row.parameters:,}"
        lines.append(
            f"| {row.program} | {row.data} | {size} | {row.metric} | {row.value} | "
            f"{row.baseline_value} ({row.baseline}) | {row.seconds:.0f} | {times} |"
        )
    return "\n".join(lines)


def run(options: Options) -> int:
    """Run what was asked for; return 1 where a program could not run."""
    if options.out is not None:
        require_folder("out", options.out)
    rows, failed = [], []
    for name, more in PROGRAMS.items():
        if options.only and name.split()[0] not in options.only:
            continue
        print(f"\n=== {name}", flush=True)
        try:
            rows.append(run_one(name, more, options))
        except UsageError as error:
            print(f"left out: {error}", file=sys.stderr)
            failed.append(name)
    print(f"\n{table(rows)}")
    if options.out is not None:
        record = {"torch": torch.__version__, "threads": torch.get_num_threads(),
                  "quick": options.quick, "rows": [asdict(row) for row in rows]}  # fmt: skip
        text = json.dumps(record, indent=2) + "\n"
        write_atomically(options.out, lambda file: file.write_text(text, encoding="utf-8"))
    if failed:
        print(f"\nleft out: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return exit_code("run_all.py", lambda: run(parse_options(argv)))


if __name__ == "__main__":
    sys.exit(main())
