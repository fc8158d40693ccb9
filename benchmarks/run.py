"""``python -m benchmarks.run``: our layers against torch.nn's on this machine's CPU."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import rnnkernels as rk
from benchmarks import cases, report, timing

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def shape(text: str) -> cases.Shape:
    try:
        return cases.Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Times our layers against torch.nn's on the CPU: the same weights and input, "
        "results compared first, runs interleaved, medians reported.",
    )
    parser.add_argument(
        "--layer", action="append", choices=sorted(cases.LAYERS), help="default: all; repeatable"
    )
    parser.add_argument(
        "--shape",
        action="append",
        type=shape,
        metavar="T,B,I,H",
        help="time, batch, input and hidden size; default: the suite; repeatable",
    )
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each; default: 7")
    parser.add_argument("--out", type=Path, help="write the record as JSON to this file")
    args = parser.parse_args(argv)
    for name in ("threads", "repeats"):
        least = 2 if name == "repeats" else 1
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(args, name)}")
    return args


def environment(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
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


def measure(layer: str, shape: cases.Shape, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    pair = cases.build(layer, shape, dtype)
    timing.check(pair, TOLERANCE[dtype])
    row: dict[str, Any] = {"layer": layer, "shape": str(shape)}
    for name, run in (("inference", timing.forward), ("training", timing.forward_backward)):
        result = timing.compare(run, pair, repeats)
        row[name] = {**vars(result), "ratio": result.ratio}
    return row


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    todo = [
        (layer, shape)
        for layer in args.layer or cases.LAYERS
        for shape in args.shape or cases.SUITE
    ]
    rows = [measure(layer, shape, dtype, args.repeats) for layer, shape in tqdm(todo, unit="case")]
    print(report.times(rows))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {**environment(args.threads), "dtype": args.dtype, "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
