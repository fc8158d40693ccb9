"""Parameters of a cell itself: names, shapes, how they begin, what is refused; cells without
recurrent weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_gated_layers import F64, H, I, X, make
from torch import nn

import rnnkernels
import written_cells
from rnnkernels.cells import define
from rnnkernels.nn import gated


def test_parameters() -> None:
    module = rnnkernels.PeepholeLSTM(I, H, num_layers=2, bidirectional=True)
    own = [n for n in module.state_dict() if "_p_" in n]
    assert own[:6] == [
        f"weight_p_{gate}_l0{end}" for end in ("", "_reverse") for gate in ("i", "f", "o")
    ]
    assert all(module.get_parameter(n).shape == (H,) for n in own) and len(own) == 12
    numbers = torch.cat([module.get_parameter(n).detach() for n in own])
    assert numbers.abs().max() <= H**-0.5 and numbers.std() > 0.1
    assert [w.dim() for w in module.all_weights[0]] == [2, 2, 1, 1, 1, 1, 1]
    other = rnnkernels.PeepholeLSTM(I, H, num_layers=2, bidirectional=True)
    other.load_state_dict(module.state_dict())
    x = X.float()
    assert torch.equal(module(x)[0], other(x)[0])
    step = rnnkernels.PeepholeLSTMCell(I, H)
    assert {n for n, _ in step.named_parameters() if "_p_" in n} == {
        "weight_p_i", "weight_p_f", "weight_p_o"
    }  # fmt: skip


def test_how_parameters_begin() -> None:
    module = rnnkernels.layer(written_cells.scaled)(I, H)
    assert torch.equal(module.weight_q_l0, torch.full((H,), 0.75))
    assert module.weight_p_l0.unique().numel() == H
    step = rnnkernels.cell_class(written_cells.scaled)(I, H)
    assert torch.equal(step.weight_q, torch.full((H,), 0.75))

    def cell(a: Any, *, h: Any, p: Any = rnnkernels.per_unit(nn.init.ones_)) -> Any:
        return torch.tanh(a) + p * h

    found = define(cell)
    assert found.params == ("p",) and found.initial[0].init is nn.init.ones_
    with pytest.raises(TypeError, match=r"init: expected a number, a function .* got str"):
        rnnkernels.per_unit("ones")  # type: ignore[arg-type]


def unused(a: Any, *, h: Any, p: Any = rnnkernels.per_unit) -> Any:
    return torch.tanh(a)


def taken(a: Any, *, h: Any, hh: Any = rnnkernels.per_unit) -> Any:
    return torch.tanh(a) * hh


def behind(a: Any, *, h: Any, p: Any = rnnkernels.per_unit, c: Any) -> Any:
    return torch.tanh(a) * p, c


def number(a: Any, *, h: Any, p: Any = 0.5) -> Any:
    return torch.tanh(a) * p


def as_gate(a: Any, b: Any = rnnkernels.per_unit, *, h: Any) -> Any:
    return torch.tanh(a) * b


ERRORS: dict[Callable[..., Any], str] = {
    unused: "parameter p: expected every parameter to be used",
    taken: "parameter hh: expected another name than those of a layer's weights",
    behind: "state c: expected states in front of parameters, got one behind p",
    number: "parameter p: .*rnnkernels.per_unit as its default",
    as_gate: "parameter b: .*is a keyword with rnnkernels.per_unit",
}


@pytest.mark.parametrize(
    ("function", "message"), ERRORS.items(), ids=lambda v: getattr(v, "__name__", "")
)
def test_errors(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        define(function)
    assert str(caught.value).startswith(__file__)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_wrong_parameter_is_named(backend: str) -> None:
    module = make("PeepholeLSTM", bidirectional=True, backend=backend)
    module.weight_p_f_l0_reverse = nn.Parameter(torch.zeros(H + 1, dtype=F64))
    with pytest.raises(RuntimeError, match=r"weight_p_f_l0_reverse: expected shape \[5\].*\[6\]"):
        module(X)
    step = rnnkernels.PeepholeLSTMCell(I, H, dtype=F64, backend=backend)
    step.weight_p_o = nn.Parameter(torch.zeros(H))
    with pytest.raises(ValueError, match=r"weight_p_o: expected dtype"):
        step(X[0])


def test_missing_parameters() -> None:
    weights = [group[:4] for group in make("PeepholeLSTM").all_weights]
    with pytest.raises(ValueError, match="behind them the parameters of the cell, 3, got 4"):
        rnnkernels.functional.layers(gated.peephole_lstm, X, None, weights)


def test_without_recurrent_weights() -> None:
    """Gates of which only the input part is used: there are no weights for another."""
    module = make("IndRNN", num_layers=2, bias_mode="double", bidirectional=True)
    each = ["weight_ih", "bias_ih", "weight_u"]
    ends = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
    assert list(module.state_dict()) == [name + end for end in ends for name in each]
    assert [n for n, _ in rnnkernels.IndRNNCell(I, H).named_parameters()] == each
    u = module.weight_u_l1_reverse.detach()
    assert u.min() >= 0 and u.max() > H**-0.5
    with pytest.raises(ValueError, match=r"expected \[w_ih, b_ih, w_hr\].*the cell, 1, got 5"):
        weights = [[*group, group[1], group[1]] for group in module.all_weights]
        rnnkernels.functional.layers(gated.ind_rnn, X, None, weights, bidirectional=True)
