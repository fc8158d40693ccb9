"""How a program of the gallery did, a row of the table that run_all.py prints and records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Row:
    """How a program did.

    Attributes:
        data: where the data come from and how much there is.
        parameters: of the model; None where that is not said.
        metric: the metric's name, of the model on data that it does not learn from.
        value: the model's, written out.
        baseline: what it is compared with.
        baseline_value: the metric of that, written out.
        beats: whether the model's is better; None where it is meant to be the same.
        seconds: of all that the program does.
        steps: milliseconds of a training step, or of a call where nothing is trained: of our
            layers, and of torch.nn's where these can do it; empty where not measured.
    """

    data: str
    parameters: int | None
    metric: str
    value: str
    baseline: str
    baseline_value: str
    beats: bool | None
    seconds: float
    steps: list[float]


def entry(
    row: Row, program: str, shape: str, arguments: list[str], cell: str, quick: bool
) -> dict[str, Any]:
    """Complete a row to an entry of a record that ``benchmarks`` reads."""
    name = " ".join([program, *arguments])
    command = f"python examples/gallery/{program}.py"
    results = dict(zip(("rnnkernels", "torch.nn"), ({"ms": ms} for ms in row.steps), strict=False))
    return {
        "suite": "gallery", "variant": program, "cell": cell, "shape": name, "dtype": "float32",
        "mode": "training", "of": shape, "quick": quick,
        "command": " ".join([command, *arguments, *["--quick"] * quick]),
        "data": row.data, "parameters": row.parameters, "metric": row.metric, "value": row.value,
        "baseline": row.baseline, "baseline_value": row.baseline_value, "beats": row.beats,
        "seconds": row.seconds, "results": results, "refused": {}, "wrong": {},
    }  # fmt: skip
