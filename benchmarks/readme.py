"""``python -m benchmarks.readme RECORD...``: puts tables from records into README.md and docs/.

A document says where each table goes, by the name of a view of ``benchmarks.report``, behind which
may stand the one variant that it is about::

    <!-- benchmarks: suite -->
    whatever stands here is replaced
    <!-- /benchmarks -->

Every record that has rows for a table gets one, in the order of the records: of one processor
after the other. A table that none of them has rows for is left as it is.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record, report
from benchmarks.record import Record

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"(<!-- benchmarks: ([\w-]+)(?: ([\w-]+))? -->\n).*?(<!-- /benchmarks -->)", re.DOTALL
)


def block(name: str, variant: str, found: Record, path: Path, document: Path) -> str | None:
    """A view, and what it was measured on; None where the record has no rows for it."""
    text = report.view(name, found, variant)
    if text is None:
        return None
    where = path.resolve()
    link = f"`{path.name}`"
    if where.is_relative_to(ROOT):
        link = f"[{path.name}]({os.path.relpath(where, document.resolve().parent)})"
    source = f"Measured on {record.source(found)}; record {link}."
    return f"{text}\n\n{textwrap.fill(source, 120, break_on_hyphens=False)}"


def updated(document: Path, records: Sequence[tuple[Path, Record]]) -> tuple[str, list[str]]:
    """The text of a document with new tables, and the names of those without a record.

    Raises:
        ValueError: a name is no view, or a mark has no end.
    """
    old, missing = document.read_text(), []
    marks = re.findall(r"<!-- benchmarks: (.*?) -->", old)
    if len(marks) != len(BLOCK.findall(old)) or len(marks) != old.count("<!-- /benchmarks -->"):
        raise ValueError(
            f"{document}: expected every '<!-- benchmarks: NAME -->' line to be followed by a "
            "'<!-- /benchmarks -->' of its own"
        )

    def replaced(match: re.Match[str]) -> str:
        start, name, variant, end = match.groups(default="")
        if name not in report.VIEWS:
            raise ValueError(
                f"{document}: expected a view among {', '.join(report.VIEWS)}, got {name!r}"
            )
        texts = [block(name, variant, found, path, document) for path, found in records]
        measured = [text for text in texts if text is not None]
        if measured:
            return start + "\n\n".join(measured) + f"\n{end}"
        missing.append(f"{name} {variant}".rstrip())
        return match.group()

    return BLOCK.sub(replaced, old), missing


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "record", type=Path, nargs="+", help="each with rows for a table has one there"
    )
    parser.add_argument(
        "--document",
        type=Path,
        action="append",
        metavar="FILE",
        help="repeatable; default: README.md and all of docs/",
    )
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a table is old")
    args = parser.parse_args(argv)
    documents = args.document or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    old = []
    try:
        records = [(path, record.read(path)) for path in args.record]
        texts = {document: updated(document, records) for document in documents}
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for document, (text, missing) in texts.items():
        for name in missing:
            print(f"{document}: no record has rows for {name}: left as it is", file=sys.stderr)
        if text != document.read_text():
            old.append(document)
            print(f"{document}: {'out of date' if args.check else 'updated'}")
            if not args.check:
                document.write_text(text)
    return 1 if args.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
