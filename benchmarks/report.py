"""``python -m benchmarks.report RECORD``: a record as Markdown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gallery, providers, record
from benchmarks.cases import label
from benchmarks.contest import Row
from benchmarks.figures import (
    Rows,
    cells,
    in_modes,
    mean,
    milliseconds,
    number,
    ratio,
    share,
    table,
    title,
    ways,
)
from benchmarks.record import Record


def ratios(rows: Rows) -> str:
    """torch.nn / ours, a column per cell, in it a figure for each mode; and where ours loses."""
    rows = in_modes(rows, "inference", "forward", "training")
    modes, names = list(dict.fromkeys(row["mode"] for row in rows)), cells(rows)
    found = {(title(row), row["cell"], row["mode"]): ratio(row) for row in rows}
    if not any(found.values()):
        return times(rows)

    def line(first: str, value: Callable[[str, str], float | None]) -> list[str]:
        return [first, *(" / ".join(number(value(c, m)) for m in modes) for c in names)]

    lines = [
        line(case, lambda cell, mode, case=case: found.get((case, cell, mode)))  # type: ignore[misc]
        for case in dict.fromkeys(map(title, rows))
    ]
    worst = [min((r for k, r in found.items() if k[1:] == (c, m) and r), default=None)
             for c in names for m in modes]  # fmt: skip
    lows = iter(worst)
    lines.append(
        line("geometric mean", lambda c, m: mean(r for k, r in found.items() if k[1:] == (c, m)))
    )
    lines.append(line("worst", lambda c, m: next(lows)))
    kinds = " / ".join(modes)
    text = table(["T,B,I,H", *(f"{name}: {kinds}" for name in names)], lines)
    losing = [(f"{cell} {mode}", case) for (case, cell, mode), r in found.items() if r and r < 1]
    listed = [
        f"{what} at {' '.join(case for other, case in losing if other == what)}"
        for what in dict.fromkeys(what for what, _ in losing)
    ]
    return f"{text}\n\nSlower than torch.nn: {'; '.join(listed) or 'none'}."


def summary(rows: Rows) -> str:
    """The means and the worst of :func:`ratios`, and where ours loses."""
    head, rule, *lines = (text := ratios(rows)).splitlines()
    shapes = next((i for i, line in enumerate(lines) if line.startswith("| geometric")), None)
    if shapes is None:
        return text
    return "\n".join([head.replace("T,B,I,H", f"{shapes} shapes"), rule, *lines[shapes:]])


def times(rows: Rows) -> str:
    """Every case in every mode: times of all, the ratio, and the share of the product's rate."""
    rows = in_modes(rows, "inference", "forward", "training")
    names, floors = ways(rows), any("floors" in row for row in rows)
    head = ["case", "mode", *(f"{name} ms" for name in names), "torch.nn / ours"]
    if floors:
        head += [f"share of gemm: {name}" for name in names]
    lines = []
    for row in rows:
        line = [label(row), row["mode"], *(milliseconds(row, name) for name in names)]
        line.append(number(ratio(row)))
        if floors:
            line += [number(share(row, name)) for name in names]
        lines.append(line)
    return table(head, lines)


def peak(rows: Rows) -> str:
    names = ways(rows)
    speeds = " / ".join(names)
    lines = []
    for row in rows:
        rates = [
            row["gflop"] / row["results"][n]["ms"] * 1e3 if n in row["results"] else None
            for n in names
        ]
        lines.append(
            [
                label(row),
                row["mode"],
                " / ".join(number(rate, 0) for rate in rates),
                number(row["floors"]["gemm"]["rate"], 0),
                " / ".join(number(share(row, name)) for name in names),
            ]
        )
    return table(["case", "mode", f"GFLOP/s: {speeds}", "gemm", f"share of gemm: {speeds}"], lines)


def memory(rows: Rows) -> str:
    """Peak memory of a training step, as torch's allocator counts and as the system sees it."""
    rows = in_modes(rows, "memory")
    names = ways(rows)
    head = ["case", *(f"{name} MiB (resident)" for name in names)]
    compared = any(ratio(row, "peak_mib") for row in rows)
    lines = []
    for row in rows:
        line = [label(row)]
        for name in names:
            found = row["results"].get(name)
            line.append(
                f"{number(found.get('peak_mib'), 1)} ({found['resident_mib']:.0f})"
                if found
                else "–"
            )
        if compared:
            less = [ratio(row, measure) for measure in ("peak_mib", "resident_mib")]
            line.append("{} ({})".format(*(number(r and 1 / r) for r in less)))
        lines.append(line)
    return table([*head, "ours / torch.nn"] if compared else head, lines)


