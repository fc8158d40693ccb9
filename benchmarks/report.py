"""``python -m benchmarks.report RECORD``: a record as Markdown."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MODES = ("inference", "training")
Row = dict[str, Any]


def times(rows: list[Row]) -> str:
    """Every case with its times in milliseconds and the ratio torch.nn / ours."""
    lines = [
        "| layer | T,B,I,H | torch.nn fwd ms | ours | ratio | torch.nn fwd+bwd ms | ours | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for layer in layers(rows):
        for row in of_layer(rows, layer):
            cells = [
                f"{row[mode]['torch_ms']:.2f} | {row[mode]['ours_ms']:.2f} | "
                f"{row[mode]['ratio']:.2f}"
                for mode in MODES
            ]
            lines.append(f"| {layer} | {row['shape']} | {' | '.join(cells)} |")
        means = [f"**{mean(rows, layer, mode):.2f}**" for mode in MODES]
        lines.append(f"| **{layer}** | geometric mean | | | {means[0]} | | | {means[1]} |")
    return "\n".join(lines)


def ratios(rows: list[Row]) -> str:
    """The ratios torch.nn / ours alone, a column per layer: inference, then training."""
    names = layers(rows)
    lines = [
        "| T,B,I,H | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        cells = []
        for layer in names:
            found = [row for row in of_layer(rows, layer) if row["shape"] == shape]
            cells.append(pair(found[0][mode]["ratio"] for mode in MODES) if found else "")
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    means = [pair(mean(rows, layer, mode) for mode in MODES) for layer in names]
    lines.append("| geometric mean | " + " | ".join(means) + " |")
    return "\n".join(lines)


def truncated(rows: list[Row]) -> str:
    """A record of ``benchmarks.truncated``: times, speeds and memory, a row per case."""
    lines = [
        "| layer | T,B,I,H | k | torch.nn loop ms | ours ms | ratio | ratio at the peak "
        "| ours, full BPTT ms | GFLOP/s loop / ours / peak | share of the peak loop / ours "
        "| peak memory MiB loop / ours / full |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ways = [row[way] for way in ("loop", "ours", "full")]
        times = [f"{way['ms']:.1f} ± {50 * way['spread']:.0f} %" for way in ways]
        speeds = [way["gflop_per_s"] for way in (*ways[:2], row["peak"])]
        cells = [
            row["layer"],
            row["shape"],
            row["window"],
            *times[:2],
            f"**{row['ratio']:.2f}**",
            f"{row['ratio_at_peak']:.2f}",
            times[2],
            " / ".join(f"{speed:.0f}" for speed in speeds),
            pair(way["share_of_peak"] for way in ways[:2]),
            " / ".join(f"{way['peak_memory_mib']:.0f}" for way in ways),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def pair(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def layers(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["layer"] for row in rows))


def of_layer(rows: list[Row], layer: str) -> list[Row]:
    return [row for row in rows if row["layer"] == layer]


def mean(rows: list[Row], layer: str, mode: str) -> float:
    """Geometric mean of the ratios of one layer."""
    logs = [math.log(row[mode]["ratio"]) for row in of_layer(rows, layer)]
    return math.exp(sum(logs) / len(logs))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("record", type=Path, help="a JSON file that a benchmark's --out wrote")
    parser.add_argument("--times", action="store_true", help="times too, a row per case")
    args = parser.parse_args(argv)
    try:
        rows = json.loads(args.record.read_text())["rows"]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"record: expected a file that --out wrote, got {args.record}: {error}")
    if rows and "window" in rows[0]:
        print(truncated(rows))
    else:
        print(times(rows) if args.times else ratios(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
