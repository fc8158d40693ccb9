"""``python -m benchmarks.run``: our layers against torch.nn's on this machine's CPU."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import cases, record, report, timing

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Times our layers against torch.nn's on the CPU: the same weights and input, "
        "results compared first, runs interleaved, medians reported.",
    )
    cases.add_options(parser, cases.SUITE)
    record.add_options(parser)
    return parser.parse_args(argv)


def measure(layer: str, shape: cases.Shape, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    pair = cases.build(layer, shape, dtype)
    timing.check(pair, TOLERANCE[dtype])
    row: dict[str, Any] = {"layer": layer, "shape": str(shape)}
    for name, run in (("inference", timing.forward), ("training", timing.forward_backward)):
        result = timing.compare(run, pair, repeats)
        row[name] = {**vars(result), "ratio": result.ratio}
    return row


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    todo = cases.selected(args, cases.SUITE)
    rows = [measure(layer, shape, dtype, args.repeats) for layer, shape in tqdm(todo, unit="case")]
    print(report.times(rows))
    if args.out:
        found = record.environment("benchmarks.run", args.threads)
        record.write(args.out, {**found, "dtype": args.dtype, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
