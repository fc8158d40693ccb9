"""Single steps of several rows: a few read the weights where they lie, more keep them packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rnnkernels as rk
from helpers import draw, outputs_and_gradients, same_bits, tensors
from packed import call, kept, unseen, used
from rnnkernels.testing import assert_close

pytestmark = pytest.mark.usefixtures("nothing_packed")

FEW, MORE = 8, 9
SIZES = [(16, 16), (19, 35), (3, 1), (70, 33)]  # whole vectors, ends of them, less than one
LAYERS = [rk.RNN, rk.LSTM, rk.GRU]


def of_torch(layer: Any) -> nn.Module:
    """torch.nn's layer of the same weights, in float64."""
    kind = getattr(nn, type(layer).__name__)(layer.input_size, layer.hidden_size).double()
    kind.load_state_dict(layer.state_dict())
    return kind


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_step_of_rows_is_that_of_torch(
    layer: Any, sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    ours = layer(*sizes, dtype=dtype)
    theirs = of_torch(ours)
    for rows in (2, 3, 5, FEW, MORE):
        x = draw(1, rows, sizes[0], seed=rows, dtype=dtype)
        expected = outputs_and_gradients(theirs, [x.double()], torch.float64)
        for name, found in outputs_and_gradients(ours, [x], torch.float64).items():
            assert_close(found, expected[name], name=name)
        for _ in range(3):  # of more rows, the second call packs and the third one finds the packs
            assert_close(call(ours, x), tensors(theirs(x.double())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kept_for_backward", [False, True])
def test_a_row_has_the_same_bits_among_a_few(dtype: torch.dtype, kept_for_backward: bool) -> None:
    layer = rk.GRU(19, 35, dtype=dtype)
    x = draw(1, FEW, 19, seed=0, dtype=dtype)
    with torch.set_grad_enabled(kept_for_backward):
        whole = layer(x)[0]
        for rows in range(2, FEW):
            for first in (0, FEW - rows):
                part = layer(x[:, first : first + rows])[0]
                assert torch.equal(part, whole[:, first : first + rows])


def test_more_rows_keep_packs_and_a_change_shows() -> None:
    layer = rk.LSTM(19, 35)
    few, more = (draw(1, rows, 19, seed=rows, dtype=torch.float32) for rows in (FEW, MORE))
    for _ in range(3):
        call(layer, few)
    assert not kept(layer)
    before = used(layer, more)
    assert same_bits(before, unseen(layer, more))
    with torch.no_grad():
        layer.weight_hh_l0.copy_(draw(140, 35, seed=1, dtype=torch.float32))
        layer.weight_ih_l0[-1, -1] += 1
    after = call(layer, more)
    assert same_bits(after, unseen(layer, more))
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("rows", [FEW, MORE])
def test_rows_that_do_not_lie_together(rows: int) -> None:
    cell = rk.LSTMCell(19, 35, dtype=torch.float64)
    x = draw(rows, 30, seed=0, dtype=torch.float64)[:, 3:22]
    h, c = (draw(35, rows, seed=n, dtype=torch.float64).t() for n in (1, 2))
    with torch.no_grad():
        apart = cell(x, (h, c))
        together = cell(x.contiguous(), (h.contiguous(), c.contiguous()))
    assert same_bits(apart, together)
