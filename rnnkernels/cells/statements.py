"""The built-in cells once more, as :func:`rnnkernels.cell` takes them: what is made of them by a
transform of their graphs, as zoneout, starts here."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from rnnkernels.cells.definition import DefinedCell, define


def rnn_tanh(a: Any, *, h: Any) -> Any:
    return torch.tanh(a)


def rnn_relu(a: Any, *, h: Any) -> Any:
    return torch.relu(a)


def rnn_sigmoid(a: Any, *, h: Any) -> Any:
    return torch.sigmoid(a)


def lstm(i: Any, f: Any, g: Any, o: Any, *, h: Any, c: Any) -> Any:
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(r: Any, z: Any, n: Any, *, h: Any) -> Any:
    r, z = torch.sigmoid(r), torch.sigmoid(z)
    n = torch.tanh(n.x + r * n.h)
    return n + z * (h - n)


STATEMENTS = {f.__name__: f for f in (rnn_tanh, rnn_relu, rnn_sigmoid, lstm, gru)}


@cache
def stated(name: str) -> DefinedCell:
    """The cell of :data:`rnnkernels.cells.CELLS` with this name, as a written one."""
    return define(STATEMENTS[name])
