"""The cases: which layers at which sizes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import rnnkernels as rk

LAYERS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "RNN": (nn.RNN, rk.RNN),
    "LSTM": (nn.LSTM, rk.LSTM),
    "GRU": (nn.GRU, rk.GRU),
}


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
        parts = text.split(",")
        if len(parts) != 4 or not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
            raise ValueError(f"expected four sizes above zero as T,B,I,H, got {text!r}")
        return cls(*(int(p) for p in parts))

    def __str__(self) -> str:
        return f"{self.T},{self.B},{self.I},{self.H}"


#: From single streams to wide batches; small states to states that leave the cache.
SUITE = tuple(
    Shape.parse(text)
    for text in (
        "64,1,128,128",
        "256,8,128,256",
        "128,32,256,256",
        "128,64,128,512",
        "50,128,512,512",
        "1000,2,64,64",
        "35,20,650,650",
        "512,16,40,192",
    )
)


@dataclass(frozen=True)
class Pair:
    """The same layer twice, with the same weights: torch.nn's and ours, and input for both."""

    theirs: nn.Module
    ours: nn.Module
    x: torch.Tensor  # [T, B, I]
    dy: torch.Tensor  # [T, B, H]

    @torch.no_grad()
    def redraw(self) -> None:
        """Fills x and dy with new random numbers."""
        self.x.normal_()
        self.dy.normal_()


def build(layer: str, shape: Shape, dtype: torch.dtype, seed: int = 0) -> Pair:
    """A pair of equal layers with random weights and input."""
    torch.manual_seed(seed)
    their_class, our_class = LAYERS[layer]
    theirs = their_class(shape.I, shape.H, dtype=dtype)
    ours = our_class(shape.I, shape.H, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape.T, shape.B, shape.I, dtype=dtype, requires_grad=True)
    return Pair(theirs, ours, x, torch.randn(shape.T, shape.B, shape.H, dtype=dtype))


def add_options(parser: argparse.ArgumentParser, suite: Sequence[Shape]) -> None:
    """Options that select layers, shapes and a dtype; :func:`selected` reads them."""
    parser.add_argument(
        "--layer", action="append", choices=sorted(LAYERS), help="default: all; repeatable"
    )
    parser.add_argument(
        "--shape",
        action="append",
        type=_shape,
        metavar="T,B,I,H",
        help="time, batch, input and hidden size; repeatable; "
        f"default: {' '.join(map(str, suite))}",
    )
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")


def selected(args: argparse.Namespace, suite: Sequence[Shape]) -> list[tuple[str, Shape]]:
    """Every layer at every shape that the options ask for."""
    return [(layer, shape) for layer in args.layer or LAYERS for shape in args.shape or suite]


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
