"""Serving: where is there speech? A network with real weights, one call to convert, and its speed.

    python examples/gallery/voice_activity.py

silero-vad ships its weights in a TorchScript model, inside of which no layer can be exchanged. So
its network is built again from torch.nn's layers (_voice.py) and given to ``rnnkernels.convert``.
All answer the same on words that eSpeak NG says in many voices, with pauses between them, in noise.
What a step of 32 ms takes is measured in turns: a stream served step by step, many streams served
together, each with its state in a ``StreamRunner``, and a whole recording in one call. The baseline
calls all speech that is louder than a threshold, the one that suits best.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import _path  # noqa: F401
import rnnkernels as rk
from _cli import Parser, blaming_backend, exit_code, whole
from _compare import in_turns
from _gallery import require_folder
from _results import write_atomically
from _row import Row
from _talk import record
from _voice import SAMPLE_RATE, STEP, VoiceActivity, in_steps, load_shipped, rebuild
from rnnkernels.streaming import StreamRunner

Way = Callable[[Tensor], Tensor]


class Options(argparse.Namespace):
    """The command line, typed."""

    backend: str | None
    seed: int
    quick: bool
    plot: Path


def parse_options(argv: Sequence[str] | None) -> Options:
    """Parse and check the command line."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--backend", metavar="NAME", help="of the converted layer (default: chosen by the library)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of words, pauses and noise")
    add("--quick", action="store_true", help="fewer and shorter recordings")
    add("--plot", type=Path, metavar="FILE", default=Path("runs/gallery/voice_activity.png"),
        help="the picture, a PNG (default: %(default)s)")  # fmt: skip
    return parser.parse_args(argv, namespace=Options())


def best_threshold(samples: Tensor, truth: Tensor) -> float:
    """Return the accuracy of the loudness above which it is best to hear speech."""
    loudness = in_steps(samples).square().mean(2)
    right, total = [], truth.numel()
    for threshold in loudness.flatten().quantile(torch.linspace(0, 1, 101)):
        right.append(int(((loudness > threshold) == truth).sum()))
    return max(right) / total


def serve(model: Any, steps: Tensor) -> Tensor:
    """Run steps ``[T, B, ...]`` one call after another."""
    chances, hx = [], None
    for step in steps:
        chance, hx = model(step[None], hx)
        chances.append(chance[0])
    return torch.stack(chances)


class Server:
    """Serves many streams together, with their states in a ``StreamRunner``."""

    def __init__(self, model: VoiceActivity) -> None:
        """Serve by a converted model."""
        self.model, self.runner = model, StreamRunner(model.rnn)

    def serve(self, steps: Tensor) -> Tensor:
        """Open a stream for each row of steps ``[T, B, ...]``, run them step by step, and close
        the streams."""
        chances = []
        for step in steps:
            features = self.model.encode(step)
            y = self.runner.batch({index: row[None] for index, row in enumerate(features)})
            chances.append(self.model.answer(torch.cat([y[index] for index in range(len(step))])))
        for index in range(steps.shape[1]):
            self.runner.close(index)
        return torch.stack(chances)


def ways(shipped: Any, plain: Any, ours: Any, steps: Tensor) -> dict[str, tuple[Tensor, Way]]:
    """List what is compared: each on which steps, ``[T, B, ...]``."""
    some, more, server = steps[:20], steps[:100], Server(ours)
    one, streams = some[:, :1], f"{steps.shape[1]} streams together"

    def as_shipped(part: Tensor) -> Tensor:
        shipped.reset_states()
        return torch.stack([shipped(step[:, -STEP:], SAMPLE_RATE)[:, 0] for step in part])

    return {
        "one stream, as shipped": (one, as_shipped),
        "one stream, torch.nn": (one, lambda part: serve(plain, part)),
        "one stream, converted": (one, lambda part: serve(ours, part)),
        f"{streams}, as shipped": (some, as_shipped),
        f"{streams}, torch.nn": (some, lambda part: serve(plain, part)),
        f"{streams}, converted": (some, server.serve),
        "whole recordings, torch.nn": (more, lambda part: plain(part)[0]),
        "whole recordings, converted": (more, lambda part: ours(part)[0]),
    }


@torch.no_grad()
def measure(options: Options) -> Row:
    """Convert, compare, time and draw."""
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    require_folder("plot", options.plot)
    samples, truth = record(4, 1) if options.quick else record(16, 10)
    steps = in_steps(samples).contiguous()
    shipped = load_shipped()
    plain = rebuild(shipped)
    ours = rk.convert(copy.deepcopy(plain))
    layer = ours.get_submodule("rnn")
    assert isinstance(layer, rk.LSTM)
    with blaming_backend(options.backend):
        layer.backend = rk.LSTM(1, 1, backend=options.backend).backend
    compared = ways(shipped, plain, ours, steps)
    want = next(iter(compared.values()))[1](steps)
    difference = max(
        float((way(part) - want[: part.shape[0], : part.shape[1]]).abs().max())
        for part, way in tqdm(compared.values(), unit="way", dynamic_ncols=True)
    )
    times = in_turns([partial(way, part) for part, way in compared.values()], torch.device("cpu"))
    print(f"largest difference from the model as shipped: {difference:.1e}")
    each = {
        name: 1e3 * ms / (part.shape[0] * part.shape[1])
        for (name, (part, _)), ms in zip(compared.items(), times, strict=True)
    }
    for name, taken in each.items():
        print(f"{name:38} {taken:7.1f} \u00b5s a step and stream of 32 ms")
    value = float(((want > 0.5) == truth).double().mean())
    baseline = best_threshold(samples, truth)
    print(f"steps told rightly: {value:.1%}; by the best threshold of loudness: {baseline:.1%}")
    picture(options.plot, samples[0], want[:, 0], truth[:, 0])
    print(f"wrote {options.plot}")
    last = list(times)[-2:]
    return Row(
        f"silero-vad's weights; {steps.shape[1]} voices of eSpeak NG, {len(steps)} steps of each",
        sum(parameter.numel() for parameter in plain.parameters()),
        "steps told rightly",
        f"{value:.1%}",
        "the best threshold of loudness",
        f"{baseline:.1%}",
        value > baseline,
        time.perf_counter() - start,
        last[::-1],
    )


def picture(path: Path, samples: Tensor, chances: Tensor, truth: Tensor) -> None:
    """Draw a stream: what is heard, what is said of it, and what is true."""
    figure = Figure(figsize=(8.25, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(torch.arange(len(samples))[::8] / SAMPLE_RATE, samples[::8], linewidth=0.3)
    above.set(ylabel="samples")
    seconds = torch.arange(len(chances)) * STEP / SAMPLE_RATE
    below.plot(seconds, chances, label="chance of speech")
    below.fill_between(seconds, truth.float(), alpha=0.2, step="post", label="speech")
    below.set(xlabel="seconds")
    below.legend(fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def row(quick: bool, plot: Path) -> Row:
    """Run with defaults, as run_all.py does."""
    return measure(parse_options([f"--plot={plot}", *["--quick"] * quick]))


def run(options: Options) -> int:
    """Run the command line."""
    measure(options)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    return exit_code("voice_activity.py", lambda: run(parse_options(argv)))


if __name__ == "__main__":
    sys.exit(main())
