"""What the programs of the gallery share: the command line, training that stops and resumes, and
the report of a held-out metric beside its baseline.

A program says what is its own in a :class:`Task`, and hands :class:`Program` the function that
builds it.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import _path  # noqa: F401  (before what lies a folder above)
import rnnkernels as rk
from _cli import CtrlC, Parser, UsageError, blaming_backend, exit_code, whole
from _compare import in_turns
from _results import load_checkpoint, require_same, write_atomically
from _torch_nn import with_torch_nn

CELLS: dict[str, Callable[..., nn.Module]] = {
    "rnn": rk.RNN,
    "lstm": rk.LSTM,
    "gru": rk.GRU,
    "mgu": rk.MGU,
    "cifg": rk.CIFG,
    "peephole": rk.PeepholeLSTM,
}

DISTRIBUTIONS = {
    "ale_py": "ale-py",
    "espeakng_loader": "espeakng-loader",
    "kaldi_native_fbank": "kaldi-native-fbank",
    "silero_vad": "silero-vad",
    "sklearn": "scikit-learn",
}
"""By what name pip knows a package, where that is not the name of its module."""

Batch = tuple[Tensor, ...]


class Options(argparse.Namespace):
    """The command line that all programs have, typed."""

    cell: str
    backend: str | None
    seed: int
    quick: bool
    epochs: int
    checkpoint: Path
    resume: bool
    plot: Path


@dataclass
class Task:
    """What one program learns, from which data, and how well it should.

    Attributes:
        data: where the data come from and how much there is, in a line.
        model: the model to train.
        batches: gives the batches of one epoch, drawn with torch's own random numbers, so that
            a resumed run draws what the uninterrupted one would have.
        loss: the loss of a model on a batch, a scalar.
        evaluate: the metric of a model, without gradients, on data that it does not learn from.
        metric: the metric's name.
        show: how it is written, a format such as ``".1%"``.
        rises: whether more is better.
        baseline: what a far simpler method does, in words.
        baseline_value: its metric on the same data.
        optimizer: what learns from the gradients.
        lr: its learning rate.
        settles: whether the rate falls from epoch to epoch, to almost nothing in the last.
        decay: its weight decay.
        clip: largest norm of the gradient of all parameters; None for no bound.
        draw: draws what has been learnt beside the learning curve.
        finish: prints or writes more at the end.
    """

    data: str
    model: nn.Module
    batches: Callable[[], Iterable[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module], float]
    metric: str
    show: str
    rises: bool
    baseline: str
    baseline_value: float
    lr: float = 3e-3
    settles: bool = False
    decay: float = 0.01
    clip: float | None = 1.0
    draw: Callable[[Axes], object] | None = None
    finish: Callable[[], object] | None = None
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW

    def beaten_by(self, metric: float) -> bool:
        """Tell whether ``metric`` is better than the baseline's."""
        return metric > self.baseline_value if self.rises else metric < self.baseline_value


@dataclass
class Result:
    """How a run ended: ``history`` has the loss and the metric after each epoch."""

    task: Task
    history: list[dict[str, float]]
    parameters: int
    seconds: float
    finished: bool


