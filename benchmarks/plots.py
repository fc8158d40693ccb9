"""``python -m benchmarks.plots RECORD --out FOLDER``: a record as pictures."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
except ModuleNotFoundError as error:
    sys.exit(f"benchmarks.plots needs {error.name}: pip install tqdm matplotlib")

from benchmarks import providers, record
from benchmarks.cases import Shape, label
from benchmarks.figures import Rows, cells, in_modes, ours, ratio, title
from benchmarks.record import Record

COLOURS = {"RNN": "#1f77b4", "LSTM": "#d62728", "GRU": "#2ca02c"}
PARTS = {
    "input projection": "#7fa7d1",
    "forward recurrent product": "#e9787a",
    "forward cell": "#f6c3c2",
    "backward recurrent product": "#f4a253",
    "backward cell": "#fbd9b0",
    "weight gradients": "#7dba76",
    "dx": "#bfe0bb",
    "overhead": "#9d9492",
    "unexplained": "#d9d4d1",
}
#: What a line stands for along each axis of suite ``scaling``, and how its value is found.
AXES: dict[str, tuple[str, str, Callable[[Any, Shape], float]]] = {
    "H": ("H = I", "µs per step", lambda ms, shape: 1e3 * ms / shape.T),
    "T": ("T", "µs per step", lambda ms, shape: 1e3 * ms / shape.T),
    "B": ("B", "µs per step and row", lambda ms, shape: 1e3 * ms / shape.T / shape.B),
    "threads": ("threads", "ms", lambda ms, shape: ms),
}


def modes(rows: Rows) -> list[str]:
    found = in_modes(rows, "inference", "forward", "training")
    return list(dict.fromkeys(row["mode"] for row in found))


def figure(found: Record, width: float, height: float) -> Figure:
    """An empty picture that names what it was measured on."""
    made = Figure(figsize=(width, height), layout="constrained")
    made.supxlabel(record.described(found), fontsize=8, color="0.45")
    return made


def plain(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(made: Figure, handles: list[Any], columns: int | None = None) -> None:
    made.legend(
        handles=handles,
        loc="outside upper center",
        ncols=columns or len(handles),
        frameon=False,
        fontsize=9,
    )


def speedup(found: Record, rows: Rows) -> Figure:
    """torch.nn / ours by shape: bars that rise from 1 where ours is faster, and fall where not."""
    rows = [row for row in rows if ratio(row)]
    shown, names = modes(rows), cells(rows)
    cases = list(dict.fromkeys(map(title, rows)))
    made = figure(found, max(6.0, 1.25 * len(cases)), 2.9 * len(shown) + 0.6)
    axes = made.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.8 / len(names)
    for ax, mode in zip(axes, shown, strict=True):
        values = []
        for row in in_modes(rows, mode):
            value = ratio(row) or 1.0
            values.append(value)
            at = cases.index(title(row)) + (names.index(row["cell"]) - (len(names) - 1) / 2) * width
            colour, up = COLOURS[row["cell"]], value >= 1
            ax.bar(at, value - 1, width * 0.92, bottom=1, color=colour)
            ax.annotate(
                f"{value:.{0 if value >= 10 else 1 if up else 2}f}",
                (at, value),
                (0, 2 if up else -2),
                textcoords="offset points",
                ha="center",
                va="bottom" if up else "top",
                fontsize=7,
                color="0.25",
            )
        ax.set_yscale("log")
        low, high = min(0.7, 0.8 * min(values)), 1.35 * max(1.5, *values)
        ax.set_yticks([2.0**i for i in range(-6, 10) if low <= 2.0**i <= high])
        ax.set_ylim(low, high)
        ax.yaxis.set_minor_locator(NullLocator())
        plain(ax.yaxis)
        ax.axhline(1, color="0.3", linewidth=0.8)
        ax.set_ylabel(f"{mode}\ntorch.nn time / ours")
        ax.grid(axis="y", alpha=0.25)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xticks(range(len(cases)), cases, fontsize=8, rotation=20 if len(cases) > 9 else 0)
    axes[-1].set_xlabel("T,B,I,H")
    legend(made, [Patch(color=COLOURS[name], label=name) for name in names])
    return made


def _lines(ax: Any, rows: Rows, variant: str) -> None:
    """A solid line for ours and a dashed one for torch.nn, per cell, with the quartiles."""
    _, _, value = AXES[variant]
    for cell in cells(rows):
        points: dict[str, list[tuple[float, ...]]] = {}
        for row in rows:
            shape = Shape.parse(row["shape"])
            at = row.get("threads", 0) if variant == "threads" else getattr(shape, variant)
            for name in (providers.BASELINE, ours(row)):
                if row["cell"] == cell and name in row["results"]:
                    quartiles = statistics.quantiles(row["results"][name]["samples_ms"], n=4)
                    point = at, *(value(ms, shape) for ms in quartiles)
                    points.setdefault(str(name), []).append(point)
        for name, line in points.items():
            x, low, middle, high = (list(column) for column in zip(*sorted(line), strict=True))
            style = "--" if name == providers.BASELINE else "-"
            ax.plot(x, middle, style, color=COLOURS[cell], marker="o", markersize=3, linewidth=1.6)
            ax.fill_between(x, low, high, color=COLOURS[cell], alpha=0.12, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ticks = sorted({point for line in ax.get_lines() for point in line.get_xdata()})
    ax.set_xticks(ticks)
    plain(ax.xaxis)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plain(ax.yaxis)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _along(found: Record, rows: Rows, variants: tuple[str, ...]) -> Figure:
    shown = [v for v in variants if any(row.get("variant") == v for row in rows)]
    kinds = modes(rows)
    panels = [(mode, variant) for mode in kinds for variant in shown]
    across = len(kinds) if len(shown) == 1 else len(shown)
    down = len(panels) // across
    made = figure(found, 3.6 * across + 0.4, 3.1 * down + 0.6)
    for ax, (mode, variant) in zip(
        made.subplots(down, across, squeeze=False).flat, panels, strict=True
    ):
        chosen = [row for row in in_modes(rows, mode) if row.get("variant") == variant]
        _lines(ax, chosen, variant)
        axis, unit, _ = AXES[variant]
        fixed = Shape.parse(chosen[0]["shape"])
        sizes = {"T": fixed.T, "B": fixed.B, "H": fixed.H}
        sizes.pop(variant, None)
        ax.set_title(f"{mode}, {', '.join(f'{k}={v}' for k, v in sizes.items())}", fontsize=10)
        ax.set_xlabel(axis)
        ax.set_ylabel(unit)
    handles: list[Any] = [Patch(color=COLOURS[name], label=name) for name in cells(rows)]
    handles.append(Line2D([], [], color="0.3", label="rnnkernels"))
    handles.append(Line2D([], [], color="0.3", linestyle="--", label="torch.nn"))
    legend(made, handles)
    return made


def per_step(found: Record, rows: Rows) -> Figure:
    return _along(found, rows, ("H",))


def scaling(found: Record, rows: Rows) -> Figure:
    return _along(found, rows, ("T", "B", "threads"))


def _stack(ax: Any, at: float, shares: dict[str, float], measured: bool) -> float:
    """One bar of parts in percent; gives its end."""
    left = 0.0
    look = {"alpha": 1.0 if measured else 0.55, "edgecolor": "white", "linewidth": 0.6}
    for name, share in shares.items():
        ax.barh(at, share, 0.36 if measured else 0.26, left=left, color=PARTS[name], **look)
        if measured and share >= 6:
            where = left + share / 2, at
            ax.text(*where, f"{share:.0f}", ha="center", va="center", fontsize=8, color="0.1")
        left += share
    return left


def breakdown(found: Record, rows: Rows) -> Figure:
    """Two bars per case, both in percent of its time: the parts, and below them their floors."""
    rows = [row for row in rows if "parts" in row]
    made = figure(found, 9, 0.85 * len(rows) + 1.6)
    ax = made.subplots()
    used: dict[str, None] = {}
    for place, row in enumerate(rows):
        scale = 100 / row["results"]["total"]["ms"]
        parts = {part["name"]: scale * max(0.0, part["ms"]) for part in row["parts"]}
        parts["unexplained"] = scale * max(0.0, row["unexplained_ms"])
        floors = {part["name"]: scale * part["floor_ms"] for part in row["parts"]}
        _stack(ax, place - 0.17, parts, True)
        end = _stack(ax, place + 0.2, floors, False)
        ax.text(end + 0.8, place + 0.2, "floor", va="center", fontsize=7, color="0.4")
        used |= dict.fromkeys(parts)
    names = [f"{label(r)}\n{r['mode']}, {r['results']['total']['ms']:.3g} ms" for r in rows]
    ax.set_yticks(range(len(rows)), names, fontsize=8)
    ax.invert_yaxis()
    ax.axvline(100, color="0.3", linewidth=0.8)
    ax.set_xlabel("% of the measured total")
    ax.spines[["top", "right"]].set_visible(False)
    legend(made, [Patch(color=PARTS[name], label=name) for name in PARTS if name in used], 5)
    return made


#: Pictures by the name of their file: the suite that they need rows of, and how they are drawn.
PLOTS: dict[str, tuple[str, Callable[[Record, Rows], Figure]]] = {
    "speedup": ("suite", speedup),
    "per_step": ("scaling", per_step),
    "scaling": ("scaling", scaling),
    "breakdown": ("breakdown", breakdown),
}


def draw(found: Record, folder: Path) -> list[Path]:
    """Writes every picture that the record has rows for, and gives the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (suite, make) in PLOTS.items():
        rows = [row for row in found["rows"] if row["suite"] == suite and row["mode"] != "memory"]
        if rows:
            path = folder / f"{name}.png"
            make(found, rows).savefig(path, dpi=130, metadata={"Software": None})
            written.append(path)
    return written


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("record", type=Path, help="a JSON file that --out wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the PNGs")
    args = parser.parse_args(argv)
    try:
        found = record.read(args.record)
    except ValueError as error:
        parser.error(f"record: {error}")
    written = draw(found, args.out)
    if not written:
        needed = ", ".join(dict.fromkeys(suite for suite, _ in PLOTS.values()))
        parser.error(f"record: expected rows of a suite among {needed}, got none")
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
