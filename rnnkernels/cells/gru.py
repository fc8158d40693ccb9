"""GRU (Cho et al. 2014), with the reset gate after the recurrent product, as in torch.nn.GRU."""

from __future__ import annotations

import torch

from rnnkernels.cells.contract import Cell, Values


def forward(gx: Values, gh: Values, prev: Values) -> tuple[Values, Values]:
    r = torch.sigmoid(gx[0] + gh[0])
    z = torch.sigmoid(gx[1] + gh[1])
    n = torch.tanh(gx[2] + r * gh[2])
    return [n + z * (prev[0] - n)], [r, z, n, gh[2]]


def backward(
    saved: Values, prev: Values, next: Values, dnext: Values
) -> tuple[Values, Values, Values]:
    r, z, n, gh_n = saved
    dn = dnext[0] * (1 - z) * (1 - n * n)
    dr = dn * gh_n * r * (1 - r)
    dz = dnext[0] * (prev[0] - n) * z * (1 - z)
    return [dr, dz, dn], [dr, dz, dn * r], [dnext[0] * z]


def tangents(
    saved: Values, prev: Values, next: Values, dgx: Values, dgh: Values, dprev: Values
) -> Values:
    r, z, n, gh_n = saved
    dr = (dgx[0] + dgh[0]) * r * (1 - r)
    dz = (dgx[1] + dgh[1]) * z * (1 - z)
    return [dr, dz, (dgx[2] + dr * gh_n + r * dgh[2]) * (1 - n * n), dgh[2]]


GRU = Cell(
    "gru",
    "rzn",
    S=1,
    K=4,
    A=1,
    reads_h=False,
    forward=forward,
    backward=backward,
    tangents=tangents,
)
