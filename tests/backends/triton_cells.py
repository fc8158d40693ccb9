"""The Triton kernels against the reference, in Triton's interpreter: written cells, noise, heads,
recurrent dropout.

Run by test_triton.py, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import noise
import op_parity
import triton_programs
import written_cells
from op_parity import ALL, Case
from rnnkernels._core.call import Clip
from rnnkernels.cells import DefinedCell
from rnnkernels.nn import gated
from triton_interpreted import KINDS, chosen, ops, run

#: Products of float32 are exact enough.
TOLERANCE = 1e-6


def named(value: Any) -> str:
    return value.title if isinstance(value, DefinedCell) else str(value)


#: Of numpy: an sLSTM divides by its normaliser, which is 0 where there is no row or unit.
divides = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")


@divides
@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        (written_cells.gru, "grid"),
        (written_cells.crowd, "step"),
        (written_cells.odd, "resident"),
        (gated.mgu, "resident"),
        (gated.cifg, "step"),
        (gated.slstm, "grid"),
        (gated.ind_rnn, "resident"),
        (gated.ind_rnn, "step"),
        (written_cells.forgets, "grid"),
        *((gated.peephole_lstm, kind) for kind in KINDS),  # with parameters of its own
    ],
    ids=named,
)
def test_cells_that_users_write(cell: DefinedCell, kind: str) -> None:
    case = Case(cell.name, 2, window=2, **ALL)
    results = run(case, chosen(case, kind))
    assert results.padding_is_zero()
    assert max(results.errors()) <= 2 * TOLERANCE


@pytest.mark.parametrize("clip", [Clip(), Clip("norm", 0.3)], ids=lambda c: c.kind)
def test_without_recurrent_weights(clip: Clip) -> None:
    """As the plan lays it out: several programs for some rows, which wait for nobody but where a
    norm is asked for."""
    case = Case(gated.ind_rnn.name, T=3, H=70, window=2, clip=clip, reset=True)
    call = op_parity.make(case, torch.float32)
    with triton_programs.at_once():
        out = op_parity.forward(ops, call)
        grads = op_parity.random_gradients(call, out)
        back = op_parity.backward(ops, call, out, grads)
    assert op_parity.forward_error(call, out) <= TOLERANCE
    assert op_parity.backward_error(call, out, back, grads) <= TOLERANCE


OF_HEADS = [
    *zip(op_parity.HEADED, KINDS, strict=True),
    *((Case("gru", 2, T=4, drop=True, window=3, **ALL), kind) for kind in KINDS),
    (Case(gated.peephole_lstm.name, 2, H=4, heads=2, drop=True, reset=True), "grid"),
]


@pytest.mark.parametrize(("case", "kind"), OF_HEADS, ids=str)
def test_heads_and_dropout(case: Case, kind: str) -> None:
    results = run(case, chosen(case, kind))
    assert results.padding_is_zero()
    assert max(results.errors()) <= TOLERANCE


@pytest.mark.parametrize(
    ("cell", "packed", "kind"),
    [(noise.ZONED_LSTM, False, "resident"), (noise.ZONED_GRU, True, "step")],
    ids=named,
)
def test_noise(cell: DefinedCell, packed: bool, kind: str) -> None:
    """The masks of the reference, of a later layer as well; and their expectation."""

    def later(call: Any) -> Any:
        call = noise.drawing(call)
        return call._replace(draws=call.draws + torch.tensor([0, 10, 20, 0, 5]))

    def expected(call: Any) -> Any:
        return noise.drawing(call)._replace(draws=None)

    case = Case(cell.name, 2, window=2, packed=packed, **({} if packed else ALL))
    for change in (later, expected):
        results = run(case, chosen(case, kind), change=change)
        assert results.padding_is_zero()
        assert max(results.errors()) <= 2 * TOLERANCE
