"""Data parallel: a character language model in several processes, with the losses of one.

    torchrun --nproc-per-node 2 examples/gallery/data_parallel.py
    python examples/gallery/data_parallel.py             # alone, to the same losses

Each process reads its share of the streams and carries their states; DistributedDataParallel
averages the gradients. Layers of rnnkernels need nothing for this: their parameters are ordinary
ones. The text is that of Python's standard library, the model that of char_lm.py. Weights, text and
order depend on the seed alone, so that the losses are those of a single process but for rounding,
since sums have another order: in the last digits at first, in the third after hundreds of steps.
--losses writes them down. A checkpoint has the states of all streams, so that as many processes
continue exactly, and another number of them but for rounding.
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
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import _path  # noqa: F401
from _cli import Parser, UsageError, exit_code, whole
from _gallery import CELLS, halves, recurrent, require_folder
from _results import load_checkpoint, require_same, save_metrics, write_atomically
from _row import Row
from _text import Streams, Vocabulary, read_corpus
from char_lm import CharLM, bits_per_character, loss_of
from rnnkernels import streaming

STREAMS, STEPS = 16, 64
FIXED = ("cell", "seed", "quick")


class Options(argparse.Namespace):
    """The command line, typed."""

    cell: str
    backend: str | None
    seed: int
    quick: bool
    steps: int
    losses: Path | None
    checkpoint: Path
    resume: bool
    plot: Path


def parse_options(argv: Sequence[str] | None) -> Options:
    """Parse and check the command line."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--cell", choices=tuple(CELLS), default="lstm", help="of the layers")
    add("--backend", metavar="NAME", help="of the layers (default: chosen by the library)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of the weights")
    add("--quick", action="store_true", help="a small model, few steps")
    add("--steps", type=whole(1), metavar="N", help="default: 300, or 20 if quick")
    add("--losses", type=Path, metavar="FILE", help="write them there, as JSON")
    add("--checkpoint", type=Path, metavar="FILE", default=Path("runs/gallery/data_parallel.pt"),
        help="written in the end (default: %(default)s)")  # fmt: skip
    add("--resume", action="store_true", help="continue from --checkpoint, to --steps in all")
    add("--plot", type=Path, metavar="FILE", default=Path("runs/gallery/data_parallel.png"),
        help="the picture, a PNG (default: %(default)s)")  # fmt: skip
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
    """Train; print the bits per character of text that was not learnt from."""
    options = parse_options(argv)
    for name in ("losses", "checkpoint", "plot"):
        if getattr(options, name) is not None:
            require_folder(name, getattr(options, name))
    with group() as (rank, processes):
        if STREAMS % processes:
            raise UsageError(
                f"expected a number of processes that divides the {STREAMS} streams, got "
                f"{processes}; start torchrun with another --nproc-per-node"
            )
        found = train(options, rank, processes)
        if rank == 0:
            many = f"{processes} process{'es' * (processes > 1)}"
            bits = f"{found['bits']:.4f} held-out bits per character"
            print(f"{many}, {options.steps} steps: {bits}; bigrams: {found['bigrams']:.4f}")
            draw(options.plot, {many: found["losses"]})
            if options.losses is not None:
                save_metrics(options.losses, found)
    return 0


