"""What is measured: layers and cells, their sizes, and the work that they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import rnnkernels
from rnnkernels.cells import CELLS, Cell

LAYERS = ("RNN", "LSTM", "GRU")
SINGLE_STEPS = ("RNNCell", "LSTMCell", "GRUCell")
DTYPES = ("float32", "float64", "bfloat16", "float16")

#: What is done: no_grad; gradients recorded, forward only; forward and backward; what that takes.
MODES = ("inference", "forward", "training", "memory")


@dataclass(frozen=True)
class Shape:
    """Sizes of one case: T steps, B rows, I inputs, H hidden units."""

    T: int
    B: int
    I: int
    H: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From ``'T,B,I,H'``.

        Raises:
            ValueError: not four integers above zero.
        """
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != 4 or not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
            raise ValueError(f"expected four sizes above zero as T,B,I,H, got {text!r}")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.T},{self.B},{self.I},{self.H}"


def shapes(*texts: str) -> tuple[Shape, ...]:
    return tuple(map(Shape.parse, texts))


#: From single streams to wide batches; small states to states that leave the cache.
SUITE = shapes(
    "64,1,128,128",
    "256,8,128,256",
    "128,32,256,256",
    "128,64,128,512",
    "50,128,512,512",
    "1000,2,64,64",
    "35,20,650,650",
    "512,16,40,192",
)


@dataclass(frozen=True)
class Case:
    """One layer at one shape.

    ``threads``: 0 for those of the run. ``window``: of truncated BPTT. ``variant``: tells apart
    what a suite does in several ways with the same layer. ``heads``: blocks of W_hh.
    """

    cell: str
    shape: Shape
    directions: int = 1
    layers: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 0
    window: int = 0
    variant: str = ""
    heads: int = 1

    @property
    def single_step(self) -> bool:
        """Whether this is an ``nn.LSTMCell`` or the like."""
        return self.cell in SINGLE_STEPS

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def formula(self) -> Cell:
        """The cell."""
        name = self.cell.removesuffix("Cell").lower()
        found = CELLS.get("rnn_tanh" if name == "rnn" else name)
        return found or getattr(rnnkernels, self.cell).definition

    def gflop(self, mode: str) -> float:
        """All products, in 1e9 floating-point operations.

        Forward takes x through W_ih and h through W_hh; backward has two products for each: dx and
        dW_ih, the gates' gradients through W_hh and dW_hh. The one through W_hh that a sequence,
        or a window, spares at its first step is counted all the same.
        """
        T, B, I, H = self.shape.T, self.shape.B, self.shape.I, self.shape.H
        D = self.directions
        inputs = D * (I + (self.layers - 1) * D * H)
        hidden = D * self.layers * H / self.heads if self.formula.recurrent else 0
        times = 3 if mode in ("training", "memory") else 1
        return 2 * times * T * B * self.formula.G * H * (inputs + hidden) / 1e9

    def fields(self) -> dict[str, Any]:
        """For the record; what is left out has its default."""
        found: dict[str, Any] = {"cell": self.cell, "shape": str(self.shape), "dtype": self.dtype}
        for name in ("directions", "layers", "threads", "window", "variant", "heads"):
            if getattr(self, name) != getattr(Case, name):
                found[name] = getattr(self, name)
        return found

    def __str__(self) -> str:
        return label({**self.fields(), "threads": 0})


def label(fields: dict[str, Any]) -> str:
    """The name of a case in a table or a progress bar, from :meth:`Case.fields`."""
    parts = [fields["cell"], fields["shape"]]
    if fields.get("directions", 1) == 2:
        parts.append("bidirectional")
    if fields.get("layers", 1) > 1:
        parts.append(f"{fields['layers']} layers")
    if fields.get("heads", 1) > 1:
        parts.append(f"{fields['heads']} heads")
    if fields.get("window"):
        parts.append(f"k={fields['window']}")
    if fields.get("threads"):
        parts.append(f"{fields['threads']} thread{'s' if fields['threads'] > 1 else ''}")
    return " ".join(parts)
