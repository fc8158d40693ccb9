"""The record of a run: its surroundings and rows, as JSON."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

import rnnkernels as rk
from benchmarks.device import Device

Record = dict[str, Any]

#: Of the files: what it means to read one written by another version.
FORMAT = 2

#: What every reader counts on: of a record, and of each of its rows.
_HEAD = ("commit", "device", "processor", "threads", "torch", "rnnkernels")
_ROW = ("suite", "cell", "shape", "dtype", "mode", "results", "refused", "wrong")


def environment(device: str, found: Device, threads: int) -> Record:
    """What the figures depend on."""
    return {
        "format": FORMAT,
        "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": device,
        **found.describe(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rnnkernels": rk.__version__,
        "build": rk.build_info(),
    }


def _commit() -> str:
    """With ``-dirty`` where files differ from it; empty outside of a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    return done.stdout.strip()


def write(path: Path, record: Record) -> None:
    """Writes it, a line per row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({**record, "rows": []}, indent=1).removesuffix("[]\n}")
    rows = ",\n  ".join(json.dumps(row) for row in record["rows"])
    path.write_text(f"{head}[\n  {rows}\n ]\n}}\n")


def read(path: Path) -> Record:
    """A record of :data:`FORMAT`.

    Raises:
        ValueError: it is none, or cannot be read.
    """
    try:
        record = json.loads(path.read_text())
        found, rows = record["format"], record["rows"]
        if found == FORMAT:  # what the rest is called in another, only that one knows
            itemgetter(*_HEAD)(record)
            for row in rows:
                itemgetter(*_ROW)(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a record that --out wrote: {error!r}") from error
    if found != FORMAT:
        raise ValueError(f"{path}: expected a record of format {FORMAT}, got {found!r}")
    result: Record = record
    return result


def described(record: Record) -> str:
    """One line for the reader of a table or a plot."""
    where = record.get("gpu") or record["processor"]
    capability = record.get("build", {}).get("cpu_capability")
    if capability and record["device"] == "cpu":
        where += f" ({capability})"
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in record["rows"]))
    threads = f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}"
    return f"{where}, {threads}, torch {record['torch']}, {dtypes}"


def source(record: Record) -> str:
    """The same, with the version that was measured."""
    return f"{described(record)}; rnnkernels {record['commit'] or record['rnnkernels']}"
