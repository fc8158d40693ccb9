"""Parameters of a cell itself: numbers of each unit that its arithmetic reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

#: Names that a layer's own weights have, behind ``weight_``.
TAKEN = ("ih", "hh", "hr")


@dataclass(frozen=True)
class PerUnit:
    """What :func:`per_unit` returns: how a parameter begins."""

    init: float | Callable[[Tensor], Any] | None = None

    def fill(self, parameter: Tensor) -> None:
        """Sets the initial numbers, where they are others than those of all weights."""
        with torch.no_grad():
            if callable(self.init):
                self.init(parameter)
            elif self.init is not None:
                parameter.fill_(self.init)


def per_unit(init: float | Callable[[Tensor], Any] | None = None) -> Any:
    """Marks a keyword of a cell's function as a parameter: a number for each unit, which is learnt.
    It is the keyword's default, called or not.

    Each layer and direction has one ``[hidden_size]``, called ``weight_`` and the keyword, as in
    ``weight_p_l0`` and ``weight_p_l0_reverse``::

        @rnnkernels.cell
        def scaled(a, *, h, p=rnnkernels.per_unit(1.0)):
            return torch.tanh(a) * p

    Args:
        init: the number that it begins with; a function that is handed the parameter and fills it,
            as those of ``torch.nn.init``; or None: as all weights, uniform between
            ``-hidden_size**-0.5`` and ``hidden_size**-0.5``.

    Raises:
        TypeError: ``init`` is something else.
    """
    if init is None or callable(init):
        return PerUnit(init)
    given: Any = init
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(
            "per_unit: init: expected a number, a function that fills a tensor, or None, got "
            f"{type(given).__name__}"
        )
    return PerUnit(float(given))
