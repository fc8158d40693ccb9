"""What every benchmark asks for and writes down: options, surroundings, the record as JSON."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rnnkernels as rk


def add_options(parser: argparse.ArgumentParser, repeats: int = 7) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--threads", type=at_least(1), default=2, metavar="N", help="default: 2")
    parser.add_argument(
        "--repeats",
        type=at_least(2),
        default=repeats,
        metavar="N",
        help=f"runs of each; default: {repeats}",
    )
    parser.add_argument("--out", type=Path, help="write the record as JSON to this file")


def at_least(minimum: int) -> Callable[[str], int]:
    """The type of an argument: whole numbers from ``minimum`` on."""

    def convert(text: str) -> int:
        if text.isascii() and text.isdigit() and int(text) >= minimum:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least {minimum}, got {text!r}"
        )

    return convert


def environment(program: str, threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "command": " ".join([f"python -m {program}", *sys.argv[1:]]),
        "commit": commit or "unknown",
        "processor": processor(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rnnkernels": rk.__version__,
        "build": rk.build_info(),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