@dataclass(frozen=True)
class Program:
    """A program of the gallery: run as a script by :meth:`main`, by others by :meth:`run`.

    Attributes:
        file: its ``__file__``.
        doc: its ``__doc__``, the first line of which is shown by ``--help``.
        build: builds the task from the command line, which decides on sizes too.
        epochs: epochs by default and with ``--quick``.
        cell: the cell by default.
        arguments: adds arguments of its own to the parser; a checkpoint keeps their values.
    """

    file: str
    doc: str | None
    build: Callable[[Any], Task]
    epochs: tuple[int, int]
    cell: str = "lstm"
    arguments: Callable[[argparse.ArgumentParser], object] = field(default=lambda parser: None)

    @property
    def name(self) -> str:
        """The file's name without suffix."""
        return Path(self.file).stem

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the command line; return its exit code."""
        return exit_code(f"{self.name}.py", lambda: 0 if self.run(argv).finished else 130)

    def parse(self, argv: Sequence[str] | None) -> tuple[Options, list[str]]:
        """Parse the command line; return it with the names that a resumed run must share."""
        parser = Parser(
            description=(self.doc or "").partition("\n")[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        add = parser.add_argument
        add("--cell", choices=tuple(CELLS), default=self.cell, help="of the recurrent layers")
        self.arguments(parser)
        add("--backend", metavar="NAME", default=argparse.SUPPRESS,
            help="backend of the layers (default: chosen by the library)")  # fmt: skip
        add("--seed", type=whole(0), default=0, metavar="N", help="of weights and batches")
        add("--quick", action="store_true", help="small data and model: a try in seconds")
        fixed = [
            action.dest for action in parser._actions if action.dest not in ("help", "backend")
        ]
        add("--epochs", type=whole(1), default=argparse.SUPPRESS, metavar="N",
            help="epochs in all (default: {}, {} with --quick)".format(*self.epochs))  # fmt: skip
        add("--checkpoint", type=Path, metavar="FILE", default=f"runs/gallery/{self.name}.pt",
            help="written after each epoch")  # fmt: skip
        add("--resume", action="store_true", help="continue exactly from --checkpoint")
        add("--plot", type=Path, metavar="FILE", default=f"runs/gallery/{self.name}.png",
            help="the picture, a PNG")  # fmt: skip
        options = parser.parse_args(argv, Options(backend=None, epochs=None))
        if options.resume:  # what the command line leaves open is as in the run that goes on
            theirs = load_checkpoint(options.checkpoint, f"{self.name}.py")["options"]
            parser.set_defaults(**{name: theirs[name] for name in fixed if name in theirs})
            options = parser.parse_args(argv, Options(backend=None, epochs=None))
        options.epochs = options.epochs or self.epochs[options.quick]
        return options, fixed

    def run(self, argv: Sequence[str] | None = None) -> Result:
        """Build, train, report and draw; raise :class:`UsageError` where that is impossible."""
        options, fixed = self.parse(argv)
        for name in ("checkpoint", "plot"):
            require_folder(name, getattr(options, name))
        torch.manual_seed(options.seed)
        task = self.build(options)
        optimizer = task.optimizer(task.model.parameters(), lr=task.lr, weight_decay=task.decay)
        history: list[dict[str, float]] = []
        if options.resume:
            checkpoint = load_checkpoint(options.checkpoint, f"{self.name}.py")
            require_same(options.checkpoint, checkpoint, options, fixed)
            if checkpoint.get("data") != task.data:
                raise UsageError(
                    f"argument --resume: {str(options.checkpoint)!r} was trained on other data "
                    f"({checkpoint.get('data')}); install the same, or leave --resume out"
                )
            task.model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            history = checkpoint["history"]
            torch.set_rng_state(checkpoint["rng"])

        parameters = sum(parameter.numel() for parameter in task.model.parameters())
        print(f"data:  {task.data}\nmodel: {options.cell}, {parameters:,} parameters", flush=True)
        start = time.perf_counter()

        def save() -> None:
            checkpoint = {
                "options": {name: getattr(options, name) for name in fixed},
                "data": task.data,
                "model": task.model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "history": history,
                "rng": torch.get_rng_state(),
            }
            write_atomically(options.checkpoint, lambda file: torch.save(checkpoint, file))

        finished = train(task, optimizer, history, options.epochs, save)
        result = Result(task, history, parameters, time.perf_counter() - start, finished)
        if finished:
            report(self.name, result, options.plot)
        elif history:
            print(f"Stopped; --resume continues after epoch {len(history)}.")
        else:
            print("Stopped in the first epoch; there is nothing to resume.")
        return result


def train(
    task: Task,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, float]],
    epochs: int,
    save: Callable[[], None],
) -> bool:
    """Train until ``history`` has so many epochs, saving after each; return False after Ctrl-C,
    which leaves the epoch that had begun out."""
    progress = tqdm(total=epochs, initial=len(history), unit="epoch", dynamic_ncols=True)
    with progress, CtrlC() as ctrl_c:
        while len(history) < epochs:
            losses = []
            task.model.train()
            left = 1 - len(history) / epochs if task.settles else 1.0
            for group in optimizer.param_groups:
                group["lr"] = task.lr * left
            for batch in task.batches():
                losses.append(step(task, optimizer, task.model, batch))
                progress.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
                progress.update(0)
                if ctrl_c.pressed:
                    return False
            history.append({"loss": sum(losses) / len(losses), "metric": evaluate(task)})
            save()
            progress.update()
            progress.write(
                f"epoch {len(history):3}: loss {history[-1]['loss']:.4f}, held-out "
                f"{task.metric} {history[-1]['metric']:{task.show}}"
            )
    return True


def step(task: Task, optimizer: torch.optim.Optimizer, model: nn.Module, batch: Batch) -> float:
    """Learn from a batch; return its loss."""
    optimizer.zero_grad()
    loss = task.loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    if task.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), task.clip)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def evaluate(task: Task) -> float:
    """Measure the model as it is."""
    task.model.eval()
    return task.evaluate(task.model)


def report(name: str, result: Result, plot: Path) -> None:
    """Print the metric beside the baseline, and draw how it was reached."""
    task, last = result.task, result.history[-1]["metric"]
    print(
        f"\nheld-out {task.metric}: {last:{task.show}} after {len(result.history)} epochs "
        f"(this run took {result.seconds:.0f} s)\nbaseline: {task.baseline_value:{task.show}}, "
        f"{task.baseline}{'' if task.beaten_by(last) else ', which is not beaten'}"
    )
    figure = Figure(figsize=(11 if task.draw else 5.5, 4), layout="constrained")
    axes = halves(figure) if task.draw else [figure.subplots()]
    epochs = range(1, len(result.history) + 1)
    axes[0].plot(epochs, [entry["metric"] for entry in result.history], "o-", label=name)
    axes[0].axhline(task.baseline_value, color="gray", linestyle="--", label=task.baseline)
    axes[0].set(xlabel="epoch", ylabel=f"held-out {task.metric}")
    axes[0].grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    if task.draw:
        with torch.no_grad():
            task.draw(axes[1])
    write_atomically(plot, lambda file: figure.savefig(file, format="png", dpi=120))
    print(f"wrote {plot}")
    if task.finish:
        with torch.no_grad():
            task.finish()


def halves(figure: Figure) -> list[Axes]:
    """Part a figure exactly in the middle: tiles of the documentation show the right half alone."""
    parts: Any = figure.subfigures(1, 2)
    return [part.subplots() for part in parts]


def step_times(task: Task) -> list[float]:
    """Time a training step with our layers and with torch.nn's, in turns, in milliseconds; with
    ours alone where torch.nn's cannot do what the task asks for."""
    batch = next(iter(task.batches()))
    models = [copy.deepcopy(task.model), with_torch_nn(copy.deepcopy(task.model))]
    steps = []
    for model in models:
        if model is None:
            continue
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr)
        steps.append(lambda m=model, o=optimizer: step(task, o, m, batch))
    return in_turns(steps, torch.device("cpu"))