def micro(rows: Rows) -> str:
    """Cells: microseconds."""
    names = ways(rows)
    lines = []
    for row in rows:
        found = [row["results"].get(name) for name in names]
        us = [f"{1e3 * f['ms']:.1f} ± {50 * f['spread']:.0f} %" if f else "–" for f in found]
        B, H = row["shape"].split(",")[1], row["shape"].split(",")[3]
        lines.append([row["cell"], f"{B},{H}", row["mode"], *us, number(ratio(row))])
    return table(
        ["cell", "B,H", "mode", *(f"{name} µs" for name in names), "torch.nn / ours"], lines
    )


def relative(rows: Rows) -> str:
    """Each way's time, and in brackets how many times the first one's it is."""
    names = ways(rows)
    lines = []
    for row in rows:
        results = row["results"]
        first = results[names[0]]["ms"] if names[0] in results else None
        line = [label(row), row["mode"]]
        for name in names:
            times = f" ({results[name]['ms'] / first:.2f}×)" if first and name in results else ""
            line.append(milliseconds(row, name) + (times if name != names[0] else ""))
        lines.append(line)
    return table(["case", "mode", *(f"{name} ms" for name in names)], lines)


def by_variant(make: Callable[[Rows], str]) -> Callable[[Rows], str]:
    """The same table with the name of its variant in front of each case."""
    return lambda rows: make([{**row, "cell": f"{row['variant']}: {row['cell']}"} for row in rows])


def by_dtype(make: Callable[[Rows], str]) -> Callable[[Rows], str]:
    """The same table with the dtype of each case in front of its shape."""
    return lambda rows: make([{**row, "shape": f"{row['dtype']} {row['shape']}"} for row in rows])


def serving(rows: Rows) -> str:
    """How many times as long each of the others takes as each of ours; and ours in microseconds."""
    own = [name for name in ways(rows) if name.startswith(providers.OURS)]
    pairs = [(other, mine) for mine in own for other in ways(rows) if other not in own]
    called = {name: name.replace(providers.OURS, "ours", 1) for name in own}
    ratios = [f"{other} / {called[mine]}" for other, mine in pairs]
    lines, means = [], []
    groups: dict[tuple[str, str, int], list[tuple[float | None, ...]]] = {}
    for row in rows:
        times = {name: found["ms"] for name, found in row["results"].items()}
        found = tuple(
            times[other] / times[mine] if other in times and times.get(mine) else None
            for other, mine in pairs
        )
        threads = row.get("threads", 0)
        groups.setdefault((row["variant"], row["cell"], threads), []).append(found)
        micro = [number(times.get(name) and 1e3 * times[name], 1) for name in own]
        lines.append([row["variant"], label(row), *micro, *map(number, found)])
    for (variant, cell, threads), ratios_of in groups.items():
        figures = [[r for r in column if r] for column in zip(*ratios_of, strict=True)]
        means.append(
            [f"{variant}, {cell}, {threads} thread{'s' * (threads > 1)}"]
            + [f"{number(mean(c))} ({number(min(c, default=None))})" for c in figures]
        )
    summary = table(["geometric mean (worst)", *ratios], means)
    head = ["", "case", *(f"{called[name]} µs" for name in own), *ratios]
    return f"{summary}\n\n{table(head, lines)}"


def sequences(rows: Rows) -> str:
    parts = [[row for row in rows if row.get("variant") == v] for v in ("cost", "episodes")]
    return "\n\n".join(relative(part) for part in parts if part)


def concurrent(rows: Rows) -> str:
    """Calls per second: settings in columns."""
    names = list(dict.fromkeys(name.partition(", ")[2] for name in ways(rows)))
    lines = []
    for row in rows:
        results = row["results"]
        for provider in dict.fromkeys(name.partition(", ")[0] for name in results):
            found = [results.get(f"{provider}, {name}") for name in names]
            rates = [f"{1e3 / f['ms']:.0f} ± {50 * f['spread']:.0f} %" if f else "–" for f in found]
            lines.append([label(row), provider, *rates])
    return table(["case", "calls/s of", *names], lines)


