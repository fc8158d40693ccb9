"""Elman's cells, of one gate: a function of the sum (Elman 1990)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rnnkernels.cells.contract import Cell, Values


def elman(
    name: str, value: Callable[[Tensor], Tensor], gradient: Callable[[Tensor, Tensor], Tensor]
) -> Cell:
    """``h' = f(gx + gh)`` (Elman 1990); ``gradient(y, dy)`` is ``f'`` in terms of its result."""

    def forward(gx: Values, gh: Values, prev: Values) -> tuple[Values, Values]:
        return [value(gx[0] + gh[0])], []

    def backward(
        saved: Values, prev: Values, next: Values, dnext: Values
    ) -> tuple[Values, Values, Values]:
        d = gradient(next[0], dnext[0])
        return [d], [d], [torch.zeros_like(d)]

    def tangents(
        saved: Values, prev: Values, next: Values, dgx: Values, dgh: Values, dprev: Values
    ) -> Values:
        return []  # nothing is saved

    return Cell(
        name,
        "h",
        S=1,
        K=0,
        A=0,
        reads_h=True,
        forward=forward,
        backward=backward,
        tangents=tangents,
    )


RNN_TANH = elman("rnn_tanh", torch.tanh, lambda y, dy: dy * (1 - y * y))
# Where y is NaN, dy goes on, as in torch: a zero would hide what went wrong.
RNN_RELU = elman("rnn_relu", torch.relu, lambda y, dy: torch.where(y <= 0, 0, dy))
RNN_SIGMOID = elman("rnn_sigmoid", torch.sigmoid, lambda y, dy: dy * y * (1 - y))
