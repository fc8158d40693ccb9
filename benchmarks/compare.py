"""``python -m benchmarks.compare OLD NEW``: what changed between two records.

A figure is the median time of one way through one case, or the peak of torch's allocator there.
It has changed where the two medians are further apart than the quartiles are in either record:
than the larger of the two distances from the lower to the upper quartile. (Tables print half of
that distance after the ±.) Peaks are the same in every run: any difference is a change.

Of seven samples each, one figure in a hundred gets worse by that rule though nothing but normal
noise is between the records, and more on a busy machine: measure again what is named, before you
look for its reason.

With ``--relative``, a figure is that of a way divided by torch.nn's in the same row, median and
quartiles of the ratios that the rounds give. A machine that is slower today, or is another one,
slows both of them down. What has no torch.nn beside it is left out and counted.

Exit status: 0; or 1 if a figure of ours got worse, or was right and is wrong or refused now; or 2
for wrong arguments, files that are no records, and records that cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks import figures, providers, record, serving, timing
from benchmarks.cases import Case, label
from benchmarks.contest import Row
from benchmarks.record import Record

#: What the names of others' ways begin with; all that is not theirs is ours.
THEIRS = (*providers.COMPARABLE, *serving.PEERS)


@dataclass(frozen=True)
class Figure:
    """Lower is better; ``spread`` is the distance between the quartiles, in the same unit."""

    value: float
    spread: float
    text: str


@dataclass(frozen=True)
class Change:
    """Two figures of the same way through the same case; ``row`` is the new one's."""

    row: Row
    way: str
    old: Figure
    new: Figure

    @property
    def ratio(self) -> float | None:
        """How many times better it is now; below 1, it is worse."""
        return self.old.value / self.new.value if self.new.value else None

    @property
    def verdict(self) -> str:
        """``worse`` or ``better``, beyond the spread; else empty."""
        by = self.new.value - self.old.value
        if abs(by) <= max(self.old.spread, self.new.spread):
            return ""
        return "worse" if by > 0 else "better"

    @property
    def got_worse(self) -> bool:
        """Ours alone: that others do is no fault of the code."""
        return ours(self.way) and self.verdict == "worse"


def surroundings(found: Record) -> dict[str, object]:
    """Where these differ between two records, times say nothing about the code.

    Virtual machines hide the names of their processors: what instructions there are tells more.
    """
    names = ("device", "processor", "gpu", "threads", "torch", "cuda", "cudnn", "tf32")
    fields = {name: found.get(name) for name in (*names, "tf32_matmul")}
    return {**fields, "cpu_capability": found.get("build", {}).get("cpu_capability")}


def ours(way: str) -> bool:
    return not way.startswith(THEIRS)


def key(row: Row) -> tuple[object, ...]:
    """The same for rows that measured the same."""
    case = (row.get(field.name, field.default) for field in fields(Case))
    return (row["suite"], row["mode"], *case)


def name(row: Row) -> str:
    """Tells a row from every other of its record."""
    variant, dtype = row.get("variant", ""), row["dtype"]
    parts = [f"{row['suite']}:", variant, label(row), row["mode"]]
    return " ".join([*filter(None, parts), *([dtype] if dtype != "float32" else [])])


def figure(row: Row, way: str) -> Figure | None:
    """That of a way; None where there is none."""
    found = row["results"][way]
    if row["mode"] == "memory":
        peak = found.get("peak_mib")
        return None if peak is None else Figure(peak, 0.0, f"{peak:.3f} MiB")
    text = figures.milliseconds(row, way)
    return Figure(found["ms"], found["ms"] * found["spread"], f"{text} ms")


def relative(row: Row, way: str, base: str) -> Figure | None:
    """That of a way divided by that of another; without samples, their spreads add up."""
    mine, other = figure(row, way), figure(row, base)
    if mine is None or other is None or not mine.value or not other.value:
        return None
    value = mine.value / other.value
    spread = mine.spread / mine.value + other.spread / other.value
    rounds = [row["results"][each].get("samples_ms", ()) for each in (way, base)]
    if len(rounds[0]) == len(rounds[1]) > 1:
        found = timing.summary([a / b for a, b in zip(*rounds, strict=True)])
        value, spread = found["ms"], found["spread"]
    return Figure(value, value * spread, f"{value:.3f} ± {50 * spread:.0f} %")


def baseline(way: str, among: Sequence[str]) -> str | None:
    """That of torch.nn with the same setting after the comma, or else its first."""
    found = [other for other in among if other.startswith(providers.BASELINE)]
    same = [other for other in found if other.partition(", ")[2] == way.partition(", ")[2]]
    return next(iter([*same, *found]), None)


def changes(old: Record, new: Record, to_torch: bool = False) -> list[Change]:
    """Of all ways that both have measured; ``to_torch``: relative to torch.nn, with it left out."""
    before = {key(row): row for row in old["rows"]}
    found = []
    for row in new["rows"]:
        was = before.get(key(row), {"results": {}})
        both = [way for way in row["results"] if way in was["results"]]
        for way in both:
            base = baseline(way, both)
            if not to_torch:
                a, b = figure(was, way), figure(row, way)
            elif base is not None and not way.startswith(providers.BASELINE):
                a, b = relative(was, way, base), relative(row, way, base)
            else:
                continue
            if a is not None and b is not None:
                found.append(Change(row, way, a, b))
    return found


