"""Data parallel: a character language model in several processes, with the losses of one.

    torchrun --nproc-per-node 2 examples/gallery/data_parallel.py
    python examples/gallery/data_parallel.py             # alone, to the same losses

Each process reads its share of the streams and carries their states; DistributedDataParallel
averages the gradients. Layers of rnnkernels need nothing for this: their parameters are ordinary
ones. The text is that of Python's standard library, the model that of char_lm.py. Weights, text and
order depend on the seed alone, so that the losses are those of a single process but for rounding,
since sums have another order: in the last digits at first, in the third after hundreds of steps.
--losses writes them down.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import _path  # noqa: F401
from _cli import Parser, UsageError, exit_code, whole
from _gallery import CELLS, require_folder
from _results import save_metrics
from _row import Row
from _text import Streams, Vocabulary, read_corpus
from char_lm import CharLM, loss_of
from rnnkernels import streaming

STREAMS, STEPS = 16, 64


class Options(argparse.Namespace):
    """The command line, typed."""

    cell: str
    seed: int
    quick: bool
    steps: int
    losses: Path | None


def parse_options(argv: Sequence[str] | None) -> Options:
    """Parse and check the command line."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cell", choices=tuple(CELLS), default="lstm", help="of the layers")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the weights")
    parser.add_argument("--quick", action="store_true", help="a small model, few steps")
    parser.add_argument("--steps", type=whole(1), metavar="N", help="default: 300, or 20 if quick")
    parser.add_argument("--losses", type=Path, metavar="FILE", help="write them there, as JSON")
    options = parser.parse_args(argv, namespace=Options())
    options.steps = options.steps or (20 if options.quick else 300)
    return options


@contextmanager
def group() -> Iterator[tuple[int, int]]:
    """Join the processes that torchrun has started; give this one's number, and how many."""
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def run(argv: Sequence[str] | None) -> int:
    """Train; print the bits per character of all streams."""
    options = parse_options(argv)
    if options.losses is not None:
        require_folder("losses", options.losses)
    with group() as (rank, processes):
        if STREAMS % processes:
            raise UsageError(
                f"expected a number of processes that divides the {STREAMS} streams, got "
                f"{processes}; start torchrun with another --nproc-per-node"
            )
        losses = train(options, rank, processes)
        if rank == 0:
            first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
            print(
                f"{processes} process{'es' * (processes > 1)}, {options.steps} steps: "
                f"{first / math.log(2):.3f} bits per character at first, {last / math.log(2):.3f} "
                "in the end"
            )
            if options.losses is not None:
                save_metrics(options.losses, {"processes": processes, "losses": losses})
    return 0


def train(options: Options, rank: int, processes: int) -> list[float]:
    """Learn from this process' streams; return the losses of the streams of all."""
    torch.manual_seed(options.seed)
    corpus = read_corpus()
    vocabulary = Vocabulary.of(corpus.train)
    streams = Streams(vocabulary.encode(corpus.train), STREAMS, STEPS)
    hidden = 32 if options.quick else 192
    plain = CharLM(len(vocabulary), 32, hidden, CELLS[options.cell](32, hidden))
    model = DistributedDataParallel(plain) if processes > 1 else plain
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    own = slice(rank * STREAMS // processes, (rank + 1) * STREAMS // processes)
    losses, hx = [], None
    for index in tqdm(range(options.steps), unit="step", disable=rank > 0, dynamic_ncols=True):
        if index % streams.chunks == 0:
            hx = None  # the text begins again
        inputs, targets = (part[:, own] for part in streams.chunk(index % streams.chunks))
        optimizer.zero_grad()
        logits, state = model(inputs, hx)
        loss = loss_of(logits, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of the averages, the same everywhere
        optimizer.step()
        hx = streaming.detach(state)
        losses.append(mean_of_all(loss.detach(), processes))
    return losses


def mean_of_all(loss: Tensor, processes: int) -> float:
    """Average what each process has, of as many streams."""
    if processes > 1:
        dist.all_reduce(loss)
    return loss.item() / processes


def row(quick: bool) -> Row:
    """Run in two processes and alone, as run_all.py does."""
    more = ["--quick"] if quick else []
    ends, seconds = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            file = Path(folder) / f"{count}.json"
            start = time.perf_counter()
            command = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
            subprocess.run([sys.executable, *command, __file__, *more, f"--losses={file}"],
                           check=True)  # fmt: skip
            seconds = time.perf_counter() - start
            losses = json.loads(file.read_text())["losses"][-10:]
            ends.append(f"{sum(losses) / len(losses) / math.log(2):.4f}")
    return Row(
        "data_parallel",
        "Python's standard library, by character",
        None,
        "bits per character",
        ends[1],
        "one process, the same but for rounding",
        ends[0],
        round(seconds, 1),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return exit_code("data_parallel.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
