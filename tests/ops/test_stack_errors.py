"""What the ops refuse of a call of several layers, and how they say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import make_call, random_like
from op_calls import LENGTHS, X
from rnnkernels import _ops
from rnnkernels._core.call import Call
from stack_calls import backward_arguments, forward_arguments, make_calls, together
from stack_parity import masks

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

kernels = torch.ops.rnnkernels
#: Places among the arguments.
FORWARD = {name: i for i, name in enumerate(Call._fields)}
BACKWARD = {
    **{name: FORWARD[name] for name in ("layers", "directions", "merge_mode")},
    **{name: X + i for i, name in enumerate(("dy", "dh_n", "dc_n", "dys", "dc"))},
    **{name: FORWARD[name] + 4 for name in ("weights", "h0", "c0", "masks")},
    **{name: LENGTHS + 4 + i for i, name in enumerate(("y", "ys", "c", "saved"))},
}


def arguments_of_both(grad: bool = False) -> list[tuple[Any, dict[str, int], list[Any]]]:
    """Of forward, and of backward on all that it returned, with their places."""
    calls = make_calls("lstm", grad=grad)
    between = masks(calls, 0.4)
    arguments = forward_arguments(calls, between)
    out = kernels.sequence_forward(*arguments)
    douts = random_like(out[:5])
    back = backward_arguments(calls, out, douts, between)
    return [
        (kernels.sequence_forward, FORWARD, arguments),
        (kernels.sequence_backward, BACKWARD, back),
    ]


def refused(op: Any, arguments: list[Any], at: int, value: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        op(*arguments[:at], value, *arguments[at + 1 :])


def test_places() -> None:
    """The names used here are those of the schemas."""
    for op, places, _ in arguments_of_both():
        names = [a.name for a in op.default._schema.arguments]
        assert {name: names.index(name) for name in places if name in names} == {
            name: at for name, at in places.items() if name in names
        }
        assert "masks" in names


def test_what_cannot_be_written_over() -> None:
    calls = make_calls("rnn_tanh", grad=False)
    out = kernels.sequence_forward(*forward_arguments(calls))
    with pytest.raises(ValueError, match=r"saved: a cell 'rnn_tanh' .*Call sequence_backward"):
        kernels.sequence_backward_(*backward_arguments(calls, out, [None] * 5))


@pytest.mark.parametrize("grad", [True, False])
def test_lists_of_another_length_are_refused_by_name(grad: bool) -> None:
    for op, places, arguments in arguments_of_both(grad):
        message = r"weights: expected \[w_ih, .*for each of 3 layers and directions, got 11 tensors"
        weights = arguments[places["weights"]]
        refused(op, arguments, places["weights"], weights[:-1], ValueError, message)
        between = arguments[places["masks"]]
        message = "masks: expected 2 tensors, one between any two layers, or None, got 1"
        refused(op, arguments, places["masks"], between[:-1], ValueError, message)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers", 0, "layers: expected 1 or more, got 0"),
        ("layers", -1, "layers: expected 1 or more, got -1"),
        ("directions", 3, "directions: expected 1 or 2, got 3"),
        ("merge_mode", "max", "merge_mode: expected one of concat, sum, mean, mul, got 'max'"),
    ],
)
def test_numbers_and_names(name: str, value: Any, message: str) -> None:
    for op, places, arguments in arguments_of_both():
        refused(op, arguments, places[name], value, ValueError, message)


WRONG_FORMS: dict[str, tuple[Any, Any]] = {
    "shape": (lambda t: t[:-1], RuntimeError),
    "dtype": (Tensor.float, ValueError),
    "device": (lambda t: t.to("meta"), RuntimeError),
}


@pytest.mark.parametrize("what", WRONG_FORMS)
def test_masks_of_another_form_are_refused(what: str) -> None:
    change, error = WRONG_FORMS[what]
    for op, places, arguments in arguments_of_both(True):
        at = places["masks"]
        bad = [arguments[at][0], change(arguments[at][1])]
        refused(op, arguments, at, bad, error, f"masks: expected {what}")


def test_masks_that_ask_for_a_gradient_are_refused() -> None:
    """Nobody computes it; without gradients there is none to ask for."""
    for grad in (True, False):
        calls = make_calls("gru", grad=grad)
        between = [mask.requires_grad_() for mask in masks(calls, 0.4)]
        with pytest.raises(RuntimeError, match="masks: expected tensors that require no gradient"):
            together(calls, between)
        with torch.no_grad():
            together(calls, between)


@pytest.mark.parametrize("what", WRONG_FORMS)
@pytest.mark.parametrize("layer", [1, 2])
def test_weights_of_upper_layers(what: str, layer: int) -> None:
    """Each is checked, and named as users know it."""
    change, error = WRONG_FORMS[what]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    for op, places, arguments in arguments_of_both():
        at = places["weights"]
        for i, name in enumerate(names[: 4 if op is kernels.sequence_forward else 2]):
            bad = list(arguments[at])
            bad[4 * layer + i] = change(bad[4 * layer + i])
            refused(op, arguments, at, bad, error, f"{name}_l{layer}: expected {what}")


@pytest.mark.parametrize("name", ["dys", "dc", "ys", "c", "saved", "dh_n", "h0", "c0"])
def test_what_all_layers_have(name: str) -> None:
    op, places, arguments = arguments_of_both()[1]
    at = places[name]
    for change, error in ((lambda t: t[:-1], RuntimeError), (Tensor.float, ValueError)):
        refused(op, arguments, at, change(arguments[at]), error, f"{name}: expected")


def test_all_layers_have_one_hidden_size() -> None:
    calls = make_calls("gru", 2, grad=False)
    wide = make_call("gru", inputs=5, H=6, grad=False)
    arguments = forward_arguments(calls)
    weights = [*calls[0].call().weights, *wide.call().weights]
    message = r"weight_ih_l1: expected shape \[15, 5\]"
    refused(kernels.sequence_forward, arguments, FORWARD["weights"], weights, RuntimeError, message)
