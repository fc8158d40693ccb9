"""What the rows of a record say, and how tables write it down."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from benchmarks import providers
from benchmarks.cases import label
from benchmarks.contest import Row

Rows = list[Row]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def title(row: Row) -> str:
    """The case of a row without its cell: what rows of several cells share."""
    return label(row).removeprefix(row["cell"] + " ")


def ways(rows: Rows) -> list[str]:
    """All that took part in some row, in order."""
    return list(dict.fromkeys(name for row in rows for name in row["results"]))


def ours(row: Row) -> str | None:
    """The first of our ways that was measured."""
    return next((name for name in row["results"] if name.startswith(providers.OURS)), None)


def ratio(row: Row, measure: str = "ms") -> float | None:
    """torch.nn's figure divided by ours: how many times faster, or smaller, ours is."""
    results, name = row["results"], ours(row)
    if name is None or providers.BASELINE not in results:
        return None
    mine = results[name][measure]
    return float(results[providers.BASELINE][measure] / mine) if mine else None


def mean(ratios: Iterable[float | None]) -> float | None:
    """The geometric mean of those that there are."""
    logs = [math.log(r) for r in ratios if r is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def milliseconds(row: Row, name: str) -> str:
    """Median and half the distance between the quartiles."""
    if name not in row["results"]:
        return "wrong" if name in row["wrong"] else "refused" if name in row["refused"] else "–"
    found = row["results"][name]
    digits = 3 if found["ms"] < 1 else 2 if found["ms"] < 100 else 0
    return f"{found['ms']:.{digits}f} ± {50 * found['spread']:.0f} %"


def in_modes(rows: Rows, *modes: str) -> Rows:
    return [row for row in rows if row["mode"] in modes]


def cells(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["cell"] for row in rows))


def share(row: Row, name: str) -> float | None:
    """Of the rate of a large matrix product that a way reaches."""
    if name not in row["results"] or "gemm" not in row.get("floors", {}):
        return None
    return float(row["gflop"] / row["results"][name]["ms"] * 1e3 / row["floors"]["gemm"]["rate"])
