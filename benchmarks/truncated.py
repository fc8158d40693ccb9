"""``python -m benchmarks.truncated``: truncated BPTT in one call, against a loop over chunks.

Every case takes a whole sequence forward and backward, to the gradients of x and of all
parameters, in three ways: ``loop``, chunks of k steps on torch.nn with the state detached in
between; ``ours``, one call with ``truncate=k``; ``full``, one call of ours without truncation.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import cases, record, report, timing
from rnnkernels import streaming
from rnnkernels.cells import CELLS

WAYS = ("loop", "ours", "full")
TOLERANCE = 1e-4

#: Rows B and window k: the main case, then other windows, then other batches.
SUITE = ((8, 32), (8, 8), (8, 128), (1, 32), (64, 32))

#: The peak is measured on square float32 matrices of this size.
PEAK_SIZE = 2048


@dataclass(frozen=True)
class Case:
    """One layer at one shape, in windows of k steps."""

    cell: str
    shape: cases.Shape
    k: int

    def build(self) -> cases.Pair:
        return cases.build(self.cell, self.shape, torch.float32)

    @property
    def gflop(self) -> float:
        """All products of forward and backward, in 1e9 floating-point operations.

        Forward takes x through W_ih and h through W_hh; backward has two products for each: dx and
        dW_ih, the gates' gradients through W_hh and dW_hh. The one through W_hh that every window
        spares at its first step is counted all the same.
        """
        T, B, I, H = self.shape.T, self.shape.B, self.shape.I, self.shape.H
        gates = CELLS["rnn_tanh" if self.cell == "RNN" else self.cell.lower()].G
        return 2 * 3 * T * B * gates * H * (I + H) / 1e9


def chunk_loop(module: nn.Module, pair: cases.Pair, k: int) -> list[Tensor]:
    """Forward and backward chunk by chunk; the gradients add up over the sequence."""
    module.zero_grad()
    dx = torch.empty_like(pair.x)
    hx = None
    for x, dy, target in streaming.chunks((pair.x.detach(), pair.dy, dx), k):
        y, hx = module(x.requires_grad_(), hx)
        torch.autograd.backward(y, dy)
        assert x.grad is not None
        target.copy_(x.grad)
        hx = streaming.detach(hx)
    return [dx, *(p.grad for p in module.parameters() if p.grad is not None)]


def run(way: str, pair: cases.Pair, k: int) -> list[Tensor]:
    """The gradients of x and of all parameters, in one of :data:`WAYS`."""
    if way == "loop":
        return chunk_loop(pair.theirs, pair, k)
    options = {"truncate": k} if way == "ours" else {}
    return timing.forward_backward(pair.ours, pair, **options)


def peak_memory(way: str, case: Case, threads: int) -> float:
    """MiB by which the resident memory of a process grows, at most, in one run of its own.

    It is what the system counts: pages in use, whoever asked for them and in whatever steps an
    allocator takes them, beyond what layers, input and a run of two steps already hold. It is no
    sum of tensors. Where a peak cannot be forgotten (see :func:`_forget_peak`), what the process
    needed to start hides as much of it.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        return child.submit(_peak_memory, way, case, threads).result()


def _peak_memory(way: str, case: Case, threads: int) -> float:
    torch.set_num_threads(threads)
    short = cases.Shape(2, case.shape.B, case.shape.I, case.shape.H)
    run(way, Case(case.cell, short, 1).build(), 1)
    pair = case.build()
    _forget_peak()
    before = _peak()
    run(way, pair, case.k)
    return (_peak() - before) / 1024


def _forget_peak() -> None:
    """Sets the peak to what is in use now, where the system is Linux and allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """KiB; ``getrusage`` would tell the parent's peak where that was higher."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def measure(case: Case, repeats: int, threads: int) -> dict[str, Any]:
    """One row of the record, after a comparison of all gradients."""
    pair = case.build()
    timing.agree(run("ours", pair, case.k), run("loop", pair, case.k), TOLERANCE)
    a, b = torch.randn(2, PEAK_SIZE, PEAK_SIZE)
    runs: list[Callable[[], object]] = [partial(run, way, pair, case.k) for way in WAYS]
    runs.append(partial(torch.mm, a, b))
    *times, (peak_ms, peak_spread) = timing.in_turns(runs, repeats, pair.redraw)
    peak = 2 * PEAK_SIZE**3 / 1e6 / peak_ms  # GFLOP/s
    row: dict[str, Any] = {
        "layer": case.cell,
        "shape": str(case.shape),
        "window": case.k,
        "gflop": case.gflop,
        "peak": {"ms": peak_ms, "spread": peak_spread, "gflop_per_s": peak},
    }
    for way, (ms, spread) in zip(WAYS, times, strict=True):
        speed = case.gflop / ms * 1e3
        row[way] = {
            "ms": ms,
            "spread": spread,
            "gflop_per_s": speed,
            "share_of_peak": speed / peak,
            "peak_memory_mib": peak_memory(way, case, threads),
        }
    row["ratio"] = row["loop"]["ms"] / row["ours"]["ms"]
    row["ratio_at_peak"] = 1 / row["loop"]["share_of_peak"]
    return row


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.truncated",
        description="Times a whole sequence with truncated BPTT, forward and backward in float32 "
        "on the CPU: ours in one call against the loop over chunks on torch.nn, and ours without "
        "truncation. Gradients compared first, runs in turns on new random numbers, medians "
        "reported, with the speed of a large matrix product for scale.",
    )
    sizes = record.at_least(1)
    parser.add_argument(
        "--cell", action="append", choices=sorted(cases.LAYERS), help="default: all; repeatable"
    )
    parser.add_argument(
        "--batch", action="append", type=sizes, metavar="B", help="rows; repeatable"
    )
    parser.add_argument(
        "--window", action="append", type=sizes, metavar="K", help="steps per window; repeatable"
    )
    parser.add_argument(
        "--steps", type=sizes, default=1024, metavar="T", help="of the sequence; default: 1024"
    )
    parser.add_argument(
        "--hidden", type=sizes, default=256, metavar="H", help="input size too; default: 256"
    )
    record.add_options(parser)
    args = parser.parse_args(argv)
    for window in args.window or ():
        if window > args.steps:
            parser.error(f"argument --window: expected at most --steps {args.steps}, got {window}")
    return args


def selected(args: argparse.Namespace) -> list[Case]:
    """The suite, or all that ``--batch`` and ``--window`` ask for."""
    suite = list(SUITE)
    if args.batch or args.window:
        suite = list(product(args.batch or [8], args.window or [32]))
    return [
        Case(cell, cases.Shape(args.steps, B, args.hidden, args.hidden), k)
        for cell in args.cell or cases.LAYERS
        for B, k in suite
    ]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    todo = tqdm(selected(args), unit="case")
    rows = [measure(case, args.repeats, args.threads) for case in todo]
    print(report.truncated(rows))
    if args.out:
        found = record.environment("benchmarks.truncated", args.threads)
        record.write(args.out, {**found, "dtype": "float32", "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
