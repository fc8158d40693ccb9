"""Cells as users write them, for tests: those of torch.nn, one that torch.nn has not, others with
everything that a cell may be made of."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import softplus

import rnnkernels
from rnnkernels.cells import statements

elman = rnnkernels.cell(statements.rnn_tanh)
rectified = rnnkernels.cell(statements.rnn_relu)
logistic = rnnkernels.cell(statements.rnn_sigmoid)
lstm = rnnkernels.cell(statements.lstm)
gru = rnnkernels.cell(statements.gru)


@rnnkernels.cell
def mgu(f: Any, n: Any, *, h: Any) -> Any:
    f = torch.sigmoid(f)
    n = torch.tanh(n.x + f * n.h)
    return (1 - f) * h + f * n


@rnnkernels.cell
def peephole(i: Any, f: Any, g: Any, o: Any, *, h: Any, c: Any) -> Any:
    """Gates that look at c, with a step of leaking away (Gers and Schmidhuber 2000)."""
    next_c = torch.sigmoid(f + 0.3 * c) * c + torch.sigmoid(i + 0.2 * c) * torch.tanh(g)
    return torch.sigmoid(o - 0.1 * next_c) * torch.tanh(next_c), next_c


@rnnkernels.cell
def odd(a: Any, b: Any, *, h: Any, c: Any) -> Any:
    """A choice, a bound, an exponential, a division, a power, both parts of a gate apart."""
    e = torch.exp(torch.clamp(a, max=2))
    next_c = c * torch.where(b > 0.5, 0.9, 0.1) + e / (1 + softplus(b.x) ** 2)
    return torch.relu(next_c) * abs(h) + torch.minimum(b.h, next_c) - 2**0.5 * next_c, next_c


@rnnkernels.cell
def scaled(
    a: Any, n: Any, *, h: Any, p: Any = rnnkernels.per_unit, q: Any = rnnkernels.per_unit(0.75)
) -> Any:
    """Parameters of its own, one of them beside a gate whose parts are apart."""
    a = torch.sigmoid(a + p * h)
    return torch.tanh(n.x + q * a * n.h) + (1 - a) * h


@rnnkernels.cell
def forgets(f: Any, g: Any, o: Any, *, h: Any, c: Any) -> Any:
    """Gates that look at the input alone (Bradbury et al. 2017): there is no W_hh."""
    c = torch.sigmoid(f.x) * c + (1 - torch.sigmoid(f.x)) * torch.tanh(g.x)
    return torch.sigmoid(o.x) * c, c


@rnnkernels.cell
def crowd(
    a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, *, h: Any, s: Any, t: Any, u: Any
) -> Any:
    """More gates than one product has columns, more states than one tensor is wide, a gate whose
    parts are apart; nothing but the output needs h."""
    s, t = torch.sigmoid(a) * s + torch.tanh(b), torch.sigmoid(c) * t + torch.sigmoid(d) * u
    u = torch.tanh(0.5 * u + e * s)
    return torch.sigmoid(f) * torch.tanh(s - t) + torch.tanh(g.x + u * g.h), s, t, u


#: The built-in cells that some of them are.
BUILT_IN = {
    "rnn_tanh": elman,
    "rnn_relu": rectified,
    "rnn_sigmoid": logistic,
    "lstm": lstm,
    "gru": gru,
}
