"""docs/compatibility.md: tries what torch offers with our layers and with torch.nn's.

    python tools/compatibility.py                      # tries all rows, compares with the page
    python tools/compatibility.py --write              # and writes the page anew
    python tools/compatibility.py --section Export --only onnx --verbose
    python tools/compatibility.py --quick              # ours alone, what takes no more than moments

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
from compat.distributed import distributed
from compat.dtypes import dtypes
from compat.export import export
from compat.hooks import hooks
from compat.inductor import inductor
from compat.libraries import libraries
from compat.module_database import database
from compat.parameters import parameters
from compat.registry import (
    FAILS,
    LIBRARIES,
    MISSING,
    PASSES,
    Library,
    Outcome,
    Row,
    Section,
)
from compat.subclasses import subclasses
from compat.surroundings import surroundings
from compat.training import training
from compat.transforms import autograd, func
from compat.vmaps import vmaps

PAGE = Path(__file__).resolve().parents[1] / "docs/compatibility.md"
SECTIONS: tuple[Section, ...] = (
    export,
    dtypes,
    hooks,
    training,
    parameters,
    subclasses,
    autograd,
    func,
    vmaps,
    compiling,
    inductor,
    distributed,
    database,
    surroundings,
    libraries,
)

#: What each library gave, by its name.
Results = dict[Row, dict[str, Outcome]]
OURS = next(library.name for library in LIBRARIES if library.ours)

HEAD = """\
# Compatibility

What of torch works with the layers and cells of rnnkernels, and with torch.nn's. Written by

    python tools/compatibility.py --write

with torch {torch}, on a CPU: {rows} rows, of which ours pass {ours} and torch.nn's {theirs}. A row
stands for all layers and cells that it makes sense for, and passes where all of them do, with the
same numbers as without the feature. *n/a*: torch.nn has no such thing. Without `--write` the
command fails where a row that passes here does not any more; `--verbose` tells why rows fail.
"""


def chosen(section: str | None, only: str, quick: bool = False) -> list[Row]:
    """The rows of a section, of all if None, whose title has `only` in it. The quick ones need no
    other package, no compiler of C++ and no further processes."""
    return [
        row
        for each in SECTIONS
        if section in (None, each.name)
        for row in each.rows
        if only.lower() in row.title.lower() and not (quick and (row.costly or row.needs))
    ]


def tried(
    rows: Sequence[Row],
    say: Callable[[str], None],
    verbose: bool,
    libraries: Sequence[Library] = LIBRARIES,
) -> Results:
    results: Results = {}
    for row in rows:
        results[row] = outcomes = {each.name: row.attempt(each) for each in libraries}
        words = " | ".join(outcome.word for outcome in outcomes.values())
        say(f"{row.section}: {row.title}: {words}")
        for name, outcome in outcomes.items():
            if outcome.reason and (verbose or outcome.word == MISSING):
                say(f"    {name}: {' '.join(outcome.reason.split())[:400]}")
    return results


def page(results: Results) -> str:
    """The document: a table per section."""
    theirs, ours = (
        sum(found[each.name].word == PASSES for found in results.values()) for each in LIBRARIES
    )
    head = HEAD.format(torch=torch.__version__, rows=len(results), theirs=theirs, ours=ours)
    parts = [head.rstrip("\n")]
    for section in SECTIONS:
        lines = [
            f"| | {' | '.join(library.name for library in LIBRARIES)} |",
            "| --- | --- | --- |",
        ]
        for row in section.rows:
            if row in results:
                words = " | ".join(results[row][each.name].word for each in LIBRARIES)
                lines.append(f"| {row.title} | {words} |")
        exceptions = [
            f"*{row.title}*: {row.exception}"
            for row in section.rows
            if row.exception and row in results and results[row][OURS].word == FAILS
        ]
        parts.append("\n\n".join([f"## {section.name}", "\n".join(lines), *exceptions]))
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
        if (row.section, row.title) in known and outcomes[OURS].word == FAILS
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in SECTIONS]
    parser.add_argument("--section", choices=names, help="try the rows of this section alone")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with this in their title")
    parser.add_argument("--write", action="store_true", help="write docs/compatibility.md anew")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="our layers alone, without the rows that need another package, a compiler of C++ or "
        "further processes",
    )
    parser.add_argument("--verbose", action="store_true", help="tell why rows fail")
    parser.add_argument("--list", action="store_true", help="list the rows, and try none")
    arguments = parser.parse_args(argv)
    if arguments.write and (arguments.section or arguments.only):
        parser.error("--write writes the whole page: leave out --section and --only")
    if arguments.write and arguments.quick:
        parser.error("--write writes the whole page: leave out --quick")
    rows = chosen(arguments.section, arguments.only, arguments.quick)
    if not rows:
        parser.error(f"--only: no row has {arguments.only!r} in its title; --list shows all")
    if arguments.list:
        print("\n".join(f"{row.section}: {row.title}" for row in rows))
        return 0
    libraries = [each for each in LIBRARIES if each.ours or not arguments.quick]
    results = tried(rows, lambda line: print(line, flush=True), arguments.verbose, libraries)
    before = PAGE.read_text("utf-8") if PAGE.exists() else ""
    failures = broken(results, before)
    for row in failures:
        print(
            f"{row.section}: {row.title}: passes in {PAGE.name}, and failed: "
            f"{results[row][OURS].reason}",
            file=sys.stderr,
        )
    if arguments.write:
        PAGE.write_text(page(results), "utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