def missing(there: Record, here: Record) -> list[str]:
    """The rows of one record that another lacks, each with the ways that it lacks of it."""
    known = {key(row): row["results"] for row in here["rows"]}
    lines = []
    for row in there["rows"]:
        ways = [way for way in row["results"] if way not in known.get(key(row), ())]
        if ways:
            lines.append(f"{name(row)} ({', '.join(ways)})")
    return lines


def lost(old: Record, new: Record) -> list[str]:
    """What of ours was measured, and is wrong or refused now, with the reasons."""
    before = {key(row): row["results"] for row in old["rows"]}
    return [
        f"{name(row)}, {way}: {what}: {reason}"
        for row in new["rows"]
        for what in ("wrong", "refused")
        for way, reason in row[what].items()
        if ours(way) and way in before.get(key(row), ())
    ]


def every(found: Sequence[Change]) -> str:
    lines = [
        [name(c.row), c.way, c.old.text, c.new.text, figures.number(c.ratio, 3), c.verdict]
        for c in found
    ]
    return figures.table(["case", "way", "old", "new", "old / new", "beyond the spread"], lines)


def means(found: Sequence[Change]) -> str:
    groups: dict[tuple[str, ...], list[Change]] = {}
    for c in found:
        group = (c.row["suite"], c.row["cell"], c.row["mode"], c.way)
        groups.setdefault(group, []).append(c)
    lines = [
        [
            *group,
            str(len(members)),
            figures.number(figures.mean(c.ratio for c in members), 3),
            *(str(sum(c.verdict == v for c in members)) for v in ("worse", "better")),
        ]
        for group, members in groups.items()
    ]
    head = ["suite", "cell", "mode", "way", "figures", "geometric mean of old / new"]
    return figures.table([*head, "worse", "better"], lines)


def summary(found: Sequence[Change], absolute: Sequence[Change]) -> str:
    """How many of ours changed, and how torch.nn moved meanwhile."""
    mine = [c for c in found if ours(c.way)]
    worse, better = (sum(c.verdict == v for c in mine) for v in ("worse", "better"))
    text = f"{worse} of {len(mine)} figures of ours are worse beyond their spread, {better} better."
    timed = [
        c.ratio
        for c in absolute
        if c.way.startswith(providers.BASELINE) and c.row["mode"] != "memory"
    ]
    if timed:
        mean = figures.number(figures.mean(timed), 3)
        text += f" torch.nn's own times: old / new {mean}, the geometric mean of {len(timed)}."
    return text


def listed(title: str, lines: Sequence[str]) -> list[str]:
    """A part of the report with a line for each; no part without lines."""
    if not lines:
        return []
    return ["\n".join([f"## {title}: {len(lines)}", "", *(f"* {line}" for line in lines)])]


def markdown(old: Record, new: Record, to_torch: bool) -> tuple[str, int]:
    """The report, and the exit status.

    Raises:
        ValueError: the records cannot be compared.
    """
    was, now = surroundings(old), surroundings(new)
    differ = [field for field in was if was[field] != now[field]]
    if differ and not to_torch:
        field = differ[0]
        raise ValueError(
            f"{field}: expected the same in both records, got {was[field]!r} and {now[field]!r}; "
            "--relative compares what is relative to torch.nn"
        )
    absolute = changes(old, new)
    found = changes(old, new, True) if to_torch else absolute
    gone = lost(old, new)
    if not found and not gone:
        beside = " that has torch.nn beside it" if to_torch else ""
        raise ValueError(f"expected records with a figure{beside} in common, got none")
    parts = [f"* old: {record.source(old)}\n* new: {record.source(new)}"]
    if to_torch:
        alone = sum(not c.way.startswith(providers.BASELINE) for c in absolute) - len(found)
        parts.append(f"Relative to torch.nn. Figures without it, left out: {alone}.")
    worse = [c for c in found if c.got_worse]
    parts += [
        f"## every figure\n\n{every(found)}",
        f"## means\n\n{means(found)}",
        *listed("only in old", missing(old, new)),
        *listed("only in new", missing(new, old)),
        *listed("wrong or refused now", gone),
        *listed(
            "worse beyond the spread",
            [f"{name(c.row)}, {c.way}: {c.old.text} -> {c.new.text}" for c in worse],
        ),
        summary(found, absolute),
    ]
    return "\n\n".join(parts), 1 if worse or gone else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for which in ("old", "new"):
        parser.add_argument(which, type=Path, metavar=which.upper(), help="a file of --out")
    parser.add_argument(
        "--relative",
        action="store_true",
        help="compare what is relative to torch.nn in the same run, in place of times; also of "
        "records from different machines",
    )
    args = parser.parse_args(argv)
    try:
        text, status = markdown(record.read(args.old), record.read(args.new), args.relative)
    except ValueError as error:
        parser.error(str(error))
    print(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
