"""Layers of fixed random weights in float64, and sequences for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rnnkernels


@dataclass(frozen=True)
class Sizes:
    """Of the sequences of a test file, [T, B, I], and of the layers that take them."""

    T: int
    B: int
    I: int
    H: int

    def layer(self, kind: str = "LSTM", **options: Any) -> Any:
        torch.manual_seed(1)
        return getattr(rnnkernels, kind)(self.I, self.H, **options).double()

    def sequence(self, *shape: int) -> Tensor:
        """Normal numbers that require a gradient, of these sizes unless another shape is named."""
        generator = torch.Generator().manual_seed(2)
        shape = shape or (self.T, self.B, self.I)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
