"""A cell of one's own: read a handwritten digit by pixel with a cell that exists nowhere else.

    python examples/gallery/own_cell.py               # the cell below
    python examples/gallery/own_cell.py --cell gru    # another one, on the same task

Beside its state h each unit has a slow trace s of it, whose rate is learnt, and adds that to what
its gates are made of: a minimal gated unit that feels where it has been for a while. That is ten
lines of Python, from which kernels, derivatives and all options of the layers follow (see
docs/cells.md). Data, model and baseline are those of digits.py.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

import digits
import rnnkernels as rk
from _gallery import CELLS, Program


def slow_to_fast(rate: Tensor) -> None:
    """Fill logits of rates, from one in fifty steps to every second."""
    torch.linspace(-4, 0, len(rate), out=rate)


@rk.cell
def traced(f: Any, n: Any, *, h: Any, s: Any, rate: Any = rk.per_unit(slow_to_fast)) -> Any:
    """A gate f, a candidate n; a state h and its trace s."""
    f = torch.sigmoid(f + s)
    n = torch.tanh(n - s)
    h = (1 - f) * h + f * n
    return h, s + torch.sigmoid(rate) * (h - s)


CELLS["traced"] = rk.layer(traced)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Read one pixel a step, unless told otherwise."""
    digits.arguments(parser)
    parser.set_defaults(pixels=True)


PROGRAM = Program(__file__, __doc__, digits.build, (30, 15), "traced", arguments)
main = PROGRAM.main

if __name__ == "__main__":
    sys.exit(main())
