"""Renews the tables of docs/reliability.md from the records of tools/fuzz.py and tools/soak.py.

python tools/reliability.py            # writes the page
python tools/reliability.py --check    # exit status 1 where that would change it
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/reliability.md"
RECORDS = ROOT / "docs/reliability"


def fuzz(record: dict[str, Any]) -> str:
    kinds = record["kinds"]
    found = sum(n for kind, n in kinds.items() if kind not in CALM)
    rows = [
        ("inputs", record["inputs"]),
        ("accepted and compared with the reference: right", kinds.get("compared", 0)),
        ("accepted, with nothing to compare with", kinds.get("accepted", 0)),
        ("refused, by an error that names an argument", kinds.get("refused", 0)),
        ("refused for memory", kinds.get("memory", 0)),
        ("found wrong, unclear, hanging or crashing", found),
    ]
    return table(("", "inputs"), rows) + said(record)


CALM = ("accepted", "compared", "refused", "memory")


def soak(record: dict[str, Any]) -> str:
    rows: list[tuple[Any, ...]] = [
        (
            f"{row['layer']}: {row['threads']} threads, {row['streams']} streams, "
            f"{row['chunks']} chunks, weights loaded {row['reloads']} times",
            f"memory grew by {row['growth_mib']:.1f} MiB after the first fifth; streams off by "
            f"{row['off_by']:.0e}; {len(row['faults'])} faults",
        )
        for row in record["serve"]["rows"]
    ]
    short, kill = record["memory"], record["kill"]
    rows.append(
        (
            f"{short['limit_mib']} MiB of addresses to spare",
            f"{short['calls']} training steps ran, {short['refused']} were refused, by "
            f"{', '.join(short['by'])}; small calls right after each",
        )
    )
    rows.append(
        (
            f"{kill['killed']} processes killed while they compiled a cell",
            "the next one compiled it, the one after that loaded it" if kill["held"] else "FAILED",
        )
    )
    return table(("load", "what happened"), rows) + said(record)


def table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def said(record: dict[str, Any]) -> str:
    build = record["build"].get("cpu_capability", "")
    seconds = f" in {record['seconds']} s" if "seconds" in record else ""
    return (
        f"\n\n`{record['command']}`{seconds}, {record['date']}, torch {record['torch']}, {build}; "
        f"rnnkernels {record['commit']}."
    )


MAKERS = {"fuzz": fuzz, "fuzz-sanitized": fuzz, "soak": soak}


def renewed(text: str) -> str:
    """The page with its tables as the records have them; without a record, as it was."""

    def block(match: re.Match[str]) -> str:
        path = RECORDS / f"{match[1]}.json"
        if not path.exists():
            return match[0]
        body = MAKERS[match[1]](json.loads(path.read_text("utf-8")))
        return f"<!-- record: {match[1]} -->\n{body}\n<!-- /record -->"

    pattern = r"<!-- record: ([\w-]+) -->\n.*?<!-- /record -->"
    return re.sub(pattern, block, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    text = PAGE.read_text("utf-8")
    new = renewed(text)
    if args.check:
        return int(new != text)
    PAGE.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
