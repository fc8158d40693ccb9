"""Checks of a layer's options, with torch.nn's exception types and, where clear, its text."""

from __future__ import annotations

import math
import numbers
import operator
import warnings
from collections.abc import Sequence
from typing import Any

from rnnkernels._core.call import NO_CLIP, Clip
from rnnkernels._core.users_line import users_level
from rnnkernels.cells import find
from rnnkernels.cells.noise import probability as below_one

MERGE_MODES = ("concat", "sum", "mean", "mul")
BIAS_MODES = ("double", "single")
NONLINEARITIES = ("tanh", "relu", "sigmoid")
CLIP_KINDS = ("value", "norm", "tanh")

Truncate = int | tuple[int, int] | None
GradClip = float | tuple[str, float] | None
Zoneout = float | tuple[float, ...] | None


def integer(value: Any, refusal: str) -> int:
    """An integer of any type but bool."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:  # also of a type that has integers and others, such as Tensor
        pass
    raise TypeError(f"{refusal} {type(value).__name__}")


def size(name: str, value: Any, *, minimum: int = 1) -> int:
    """An integer argument of a constructor."""
    number = integer(value, f"{name} should be of type int, got:")
    if number < minimum:
        raise ValueError(f"{name} must {'be greater than zero' if minimum else 'not be negative'}")
    if number >= 2**60:  # times the gates, it no longer fits 64 bits
        raise ValueError(f"{name} must be less than 2**60, got {number}")
    return number


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    return value


def choice(name: str, value: Any, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
    return str(value)


def nonlinearity(value: Any) -> str:
    if value not in NONLINEARITIES:
        raise ValueError(
            f"Unknown nonlinearity '{value}'. Select from 'tanh', 'relu' or 'sigmoid'."
        )
    return str(value)


def dropout(value: Any, num_layers: int) -> float:
    if value is None:
        raise TypeError("dropout should be a number in range [0, 1], got: NoneType")
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an "
            f"element being zeroed, got: {value!r}"
        )
    if value > 0 and num_layers == 1:
        warnings.warn(
            "dropout option adds dropout after all but last recurrent layer, so non-zero dropout "
            f"expects num_layers greater than 1, but got dropout={value} and "
            f"num_layers={num_layers}",
            stacklevel=users_level(),
        )
    return float(value)


def heads(heads: int, hidden_size: int, proj_size: int) -> int:
    """Checks the number of heads of a layer; returns it."""
    found = size("heads", heads)
    if hidden_size % found:
        raise ValueError(
            f"heads: expected a divisor of hidden_size, {hidden_size}, got {found}. Choose another "
            "of both"
        )
    if found > 1 and proj_size:
        raise ValueError(
            f"proj_size: expected 0 beside {found} heads, since a projection would join them, got "
            f"{proj_size}. Put a linear layer behind"
        )
    return found


def probability(name: str, value: Any) -> float:
    """Of zeroing an element of what is scaled by ``1 / (1 - p)``, so below 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} should be a number in range [0, 1), got: {type(value).__name__}")
    number = float(value)
    if not 0 <= number < 1:  # a NaN is refused as well
        raise ValueError(
            f"{name} should be a number in range [0, 1) representing the probability of an "
            f"element being zeroed, got: {value!r}"
        )
    return number


def recurrent_drop(name: str, value: Any, cell: str) -> float:
    """A probability of what falls out around recurrent weights, of a cell that has some."""
    p = probability(name, value)
    if p and not find(cell).recurrent:
        raise ValueError(
            f"{name}: expected 0 for the cell {cell}, which has no recurrent weights, got {p}"
        )
    return p


def proj_size(value: Any, hidden_size: int) -> int:
    number = integer(value, "proj_size should be of type int, got:")
    if number < 0:
        raise ValueError("proj_size should be a positive integer or zero to disable projections")
    if number >= hidden_size:
        raise ValueError("proj_size has to be smaller than hidden_size")
    return number


def truncate(value: Any, bidirectional: bool) -> Truncate:
    """Where truncated BPTT stops: None, a window k, or a pair (k1, k2)."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)):
        return _steps("truncate", value)
    if len(value) != 2:
        raise ValueError(f"truncate: expected k or a pair (k1, k2), got {len(value)} values")
    k1, k2 = _steps("k1 of truncate", value[0]), _steps("k2 of truncate", value[1])
    if k2 < k1:
        raise ValueError(
            "truncate: expected (k1, k2) with k2 >= k1, since the losses of k1 steps flow back "
            f"over the last k2 steps, got ({k1}, {k2})"
        )
    if bidirectional:
        raise ValueError(
            "truncate: a pair (k1, k2) is not defined for bidirectional layers, whose reverse "
            "direction has no last steps to flow back over; pass one number k"
        )
    return k1, k2


def zoneout(value: Any, states: int, projected: bool) -> tuple[float, ...]:
    """The probabilities with which each state keeps its value for a step; () for none of them."""
    if value is None:
        return ()
    values = value if isinstance(value, (tuple, list)) else [value] * states
    if len(values) != states:
        names = "(h, c)" if states == 2 else f"{states} of them"
        raise ValueError(
            f"zoneout: expected a probability, or one for each state, {names}, got {value!r}"
        )
    found = tuple(below_one("zoneout", p) for p in values)
    if projected and found[0]:
        raise ValueError(
            f"zoneout: expected 0 for h where there is a proj_size, got {found[0]}: what a step "
            "would keep is h before its projection, which no step hands on. Pass (0, p) for c alone"
        )
    return found if any(found) else ()


def layer_norm(value: Any, takes: bool, kind: str, heads: int, zoneout: Any) -> bool:
    """Whether products are normalised, of a layer or step whose cell takes that or not."""
    if not flag("layer_norm", value):
        return False
    if not takes:
        raise ValueError(
            f"layer_norm: expected False for {kind}: it is defined for LSTM and GRU, whose "
            "formulas the paper gives"
        )
    if heads > 1:
        raise ValueError(
            f"layer_norm: expected no heads beside it, got heads={heads}: a norm runs over all "
            "units of a product, and heads share none"
        )
    if zoneout:
        raise ValueError(
            f"layer_norm: expected no zoneout beside it, got zoneout={zoneout}: zoneout is made "
            "of a cell's own formula for one unit, and a norm reads all of a row. Take "
            "recurrent_dropout or weight_drop instead"
        )
    return True


def recompute(value: Any) -> int:
    """After how many steps states are kept for backward; 0 where None keeps everything."""
    return 0 if value is None else _steps("recompute", value)


def _steps(name: str, value: Any) -> int:
    number = integer(value, f"{name}: expected a number of steps, got")
    if number < 1:
        raise ValueError(f"{name}: expected at least 1 step, got {number}")
    return min(number, 2**62)


def grad_clip(value: Any) -> Clip:
    """A bound b, the same as ``('value', b)``, or a pair of a kind and a bound; None for none."""
    if value is None:
        return NO_CLIP
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    kind, bound = value if pair else ("value", value)
    if not isinstance(kind, str) or isinstance(bound, bool) or not isinstance(bound, numbers.Real):
        raise TypeError(
            "grad_clip: expected a number, or a pair such as ('norm', 1.0), "
            f"got {value if isinstance(value, (tuple, list)) else type(value).__name__}"
        )
    choice("grad_clip", kind, CLIP_KINDS)
    number = float(bound)
    if not 0 < number < math.inf:  # a NaN is refused as well
        raise ValueError(f"grad_clip: expected a finite bound above zero, got {number}")
    return Clip(kind, number)
