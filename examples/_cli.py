"""Command lines, that of the character language model above all, and what Ctrl-C does to it."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch


class UsageError(Exception):
    """The command line asks for something impossible; the message names the argument."""


class Options(argparse.Namespace):
    """The command line, typed."""

    data: Path | None
    out: Path
    resume: Path | None
    cell: str
    layers: int
    hidden: int
    embedding: int
    dropout: float
    backend: str | None
    device: torch.device
    steps: int
    batch_size: int
    seq_len: int
    truncate: int | None
    lr: float
    seed: int
    eval_every: int
    prompt: str
    sample_length: int
    temperature: float
    no_compare: bool


FIXED = (
    "cell",
    "layers",
    "hidden",
    "embedding",
    "dropout",
    "batch_size",
    "seq_len",
    "truncate",
    "lr",
)
"""The options that a resumed run must share with the run it continues."""


def parse_options(
    argv: Sequence[str] | None,
    description: str,
    saved: Callable[[Path], Mapping[str, object]],
) -> Options:
    """Parse and check the command line; raise :class:`UsageError` where it makes no sense.

    ``saved`` reads the options of a checkpoint, which a run that goes on need not be given again.
    """
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    size, count = whole(1), whole(0)

    files = parser.add_argument_group("text and files")
    files.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="text file, or folder of text files, to learn from (default: the source text of "
        "Python's standard library)",
        default=argparse.SUPPRESS,
    )
    files.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs/char_lm"),
        help="folder for checkpoint.pt, metrics.json and bpc.png",
    )
    files.add_argument(
        "--resume",
        type=Path,
        metavar="PATH",
        nargs="?",
        const=Path(),
        default=argparse.SUPPRESS,
        help="continue exactly from this checkpoint, or from checkpoint.pt in this folder "
        "(without PATH: in --out)",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="lstm", help="layer type")
    model.add_argument("--layers", type=size, default=2, metavar="N", help="recurrent layers")
    model.add_argument("--hidden", type=size, default=256, metavar="N", help="size of the state")
    model.add_argument(
        "--embedding", type=size, default=64, metavar="N", help="size of a character's embedding"
    )
    model.add_argument(
        "--dropout", type=number(0, 0.95), default=0.0, metavar="P", help="dropout between layers"
    )
    model.add_argument(
        "--backend",
        metavar="NAME",
        help="backend of the rnnkernels layer (default: chosen by the library)",
        default=argparse.SUPPRESS,
    )
    model.add_argument(
        "--device", type=_device, default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1, ..."
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--steps", type=size, default=800, metavar="N", help="training steps in all"
    )
    training.add_argument(
        "--batch-size", type=size, default=32, metavar="B", help="text streams read side by side"
    )
    training.add_argument(
        "--seq-len", type=size, default=64, metavar="T", help="characters per stream and step"
    )
    training.add_argument(
        "--truncate",
        type=size,
        metavar="K",
        help="let gradients flow back inside windows of K characters only, so that one step can "
        "learn from a long --seq-len (default: through all of it)",
        default=argparse.SUPPRESS,
    )
    training.add_argument(
        "--lr", type=number(1e-8, 1), default=4e-3, metavar="RATE", help="learning rate of AdamW"
    )
    training.add_argument(
        "--seed", type=count, default=0, metavar="N", help="seed of the weights and of the sample"
    )
    training.add_argument(
        "--eval-every", type=size, default=100, metavar="N", help="steps between evaluations"
    )

    results = parser.add_argument_group("results")
    results.add_argument(
        "--prompt", default="def ", metavar="TEXT", help="text that the sample continues"
    )
    results.add_argument(
        "--sample-length", type=count, default=600, metavar="N", help="characters to generate"
    )
    results.add_argument(
        "--temperature",
        type=number(0, 10),
        default=0.8,
        metavar="X",
        help="of the sample: 0 always takes the likeliest character, 1 draws as the model predicts",
    )
    results.add_argument(
        "--no-compare",
        action="store_true",
        default=argparse.SUPPRESS,
        help="skip the timing against torch.nn",
    )

    def parse(**left_out: object) -> Options:
        truncate = left_out.pop("truncate", None)
        options = Options(data=None, resume=None, backend=None, truncate=truncate, no_compare=False)
        parser.set_defaults(**left_out)
        parser.parse_args(argv, namespace=options)
        if options.resume == Path():
            options.resume = options.out
        if options.resume is not None and options.resume.is_dir():
            options.resume = options.resume / "checkpoint.pt"
        return options

    options = parse()
    if options.resume is not None:
        theirs = saved(options.resume)
        options = parse(**{name: theirs[name] for name in FIXED if name in theirs})
    if options.dropout > 0 and options.layers == 1:
        raise UsageError(
            f"argument --dropout: acts between layers, so {options.dropout} needs --layers 2 or "
            "more; add a layer or leave --dropout out"
        )
    return options


def exit_code(program: str, run: Callable[[], int]) -> int:
    """Run a program and return its exit code: its own, 2 for a wrong use, 130 for Ctrl-C."""
    try:
        return run()
    except UsageError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


@contextmanager
def blaming_backend(backend: str | None) -> Iterator[None]:
    """While layers are built: an error is one of ``--backend`` where that was given."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if backend is None:
            raise
        raise UsageError(f"argument --backend: {error}") from error


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that raises :class:`UsageError` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists all arguments")


def whole(minimum: int) -> Callable[[str], int]:
    """Make an argument type: whole numbers from ``minimum`` on."""

    def convert(text: str) -> int:
        if text.isascii() and text.isdigit() and minimum <= int(text) < 2**31:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least {minimum}, got {text!r}"
        )

    return convert


def number(minimum: float, maximum: float) -> Callable[[str], float]:
    """Make an argument type: numbers from ``minimum`` to ``maximum``."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if minimum <= value <= maximum:
            return value
        raise argparse.ArgumentTypeError(
            f"expected a number from {minimum:g} to {maximum:g}, got {text!r}"
        )

    return convert


def _device(text: str) -> torch.device:
    """Convert the name of a device that can compute here."""
    try:
        device = torch.device(text)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise argparse.ArgumentTypeError(
            f"expected a device that works here, got {text!r} ({reason}); try 'cpu'"
        ) from error
    return device


class CtrlC:
    """While active, Ctrl-C only sets ``pressed``, so that training stops between two steps.

    A second Ctrl-C interrupts at once.
    """

    pressed = False

    def __enter__(self) -> CtrlC:
        self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
