"""Noise of a cell: numbers that each unit draws at each step."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class Bernoulli:
    """What :func:`bernoulli` returns: how probable a 1 is."""

    p: float


def bernoulli(p: float) -> Any:
    """Marks a keyword of a cell's function as noise: in training a number of each unit at each step
    that is 1 with probability ``p``, else 0; in evaluation ``p`` itself, which is its expectation.
    It is the keyword's default::

        @rnnkernels.cell
        def dropped(a, *, h, keep=rnnkernels.bernoulli(0.9)):  # recurrent dropout of the update
            return h + keep / 0.9 * (torch.tanh(a) - h)

    Draws come from a counter-based generator (Philox4x32-10, Salmon et al. 2011), seeded from
    torch's default one at each call: ``torch.manual_seed`` decides, and nothing is stored.

    Raises:
        TypeError, ValueError: ``p`` is no number from 0 up to 1, which it is below.
    """
    return Bernoulli(probability("bernoulli: p", p))


def probability(name: str, value: Any) -> float:
    """A probability below 1.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    number = float(value)
    if not 0 <= number < 1:
        raise ValueError(f"{name}: expected a probability from 0 up to 1, 1 left out, got {number}")
    return number
