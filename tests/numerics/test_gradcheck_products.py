"""Numerical gradients of first and second order, in float64: of every cell that the package writes
and of every option that changes a cell, alone and in pairs with all options."""

from __future__ import annotations

import itertools

import pytest
from torch.autograd import gradcheck, gradgradcheck

from option_functions import CALL, CHANGES, CONSTRUCTOR, fits, function_of_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

WRITTEN = ("MGU", "CIFG", "PeepholeLSTM", "IndRNN", "SLSTM")
#: One of those of Elman, which share a body.
BUILT_IN = ("rnn_tanh", "lstm", "gru")
OPTIONS = tuple(dict.fromkeys((*CONSTRUCTOR, *CHANGES, *CALL)))

ALONE = [(kind, ()) for kind in WRITTEN]
ALONE += [(kind, (name,)) for kind in WRITTEN for name in OPTIONS if fits(kind, name)]
ALONE += [(kind, (name,)) for kind in BUILT_IN for name in CHANGES if fits(kind, name)]
PAIRS = [
    (kind, pair)
    for kind in (*WRITTEN, *BUILT_IN)
    for pair in itertools.combinations(OPTIONS, 2)
    if fits(kind, *pair) and (kind in WRITTEN or set(pair) & set(CHANGES))
]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(*case, marks=pytest.mark.full, id="-".join((case[0], *case[1])))
        for case in (*ALONE, *PAIRS)
    ],
)
def test_product(kind: str, options: tuple[str, ...]) -> None:
    """A random projection of the Jacobian, and of that of the gradients."""
    function = function_of_inputs(kind, options)
    assert gradcheck(*function, fast_mode=True)
    assert gradgradcheck(*function, fast_mode=True)
