"""A row of the table that run_all.py prints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Row:
    """How a program did; ``ours`` and ``torch_nn`` are milliseconds of a training step, or of a
    call where nothing is trained; None where not measured, or where torch.nn has no such call."""

    program: str
    data: str
    parameters: int | None
    metric: str
    value: str
    baseline: str
    baseline_value: str
    seconds: float
    ours: float | None = None
    torch_nn: float | None = None
