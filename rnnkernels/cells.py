"""The cells: what one hidden unit does in one step, in torch operations.

A cell is a pair of functions on gate values ``[..., H]`` and five numbers. The same pair stands in
``csrc/common/cells.h`` for CPU and GPU kernels; tests hold the statements against each other.

========  ====================================================  =====
symbol    meaning                                               count
========  ====================================================  =====
``gx``    input part of the gates, ``W_ih x + b_ih``            G
``gh``    hidden part of the gates, ``W_hh h + b_hh``           G
``prev``  state before the step; slot 0 is h, slot 1 is c       S
``next``  state after the step                                  S
``saved`` what backward needs beyond ``prev`` and ``next``      K
========  ====================================================  =====

``A`` is the number of trailing gates whose hidden part is kept apart: only for them do the
gradients of ``gx`` and ``gh`` differ. ``reads_h`` says whether backward reads ``next[0]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Values = Sequence[Tensor]


@dataclass(frozen=True)
class Cell:
    """One cell: its name, its gates in PyTorch's order, the sizes of its contract, its arithmetic.

    ``forward(gx, gh, prev) -> (next, saved)`` and
    ``backward(saved, prev, next, dnext) -> (dgx, dgh, dprev)``, where ``dprev`` is only what
    reaches the previous state around ``W_hh``.
    """

    name: str
    gates: str
    S: int
    K: int
    A: int
    reads_h: bool
    forward: Callable[[Values, Values, Values], tuple[Values, Values]]
    backward: Callable[[Values, Values, Values, Values], tuple[Values, Values, Values]]

    @property
    def G(self) -> int:
        return len(self.gates)


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

    return Cell(name, "h", S=1, K=0, A=0, reads_h=True, forward=forward, backward=backward)


def lstm_forward(gx: Values, gh: Values, prev: Values) -> tuple[Values, Values]:
    i = torch.sigmoid(gx[0] + gh[0])
    f = torch.sigmoid(gx[1] + gh[1])
    g = torch.tanh(gx[2] + gh[2])
    o = torch.sigmoid(gx[3] + gh[3])
    c = f * prev[1] + i * g
    return [o * torch.tanh(c), c], [i, f, g, o]


def lstm_backward(
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


def gru_forward(gx: Values, gh: Values, prev: Values) -> tuple[Values, Values]:
    r = torch.sigmoid(gx[0] + gh[0])
    z = torch.sigmoid(gx[1] + gh[1])
    n = torch.tanh(gx[2] + r * gh[2])
    return [n + z * (prev[0] - n)], [r, z, n, gh[2]]


def gru_backward(
    saved: Values, prev: Values, next: Values, dnext: Values
) -> tuple[Values, Values, Values]:
    r, z, n, gh_n = saved
    dn = dnext[0] * (1 - z) * (1 - n * n)
    dr = dn * gh_n * r * (1 - r)
    dz = dnext[0] * (prev[0] - n) * z * (1 - z)
    return [dr, dz, dn], [dr, dz, dn * r], [dnext[0] * z]


#: Every cell, by name, in the order of ``AllCells`` in ``csrc/common/cells.h``.
CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        elman("rnn_tanh", torch.tanh, lambda y, dy: dy * (1 - y * y)),
        # Where y is NaN, dy goes on, as in torch: a zero would hide what went wrong.
        elman("rnn_relu", torch.relu, lambda y, dy: torch.where(y <= 0, 0, dy)),
        elman("rnn_sigmoid", torch.sigmoid, lambda y, dy: dy * y * (1 - y)),
        # Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000.
        Cell(
            "lstm",
            "ifgo",
            S=2,
            K=4,
            A=0,
            reads_h=False,
            forward=lstm_forward,
            backward=lstm_backward,
        ),
        # Cho et al. 2014, reset gate after the recurrent product as in torch.nn.GRU.
        Cell(
            "gru", "rzn", S=1, K=4, A=1, reads_h=False, forward=gru_forward, backward=gru_backward
        ),
    )
}
