"""``python -m benchmarks.run``: measures suites of cases and writes a record."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

try:
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"benchmarks.run needs {error.name}: pip install tqdm matplotlib")

from benchmarks import device, providers, record, report, suites
from benchmarks.cases import DTYPES, LAYERS, MODES, SINGLE_STEPS, Case, Shape
from benchmarks.contest import Row, Setup
from benchmarks.suites import SUITES, Suite


def parser() -> argparse.ArgumentParser:
    width = 2 + max(map(len, SUITES))
    listed = "\n".join(f"  {suite.name:<{width}}{suite.about}" for suite in SUITES.values())
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Compares our layers with others: the same weights and input for all, results\n"
        "checked against torch.nn in float64 first, runs in turns, medians reported.",
        epilog=f"suites:\n{listed}\n\n"
        "exit status: 0, or 1 if a result was wrong, or 2 for wrong arguments",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add(
        "--suite",
        action="append",
        choices=list(SUITES),
        metavar="NAME",
        help="repeatable; default: suite",
    )
    add("--device", choices=list(device.DEVICES), default="cpu", help="default: cpu")
    add(
        "--cell",
        action="append",
        choices=[*LAYERS, *SINGLE_STEPS],
        help="repeatable; default: all of the suite",
    )
    add(
        "--shape",
        action="append",
        type=_shape,
        metavar="T,B,I,H",
        help="time, batch, input and hidden size, in place of the suite's; repeatable",
    )
    add("--layers", type=at_least(1), metavar="N", help="of every case; default: the suite's")
    add("--directions", type=int, choices=[1, 2], help="of every case; default: the suite's")
    add(
        "--window",
        type=at_least(1),
        metavar="K",
        help="steps per window of suites truncated and recompute",
    )
    add("--dtype", choices=DTYPES, help="of every case; default: the suite's, mostly float32")
    add(
        "--tf32",
        choices=["on", "off"],
        help="whether float32 on a GPU may take TF32, in layers and matrix products; default: "
        "torch's own switches",
    )
    add(
        "--mode",
        action="append",
        choices=MODES,
        help="no_grad; forward with gradients recorded; forward and backward; the memory of "
        "that. Repeatable; default: the suite's",
    )
    add(
        "--backend",
        action="append",
        choices=providers.BACKEND_NAMES,
        help="ours to measure; repeatable; default: auto",
    )
    add(
        "--compare",
        action="append",
        choices=providers.COMPARABLE,
        help="whom to compare with; repeatable; default: torch.nn",
    )
    add(
        "--threads",
        type=at_least(1),
        default=device.cores(),
        metavar="N",
        help="default: %(default)s, the cores here",
    )
    add(
        "--repeats",
        type=at_least(2),
        default=0,
        metavar="N",
        help="samples of each; default: the suite's, at least 7",
    )
    add(
        "--out",
        type=Path,
        metavar="PATH",
        help="write the record as JSON to this file",
    )
    return made


def arguments(argv: list[str] | None) -> argparse.Namespace:
    made = parser()
    args = made.parse_args(argv)
    args.suite = list(dict.fromkeys(args.suite or ["suite"]))
    for name in args.suite:
        suite = SUITES[name]
        wrong = [mode for mode in args.mode or () if mode not in suite.possible]
        if wrong:
            made.error(
                f"argument --mode: suite {name} takes {', '.join(suite.possible)}, got {wrong[0]}"
            )
        if (args.layers or args.directions) and not suite.stacks:
            able = ", ".join(s.name for s in SUITES.values() if s.stacks)
            made.error(f"argument --layers/--directions: only for suites {able}, got suite {name}")
        if not suite.providers and (args.compare or len(args.backend or ()) > 1):
            able = ", ".join(s.name for s in SUITES.values() if s.providers)
            made.error(
                f"argument --compare/--backend: suite {name} compares its own ways on one "
                f"backend; others only for {able}"
            )
        if args.device not in suite.devices:
            made.error(f"argument --device: suite {name} runs on {suite.devices[0]} alone")
        if args.window and not suite.window:
            able = ", ".join(s.name for s in SUITES.values() if s.window)
            made.error(f"argument --window: only for suites {able}, got suite {name}")
        try:
            if not selected(suite, args):
                cells = ", ".join(dict.fromkeys(case.cell for case in suite.cases()))
                made.error(f"argument --cell: suite {name} has {cells}")
        except ValueError as error:
            made.error(str(error))
    try:
        device.get(args.device)
    except ValueError as error:
        made.error(f"argument --device: {error}")
    return args


def selected(suite: Suite, args: argparse.Namespace) -> list[Case]:
    """The cases of a suite that the options ask for.

    Raises:
        ValueError: an option does not fit a case.
    """
    listed = suite.cases()
    if args.shape:
        listed = tuple(
            replace(case, shape=shape, window=suite.window)
            for case in dict.fromkeys(
                replace(case, shape=args.shape[0], window=0) for case in listed
            )
            for shape in args.shape
        )
    found = []
    for case in listed:
        if args.cell and case.cell not in args.cell:
            continue
        case = replace(
            case,
            dtype=args.dtype or case.dtype,
            device=args.device,
            window=args.window or case.window,
            layers=args.layers or case.layers,
            directions=args.directions or case.directions,
        )
        if case.single_step and case.shape.T != 1:
            raise ValueError(f"argument --shape: a cell takes one step, T=1, got {case.shape}")
        if case.window > case.shape.T:
            raise ValueError(
                f"argument --window: expected at most T={case.shape.T} of {case.shape}, "
                f"got {case.window}"
            )
        found.append(case)
    return list(dict.fromkeys(found))


def at_least(minimum: int) -> Callable[[str], int]:
    """The type of an argument: whole numbers from ``minimum`` on."""

    def convert(text: str) -> int:
        if text.isascii() and text.isdigit() and int(text) >= minimum:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least {minimum}, got {text!r}"
        )

    return convert


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def measure(args: argparse.Namespace) -> list[Row]:
    """All rows; a wrong result is said as soon as it is known."""
    setup = Setup(
        args.threads,
        args.repeats,
        tuple(dict.fromkeys(args.compare or [providers.BASELINE])),
        tuple(dict.fromkeys(args.backend or ["auto"])),
    )
    todo = [
        (suite, case, mode)
        for suite in (SUITES[name] for name in args.suite)
        for case in selected(suite, args)
        for mode in args.mode or suite.modes
    ]
    rows = []
    with tqdm(todo, unit="case", dynamic_ncols=True) as progress:
        for suite, case, mode in progress:
            progress.set_postfix_str(f"{suite.name}: {case} {mode}")
            row = suites.measure(suite, case, mode, setup)
            if row["wrong"]:
                progress.write("\n".join(report.remarks([row])), file=sys.stderr)
            rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.tf32:
        torch.backends.cudnn.allow_tf32 = args.tf32 == "on"
        torch.backends.cuda.matmul.allow_tf32 = args.tf32 == "on"
    found = record.environment(args.device, device.get(args.device), args.threads)
    found["rows"] = measure(args)
    print(report.markdown(found))
    if args.out:
        record.write(args.out, found)
    return 1 if any(row["wrong"] for row in found["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