def truncated(rows: Rows) -> str:
    """Times and speeds; ``ratio at gemm`` is what it would be at the rate of a large product."""
    names = ways(rows)
    speeds = " / ".join(names[:2])
    lines = []
    for row in in_modes(rows, "training"):
        loop, one = (row["results"].get(name) for name in names[:2])
        at_peak = share(row, names[0])
        lines.append(
            [
                label(row),
                *(milliseconds(row, name) for name in names),
                number(loop["ms"] / one["ms"] if loop and one else None),
                number(1 / at_peak if at_peak else None),
                " / ".join(number(share(row, name)) for name in names[:2]),
            ]
        )
    head = [
        "case",
        *(f"{n} ms" for n in names),
        "ratio",
        "ratio at gemm",
        f"share of gemm: {speeds}",
    ]
    return table(head, lines)


def flow(rows: Rows) -> str:
    lines = [
        [
            label(row),
            milliseconds(row, "plain"),
            milliseconds(row, "recorded"),
            f"{row['cost']:+.1%}",
        ]
        for row in rows
        if "cost" in row
    ]
    return table(["case", "plain ms", "recorded ms", "cost"], lines)


def recomputed(rows: Rows) -> str:
    """Time and peak memory of both ways, and the second's as a share of the first's."""
    names = ways(rows)
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(label(row), {})[row["mode"]] = row
    lines = []
    for case, modes in found.items():
        line = [case]
        for mode, measure in (("training", "ms"), ("memory", "peak_mib")):
            results = modes[mode]["results"] if mode in modes else {}
            values = [results.get(name, {}).get(measure) for name in names]
            line += [number(value, 0 if mode == "training" else 1) for value in values]
            line.append(number(values[1] / values[0] if all(values) else None))
        lines.append(line)
    head = ["case"]
    for unit, share_of in (("ms", "time"), ("MiB", "memory")):
        head += [*(f"{name} {unit}" for name in names), share_of]
    return table(head, lines)


def written(rows: Rows) -> str:
    """Each way's time, how many times ours the loops take, and ours by our LSTM's as its products
    would have it."""
    loops, lines = ("torch loop", "compiled step"), []
    for row in rows:
        results = row["results"]
        mine, lstm = (results.get(name, {}).get("ms") for name in ("rnnkernels", "rnnkernels.LSTM"))
        line = [f"{label(row)}, {row['variant']}" if row.get("variant") else label(row)]
        line += [milliseconds(row, name) for name in ("rnnkernels", *loops, "rnnkernels.LSTM")]
        line += [number(results[n]["ms"] / mine if mine and n in results else None) for n in loops]
        scaled = lstm and lstm * row["gflop"] / row["lstm gflop"]
        lines.append([*line, number(mine / scaled if mine and scaled else None)])
    head = ["case", "ours ms", *(f"{name} ms" for name in loops), "our LSTM ms"]
    head += [*(f"{name} / ours" for name in loops), "ours / LSTM by its products"]
    return table(head, lines)


def breakdown(rows: Rows) -> str:
    lines = []
    for row in rows:
        if "parts" not in row:
            continue
        total = row["results"]["total"]["ms"]
        case = f"{label(row)} {row['mode']}"
        for part in row["parts"]:
            floor = f"{part['floor_ms']:.3f} ({part['bound']})" if part["bound"] else "–"
            lines.append(
                [case, part["name"], f"{part['ms']:.3f}", f"{part['ms'] / total:.0%}", floor]
            )
        left = row["unexplained_ms"]
        lines.append([case, "unexplained", f"{left:.3f}", f"{left / total:.0%}", ""])
        lines.append([case, "**total**", f"**{total:.3f}**", "", ""])
    return table(["case", "part", "ms", "share", "floor ms"], lines)


def clients(rows: Rows) -> str:
    """A line for each model of another package: what became of it, how far off it is, ratios."""
    lines = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        ratios = " / ".join(number(ratio(row)) for row in (first, second))
        told = (f"{first[key]}" for key in ("cell", "shape", "how", "layers"))
        lines.append([*told, f"{first['difference']:.0e}", ratios])
    head = ["package", "model", "network", "layers", "difference", "inference / training"]
    return table(head, lines)


