"""The contract of a cell: what one hidden unit does in one step, in torch operations.

A cell is three functions on gate values ``[..., H]`` and seven numbers. Two of them, ``forward``
and ``backward``, stand in ``csrc/common/cells.h`` for CPU and GPU kernels as well; tests hold the
statements against each other.

========  ====================================================  =====
symbol    meaning                                               count
========  ====================================================  =====
``gx``    input part of the gates, ``W_ih x + b_ih``            G
``gh``    hidden part of the gates, ``W_hh h + b_hh``           G
``prev``  state before the step; slot 0 is h, slot 1 is c;      S + P
          behind them the parameters of the cell itself, and    + E
          its noise
``next``  state after the step                                  S
``saved`` what backward needs beyond ``prev`` and ``next``      K
========  ====================================================  =====

``A`` is the number of trailing gates whose hidden part is kept apart: only for them do the
gradients of ``gx`` and ``gh`` differ. ``reads_h`` says whether backward reads ``next[0]``. ``P`` is
the number of parameters: numbers of each unit that are learnt and stand still over time, for which
``dprev`` has what the step adds to their gradients. ``E`` is the number of those that are drawn for
each unit at each step (:func:`rnnkernels.bernoulli`), which have no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Values = Sequence[Tensor]


@dataclass(frozen=True)
class Cell:
    """One cell: its name, its gates in PyTorch's order, the sizes of its contract, its arithmetic.

    ``forward(gx, gh, prev) -> (next, saved)`` and
    ``backward(saved, prev, next, dnext) -> (dgx, dgh, dprev)``, where ``dprev`` is only what
    reaches the previous state around ``W_hh``. ``tangents(saved, prev, next, dgx, dgh, dprev) ->
    dsaved`` is how what is saved changes with gates and states (forward mode).
    """

    name: str
    gates: Sequence[str]
    S: int
    K: int
    A: int
    reads_h: bool
    forward: Callable[[Values, Values, Values], tuple[Values, Values]]
    backward: Callable[[Values, Values, Values, Values], tuple[Values, Values, Values]]
    tangents: Callable[[Values, Values, Values, Values, Values, Values], Values]
    params: Sequence[str] = field(default=(), kw_only=True)
    #: Whether gates have a hidden part. Where they have none, there is neither a W_hh nor a b_hh.
    recurrent: bool = field(default=True, kw_only=True)
    noise: Sequence[str] = field(default=(), kw_only=True)
    #: Whether its products are normalised, and whether h is made of the states that it returns
    #: (:mod:`rnnkernels.cells.normed`). A and K are then those of the kernels' loops.
    normed: bool = field(default=False, kw_only=True)
    emits: bool = field(default=False, kw_only=True)
    #: Of its gates the last ones, which are normalised by themselves.
    alone: int = field(default=0, kw_only=True)

    @property
    def G(self) -> int:
        return len(self.gates)

    def groups(self, rows: int) -> list[int]:
        """Of a normed cell, how many numbers of its gates' rows are normalised together."""
        alone = rows // self.G * self.alone
        return [rows - alone, alone] if alone else [rows]

    @property
    def C(self) -> int:
        """States beside h."""
        return self.S - 1

    @property
    def P(self) -> int:
        return len(self.params)

    @property
    def E(self) -> int:
        return len(self.noise)