def recurrent(options: Options, input_size: int, hidden_size: int, **more: Any) -> nn.Module:
    """Build layers of ``--cell`` on ``--backend``."""
    with blaming_backend(options.backend):
        return CELLS[options.cell](input_size, hidden_size, backend=options.backend, **more)


def with_cell_state(cell: str, h: Tensor) -> Any:
    """Complete h_0 to the state that a layer of ``cell`` starts from, whose c, if any, is zero."""
    return (h, torch.zeros_like(h)) if cell in ("lstm", "cifg", "peephole") else h


def package(module: str) -> Any:
    """Import a module of a package that the gallery takes data or a comparison from."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        raise UsageError(missing(DISTRIBUTIONS.get(name, name))) from error


def folder_of(module: str) -> Path:
    """Find the folder of a package whose files are wanted and whose code is not."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise UsageError(missing(DISTRIBUTIONS.get(module, module)))
    return Path(found.submodule_search_locations[0])


def missing(distribution: str) -> str:
    """Say how a package that is missing is installed."""
    return (
        f"this program needs the package {distribution}, which is not installed: "
        f"pip install {distribution} (or, for the whole gallery, pip install '.[gallery]')"
    )


def shuffled(batch_size: int, *tensors: Tensor) -> Iterable[Batch]:
    """Cut ``tensors``, which share their first dimension, into batches in a random order."""
    for rows in torch.split(torch.randperm(len(tensors[0])), batch_size):
        yield tuple(tensor[rows] for tensor in tensors)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows of ``logits`` ``[..., C]`` that are largest at the label."""
    return (logits.argmax(-1) == labels).double().mean().item()


def bits(loss: Tensor | float) -> float:
    """Convert nats to bits."""
    return float(loss) / math.log(2)


def require_folder(name: str, path: Path) -> None:
    """Make the folder that a file is to be written to."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"argument --{name}: expected a file to write to, but the folder of {str(path)!r} "
            f"cannot be made ({error.strerror}); name another"
        ) from error
    if path.is_dir():
        raise UsageError(
            f"argument --{name}: expected a file to write to, but {str(path)!r} is a folder; "
            "name a file in it"
        )
