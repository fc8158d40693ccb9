"""``python -m rnnkernels``: what is installed here, what runs where, and whether it is right."""

from __future__ import annotations

import argparse
import sys

import torch

import rnnkernels
from rnnkernels.diagnostics._report import report


def main(arguments: list[str] | None = None) -> int:
    """Prints what is here; returns 1 where a check has failed, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m rnnkernels",
        description="Tells versions, build, processor, GPUs, and which backend runs layers on each "
        "device: what to put into a report of a fault.",
        epilog="Exit codes: 0, 1 where a check has failed, 2 for wrong arguments.",
    )
    parser.add_argument("--version", action="version", version=rnnkernels.__version__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="run all kernels on small cases against the reference, on every device: seconds on a "
        "CPU, minutes on a GPU",
    )
    wanted = parser.parse_args(arguments)
    print(report(rnnkernels.__version__))
    if not wanted.check:
        return 0
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    print()
    return 0 if all([rnnkernels.verify(device).ok for device in devices]) else 1


if __name__ == "__main__":
    sys.exit(main())
