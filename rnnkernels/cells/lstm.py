"""LSTM (Hochreiter and Schmidhuber 1997), with the forget gate of Gers et al. 2000."""

from __future__ import annotations

import torch

from rnnkernels.cells.contract import Cell, Values


def forward(gx: Values, gh: Values, prev: Values) -> tuple[Values, Values]:
    i = torch.sigmoid(gx[0] + gh[0])
    f = torch.sigmoid(gx[1] + gh[1])
    g = torch.tanh(gx[2] + gh[2])
    o = torch.sigmoid(gx[3] + gh[3])
    c = f * prev[1] + i * g
    return [o * torch.tanh(c), c], [i, f, g, o]


def backward(
    saved: Values, prev: Values, next: Values, dnext: Values
) -> tuple[Values, Values, Values]:
    i, f, g, o = saved
    tanh_c = torch.tanh(next[1])
    dc = dnext[1] + dnext[0] * o * (1 - tanh_c * tanh_c)
    d = [
        dc * g * i * (1 - i),
        dc * prev[1] * f * (1 - f),
        dc * i * (1 - g * g),
        dnext[0] * tanh_c * o * (1 - o),
    ]
    return d, d, [torch.zeros_like(dc), dc * f]


def tangents(
    saved: Values, prev: Values, next: Values, dgx: Values, dgh: Values, dprev: Values
) -> Values:
    i, f, g, o = saved
    d = [x + h for x, h in zip(dgx, dgh, strict=True)]
    return [d[0] * i * (1 - i), d[1] * f * (1 - f), d[2] * (1 - g * g), d[3] * o * (1 - o)]


LSTM = Cell(
    "lstm",
    "ifgo",
    S=2,
    K=4,
    A=0,
    reads_h=False,
    forward=forward,
    backward=backward,
    tangents=tangents,
)