#: By name: the suite that a table is about, the modes that it needs one of, and how it is made.
VIEWS: dict[str, tuple[str, tuple[str, ...], Callable[[Rows], str]]] = {
    "suite": ("suite", ("inference", "forward", "training"), ratios),
    "summary": ("suite", ("inference", "forward", "training"), summary),
    "suite-times": ("suite", ("inference", "forward", "training"), times),
    "memory": ("suite", ("memory",), memory),
    "off-suite": ("off-suite", ("inference", "forward", "training"), ratios),
    "cells": ("cells", ("inference", "forward", "training"), micro),
    "sequences": ("sequences", ("inference", "forward", "training"), sequences),
    "ragged": ("ragged", ("inference", "forward", "training"), by_variant(relative)),
    "ragged-memory": ("ragged", ("memory",), by_variant(memory)),
    "serving": ("serving", ("inference",), serving),
    "serving-weights": ("serving-weights", ("inference",), relative),
    "concurrent": ("concurrent", ("inference",), concurrent),
    "bfloat16": ("bfloat16", ("inference", "forward", "training"), by_dtype(ratios)),
    "peak": ("peak", ("inference", "forward", "training"), peak),
    "scaling": ("scaling", ("inference", "forward", "training"), times),
    "breakdown": ("breakdown", ("inference", "training"), breakdown),
    "truncated": ("truncated", ("training",), truncated),
    "truncated-memory": ("truncated", ("memory",), memory),
    "recompute": ("recompute", ("training", "memory"), recomputed),
    "derivatives": ("derivatives", ("training",), by_variant(relative)),
    "written": ("written", ("training",), written),
    "flow": ("flow", ("training",), flow),
    "clients": ("clients", ("inference", "training"), clients),
    "gallery": ("gallery", ("training",), gallery.overview),
    "gallery-program": ("gallery", ("training",), gallery.single),
}


def view(name: str, found: Record, variant: str = "") -> str | None:
    """One of :data:`VIEWS`, of one variant if it is named; None where the record has no results
    for it."""
    suite, modes, make = VIEWS[name]
    rows = [row for row in found["rows"] if row["suite"] == suite and row["mode"] in modes]
    rows = [row for row in rows if variant in ("", row.get("variant"))]
    rows = [row for row in rows if row["results"]]  # remarks() tells of the others
    return make(rows) if rows else None


def remarks(rows: Rows) -> list[str]:
    """What is to be said beyond the figures; who refuses several cases for one reason, once."""
    said: dict[str, list[str]] = {}
    for row in rows:
        case = f"{row['suite']}: {label(row)} {row['mode']}"
        for name, reason in row["refused"].items():
            said.setdefault(f"{name} refuses: {reason}", []).append(case)
        for name, reason in row["wrong"].items():
            said.setdefault(f"{name} is WRONG, and was not timed: {reason}", []).append(case)
        if "warning" in row:
            said.setdefault(row["warning"], []).append(case)
    return [
        f"{line} ({found[0]}{f', and {len(found) - 1} more' if found[1:] else ''})"
        for line, found in said.items()
    ]


def markdown(found: Record, only: Sequence[str] = ()) -> str:
    """All tables that a record has rows for, and the remarks on its rows."""
    parts = [record.source(found)]
    for name in only or VIEWS:
        text = view(name, found)
        if text is not None:
            parts.append(f"## {name}\n\n{text}")
    said = [f"* {line}" for line in remarks(found["rows"])]
    if said:
        parts.append("\n".join(["## remarks", "", *said]))
    return "\n\n".join(parts)


def arguments(argv: list[str] | None) -> tuple[Record, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("record", type=Path, help="a JSON file that --out wrote")
    parser.add_argument(
        "--view", action="append", choices=list(VIEWS), help="repeatable; default: all there are"
    )
    args = parser.parse_args(argv)
    try:
        return record.read(args.record), args
    except ValueError as error:
        parser.error(f"record: {error}")


def main(argv: list[str] | None = None) -> int:
    found, args = arguments(argv)
    print(markdown(found, args.view or ()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
