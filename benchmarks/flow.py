"""``python -m benchmarks.flow``: what it costs to record gradients through time."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import cases, record, timing
from rnnkernels.diagnostics import gradient_flow

SUITE = tuple(cases.Shape.parse(text) for text in ("128,32,256,256", "1024,8,256,256"))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flow",
        description="Times a training step (forward and backward) with and without gradient_flow "
        "on the CPU: results compared first, runs interleaved, medians reported.",
    )
    cases.add_options(parser, SUITE)
    record.add_options(parser, repeats=41)
    return parser.parse_args(argv)


def recorded(module: nn.Module, pair: cases.Pair) -> list[torch.Tensor]:
    """A training step inside the block."""
    with gradient_flow(module) as flow:
        grads = timing.forward_backward(module, pair)
    assert len(flow.records) == 1
    return grads


def measure(layer: str, shape: cases.Shape, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Both ways in turns; the cost is the median of the ratios of neighbours, less 1.

    Raises:
        AssertionError: recording changes a gradient.
    """
    pair = cases.build(layer, shape, dtype)
    ways = {"plain": timing.forward_backward, "recorded": recorded}
    plain, seen = (way(pair.ours, pair) for way in ways.values())
    if not all(map(torch.equal, plain, seen)):
        raise AssertionError("recording changed a gradient")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats):
        for name in sorted(ways, reverse=turn % 2 == 1):  # neither is always first
            start = time.perf_counter()
            ways[name](pair.ours, pair)
            times[name].append((time.perf_counter() - start) * 1e3)
    row: dict[str, Any] = {"layer": layer, "shape": str(shape)}
    for name, taken in times.items():
        row[f"{name}_ms"], row[f"{name}_spread"] = timing.summary(taken)
    ratios = [b / a for a, b in zip(times["plain"], times["recorded"], strict=True)]
    row["cost"] = statistics.median(ratios) - 1
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| layer | T,B,I,H | plain ms | recorded ms | cost |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['layer']} | {row['shape']} | {row['plain_ms']:.2f} | "
            f"{row['recorded_ms']:.2f} | {row['cost']:+.1%} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    todo = cases.selected(args, SUITE)
    rows = [measure(layer, shape, dtype, args.repeats) for layer, shape in tqdm(todo, unit="case")]
    print(table(rows))
    if args.out:
        found = record.environment("benchmarks.flow", args.threads)
        record.write(args.out, {**found, "dtype": args.dtype, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
