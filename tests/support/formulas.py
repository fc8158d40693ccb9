"""The formulas of other frameworks' recurrent layers over one sequence, in NumPy, from gates as
their documentation names them: what converted layers are held against where the framework itself
is not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
#: One step: x [B, I] and states [B, H] to the next states.
Step = Callable[[Array, list[Array]], list[Array]]


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": sigmoid,
}


def lstm(i: Array, f: Array, g: Array, o: Array, c: Array) -> list[Array]:
    """h and c after a step, from the sums of the gates."""
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return [sigmoid(o) * np.tanh(c), c]


def gru(z: Array, n: Array, h: Array) -> list[Array]:
    """h after a step; ``z`` and ``n`` are sums, n with the reset gate in it."""
    return [(1 - sigmoid(z)) * np.tanh(n) + sigmoid(z) * h]


def zoneout_lstm(
    i: Array, f: Array, g: Array, o: Array, h: Array, c: Array, d_h: Array, d_c: Array
) -> list[Array]:
    """h and c after a step of Krueger et al. 2017, section 3.2, whose masks, or in evaluation their
    probabilities, are d_h and d_c: where one is 1, the state stays."""
    new_h, new_c = lstm(i, f, g, o, c)
    return [d_h * h + (1 - d_h) * new_h, d_c * c + (1 - d_c) * new_c]


def run(
    step: Step,
    x: Array,
    states: Sequence[Array],
    lengths: Sequence[int] | None = None,
    reverse: bool = False,
) -> tuple[Array, list[Array]]:
    """A direction over x [T, B, I]: every h [T, B, H], zero past a row's end, and the states at
    the end."""
    T, B = x.shape[:2]
    now = [np.array(s) for s in states]
    y = np.zeros((T, *now[0].shape), x.dtype)
    for b in range(B):
        steps = range(T if lengths is None else lengths[b])
        for t in reversed(steps) if reverse else steps:
            after = step(x[t, b : b + 1], [s[b : b + 1] for s in now])
            for s, value in zip(now, after, strict=True):
                s[b] = value[0]
            y[t, b] = now[0][b]
    return y, now


def zeros(count: int, B: int, H: int) -> list[Array]:
    return [np.zeros((B, H)) for _ in range(count)]
