"""docs/compatibility.md: tries what torch offers with our layers and with torch.nn's.

    python tools/compatibility.py                      # tries all rows, compares with the page
    python tools/compatibility.py --write              # and writes the page anew
    python tools/compatibility.py --section Export --only onnx --verbose

Exit status 1: a row that the page says our layers pass failed now.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from compat.compiling import compiling
from compat.dtypes import dtypes
from compat.export import export
from compat.hooks import hooks
from compat.parameters import parameters
from compat.registry import FAILS, LIBRARIES, PASSES, Outcome, Row, Section
from compat.surroundings import surroundings
from compat.transforms import autograd, func

PAGE = Path(__file__).resolve().parents[1] / "docs/compatibility.md"
SECTIONS: tuple[Section, ...] = (
    export,
    dtypes,
    hooks,
    parameters,
    autograd,
    func,
    compiling,
    surroundings,
)

#: What each library gave, in the order of LIBRARIES.
Results = dict[Row, tuple[Outcome, ...]]

HEAD = """\
# Compatibility

What of torch works with the layers and cells of rnnkernels, and with torch.nn's. Written by

    python tools/compatibility.py --write

with torch {torch}, on a CPU: {rows} rows, of which ours pass {ours} and torch.nn's {theirs}. A row
stands for all layers and cells that it makes sense for, and passes where all of them do, with the
same numbers as without the feature. *n/a*: torch.nn has no such thing. Without `--write` the
command fails where a row that passes here does not any more; `--verbose` tells why rows fail.
"""


def chosen(section: str | None, only: str) -> list[Row]:
    """The rows of a section, of all if None, whose title has `only` in it."""
    return [
        row
        for each in SECTIONS
        if section in (None, each.name)
        for row in each.rows
        if only.lower() in row.title.lower()
    ]


def tried(rows: Sequence[Row], say: Callable[[str], None], verbose: bool) -> Results:
    results: Results = {}
    for row in rows:
        results[row] = outcomes = tuple(row.attempt(library) for library in LIBRARIES)
        say(f"{row.section}: {row.title}: {' | '.join(outcome.word for outcome in outcomes)}")
        for library, outcome in zip(LIBRARIES, outcomes, strict=True):
            if verbose and outcome.reason:
                say(f"    {library.name}: {' '.join(outcome.reason.split())[:400]}")
    return results


def page(results: Results) -> str:
    """The document: a table per section."""
    passed = [sum(found[i].word == PASSES for found in results.values()) for i in range(2)]
    parts = [
        HEAD.format(
            torch=torch.__version__, rows=len(results), theirs=passed[0], ours=passed[1]
        ).rstrip("\n")
    ]
    for section in SECTIONS:
        lines = [
            f"| | {' | '.join(library.name for library in LIBRARIES)} |",
            "| --- | --- | --- |",
        ]
        for row in section.rows:
            if row in results:
                words = " | ".join(outcome.word for outcome in results[row])
                lines.append(f"| {row.title} | {words} |")
        parts.append(f"## {section.name}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def promised(text: str) -> set[tuple[str, str]]:
    """Section and title of every row that a page says ours pass."""
    found, section = set(), ""
    for line in text.splitlines():
        if heading := re.match(r"## (.+)", line):
            section = heading[1]
        cells = re.match(r"\| (.+) \| [^|]+ \| ([^|]+) \|$", line)
        if cells and cells[2] == PASSES:
            found.add((section, cells[1]))
    return found


def broken(results: Results, text: str) -> list[Row]:
    """Rows that a page says ours pass, and that failed; what is not installed has not."""
    known = promised(text)
    return [
        row
        for row, outcomes in results.items()
        if (row.section, row.title) in known and outcomes[1].word == FAILS
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in SECTIONS]
    parser.add_argument("--section", choices=names, help="try the rows of this section alone")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with this in their title")
    parser.add_argument("--write", action="store_true", help="write docs/compatibility.md anew")
    parser.add_argument("--verbose", action="store_true", help="tell why rows fail")
    parser.add_argument("--list", action="store_true", help="list the rows, and try none")
    arguments = parser.parse_args(argv)
    if arguments.write and (arguments.section or arguments.only):
        parser.error("--write writes the whole page: leave out --section and --only")
    rows = chosen(arguments.section, arguments.only)
    if not rows:
        parser.error(f"--only: no row has {arguments.only!r} in its title; --list shows all")
    if arguments.list:
        print("\n".join(f"{row.section}: {row.title}" for row in rows))
        return 0
    results = tried(rows, lambda line: print(line, flush=True), arguments.verbose)
    before = PAGE.read_text("utf-8") if PAGE.exists() else ""
    failures = broken(results, before)
    for row in failures:
        print(
            f"{row.section}: {row.title}: passes in {PAGE.name}, and failed: "
            f"{results[row][1].reason}",
            file=sys.stderr,
        )
    if arguments.write:
        PAGE.write_text(page(results), "utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
