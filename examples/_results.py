"""Files that a run leaves behind, written whole or not at all, and checkpoints read back."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from _cli import FIXED, Options, UsageError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file, then put it in the place of ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Write ``metrics`` as JSON."""
    text = json.dumps(metrics, indent=2) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def save_curve(path: Path, history: list[dict[str, float]], title: str) -> None:
    """Draw held-out and training bits per character over the training steps, as PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (
        ("train_bpc", "training text (running mean)", "o--"),
        ("held_out_bpc", "held-out text", "o-"),
    ):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axes.plot([x for x, _ in points], [y for _, y in points], style, label=label)
    axes.set(title=title, xlabel="training step", ylabel="bits per character")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def load_checkpoint(path: Path, program: str = "this program") -> dict[str, Any]:
    """Read a checkpoint of ``program``: a dict with ``"options"``, and weights only."""
    try:
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
        checkpoint["options"]
    except FileNotFoundError as error:
        raise UsageError(
            f"argument --resume: expected a checkpoint, but {str(path)!r} does not exist; "
            "name the file, or leave --resume out to start afresh"
        ) from error
    except (
        OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, pickle.PickleError
    ) as error:  # fmt: skip
        raise UsageError(
            f"argument --resume: expected a checkpoint of {program}, but {str(path)!r} cannot "
            "be read as one; name another file, or leave --resume out to start afresh"
        ) from error
    return checkpoint


def require_same(
    path: Path, checkpoint: dict[str, Any], options: argparse.Namespace, names: Sequence[str]
) -> None:
    """Check that ``checkpoint``, read from ``path``, has those ``options`` by ``names``."""
    theirs = checkpoint["options"]
    for name in names:
        ours = getattr(options, name)
        if theirs.get(name) != ours:
            raise UsageError(
                f"argument --resume: {str(path)!r} was made with {_given(name, theirs.get(name))}, "
                f"but this run has {_given(name, ours)}; make them equal, or leave --resume out"
            )


def read_checkpoint(path: Path, options: Options, text: str) -> dict[str, Any]:
    """Read a checkpoint of the same model on the same ``text`` (a fingerprint of it)."""
    checkpoint = load_checkpoint(path)
    require_same(path, checkpoint, options, FIXED)
    if checkpoint.get("text") != text:
        raise UsageError(
            f"argument --resume: {str(path)!r} was trained on another text than this run's --data; "
            "name the same, unchanged text, or leave --resume out"
        )
    return checkpoint


def _given(name: str, value: object) -> str:
    """Say how an option is given on the command line."""
    flag = "--" + name.replace("_", "-")
    if value is None or value is False:
        return f"no {flag}"
    return flag if value is True else f"{flag} {value}"