def train(options: Options, rank: int, processes: int) -> dict[str, Any]:
    """Learn from this process' streams; return the losses of the streams of all, and the bits per
    character of held-out text."""
    torch.manual_seed(options.seed)
    corpus = read_corpus()
    vocabulary = Vocabulary.of(corpus.train)
    text, held_out = (vocabulary.encode(part) for part in (corpus.train, corpus.held_out))
    streams, unseen = Streams(text, STREAMS, STEPS), Streams(held_out[:20_000], STREAMS, STEPS)
    hidden = 32 if options.quick else 192
    plain = CharLM(len(vocabulary), 32, hidden, recurrent(options, 32, hidden))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(plain.parameters(), lr=4e-3)
    own = slice(rank * STREAMS // processes, (rank + 1) * STREAMS // processes)
    losses: list[float] = []
    hx: Any = None
    if options.resume:
        checkpoint = load_checkpoint(options.checkpoint, "data_parallel.py")
        require_same(options.checkpoint, checkpoint, options, FIXED)
        plain.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        losses = checkpoint["losses"]
        hx = on_each(lambda state: state[:, own].contiguous(), checkpoint["hx"])
    model = DistributedDataParallel(plain) if processes > 1 else plain
    start, before = time.perf_counter(), len(losses)
    for index in tqdm(range(before, options.steps), unit="step", disable=rank > 0,
                      dynamic_ncols=True):  # fmt: skip
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
    seconds = time.perf_counter() - start
    checkpoint = {
        "options": {name: getattr(options, name) for name in FIXED},
        "model": plain.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": losses,
        "hx": on_each(lambda state: of_all(state, processes), hx),
    }
    if rank == 0:
        write_atomically(options.checkpoint, lambda file: torch.save(checkpoint, file))
    return {
        "processes": processes,
        "losses": losses,
        "parameters": sum(parameter.numel() for parameter in plain.parameters()),
        "ms": 1e3 * seconds / max(1, len(losses) - before),
        "bits": bits_per_character(plain, unseen),
        "bigrams": bigram_bits(text, held_out[:20_000], len(vocabulary)),
    }


def on_each(change: Any, state: Any) -> Any:
    """Change h and, where there is one, c."""
    return tuple(map(change, state)) if isinstance(state, tuple) else change(state)


def of_all(state: Tensor, processes: int) -> Tensor:
    """Gather a state ``[layers, B, H]`` of every process' streams, in their order."""
    if processes == 1:
        return state
    parts = [torch.empty_like(state) for _ in range(processes)]
    dist.all_gather(parts, state.contiguous())
    return torch.cat(parts, 1)


def mean_of_all(loss: Tensor, processes: int) -> float:
    """Average what each process has, of as many streams."""
    if processes > 1:
        dist.all_reduce(loss)
    return loss.item() / processes


def bigram_bits(learnt: Tensor, held_out: Tensor, size: int) -> float:
    """Measure counts of what follows a character, each starting at one, in bits per character."""
    counts = 1 + torch.bincount(learnt[:-1] * size + learnt[1:], minlength=size**2).double()
    chances = counts.view(size, size) / counts.view(size, size).sum(1, keepdim=True)
    return -chances[held_out[:-1], held_out[1:]].log2().mean().item()


def draw(path: Path, runs: dict[str, list[float]]) -> None:
    """Draw the losses of runs by their names, and how far they are from the first."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = halves(figure)
    (_, first), *others = runs.items()
    for (name, losses), style in zip(runs.items(), ("-", "--"), strict=False):
        left.plot([loss / math.log(2) for loss in losses], style, label=name)
    left.set(xlabel="step", ylabel="training loss, bits per character")
    left.legend()
    for name, losses in others:
        right.semilogy([max(abs(a / b - 1), 1e-8) for a, b in zip(losses, first, strict=True)],
                       label=f"{name}, beside one")  # fmt: skip
        right.legend()
    right.set(xlabel="step", ylabel="relative difference of the loss")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def row(quick: bool, plot: Path) -> Row:
    """Run alone and in two processes, as run_all.py does."""
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            file = Path(folder) / f"{count}.json"
            paths = [f"--losses={file}", f"--plot={plot}", f"--checkpoint={file}.pt"]
            command = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
            subprocess.run([sys.executable, *command, __file__, *["--quick"] * quick, *paths],
                           check=True)  # fmt: skip
            runs[count] = json.loads(file.read_text())
    draw(plot, {"one process": runs[1]["losses"], "two processes": runs[2]["losses"]})
    one, two = runs[1], runs[2]
    return Row(
        f"Python's standard library, by character; one process ends at {one['bits']:.4f}",
        two["parameters"],
        "bits per character",
        f"{two['bits']:.4f}",
        "bigrams",
        f"{two['bigrams']:.4f}",
        two["bits"] < two["bigrams"],
        0.0,
        [two["ms"]],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return exit_code("data_parallel.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
