"""The small layers whose gradients through time are recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import rnnkernels

F64 = torch.float64
T, B, I, H = 7, 4, 3, 5
LENGTHS = [7, 2, 0, 5]  # of the B rows


def build(cell: str, layers: int = 1, **options: Any) -> nn.Module:
    """Layers of I inputs and H units with the cell of this name, the same weights every time."""
    torch.manual_seed(0)
    if cell.startswith("rnn"):
        options["nonlinearity"] = cell.removeprefix("rnn_")
    return getattr(rnnkernels, cell.split("_")[0].upper())(I, H, layers, dtype=F64, **options)
