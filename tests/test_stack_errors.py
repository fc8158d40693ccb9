"""What the ops of a stack refuse, and how they say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make_call, random_like
from stack_calls import backward_arguments, forward_arguments, make_calls
from stack_parity import masks
from torch import Tensor

import rnnkernels
from rnnkernels import ops

if ops.missing is not None:
    pytest.skip(f"no compiled kernels: {ops.missing}", allow_module_level=True)

kernels = torch.ops.rnnkernels


def test_what_cannot_be_written_over() -> None:
    calls = make_calls("rnn_tanh", grad=False)
    out = kernels.stack_forward(*forward_arguments(calls))
    with pytest.raises(ValueError, match=r"saved: a cell 'rnn_tanh' .*Call sequence_backward"):
        kernels.stack_backward_(*backward_arguments(calls, out, [[]] * 4))


FORWARD_LISTS = {"w_ih": 2, "w_hh": 3, "b_ih": 4, "b_hh": 5, "h0": 6, "c0": 7, "masks": 8}
BACKWARD_LISTS = {
    **{"dy": 1, "dh_n": 2, "dc_n": 3, "dc": 4, "w_ih": 5},
    **{"h0": 7, "c0": 8, "masks": 9, "y": 10, "c": 11, "saved": 12},
}


def masked_arguments(grad: bool) -> tuple[list[Any], list[Any]]:
    """Of stack_forward, and of stack_backward on all that it returned."""
    calls = make_calls("lstm", grad=grad)
    between = masks(calls, 0.4)
    arguments = forward_arguments(calls, between)
    out = kernels.stack_forward(*arguments)
    return arguments, backward_arguments(calls, out, [random_like(t) for t in out[:4]], between)


def refused(op: Any, arguments: list[Any], at: int, value: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        op(*arguments[:at], value, *arguments[at + 1 :])


@pytest.mark.parametrize("grad", [True, False])
def test_lists_of_another_length_are_refused_by_name(grad: bool) -> None:
    forward, backward = masked_arguments(grad)
    count = r"expected \d tensors, one (per layer|between any two layers)"
    for name, at in FORWARD_LISTS.items():
        wrong = "w_ih" if name == "w_hh" else name  # the layers are counted by it
        message = f"{wrong}: {count}"
        refused(kernels.stack_forward, forward, at, forward[at][:-1], ValueError, message)
    for name, at in BACKWARD_LISTS.items():
        message = f"{name}: {count}"
        refused(kernels.stack_backward, backward, at, backward[at][:-1], ValueError, message)


WRONG_MASKS: dict[str, tuple[Any, Any]] = {
    "shape": (lambda t: t[:-1], RuntimeError),
    "dtype": (Tensor.float, ValueError),
    "device": (lambda t: t.to("meta"), RuntimeError),
}


@pytest.mark.parametrize("what", WRONG_MASKS)
def test_masks_of_another_form_are_refused(what: str) -> None:
    change, error = WRONG_MASKS[what]
    ways = (kernels.stack_forward, 8), (kernels.stack_backward, 9)
    for (op, at), arguments in zip(ways, masked_arguments(True), strict=True):
        bad = [arguments[at][0], change(arguments[at][1])]
        refused(op, arguments, at, bad, error, f"masks: expected {what}")


def test_masks_that_ask_for_a_gradient_are_refused() -> None:
    """Nobody computes it; without gradients there is none to ask for."""
    for grad in (True, False):
        calls = make_calls("gru", grad=grad)
        between = [mask.requires_grad_() for mask in masks(calls, 0.4)]
        with pytest.raises(RuntimeError, match="masks: expected tensors that require no gradient"):
            ops.run_stack(calls, between)
        with torch.no_grad():
            ops.run_stack(calls, between)


@pytest.mark.parametrize(("name", "at"), [("y", 10), ("w_ih", 5), ("dy", 1)])
def test_what_has_to_agree_between_layers(name: str, at: int) -> None:
    _, arguments = masked_arguments(False)
    for change, error in ((lambda t: t[:-1], RuntimeError), (Tensor.float, ValueError)):
        bad = [*arguments[at][:-1], change(arguments[at][-1])]
        refused(kernels.stack_backward, arguments, at, bad, error, f"{name} of layer 2: expected")


def test_all_layers_have_one_hidden_size() -> None:
    calls = make_calls("gru", 2, grad=False)
    wide = make_call("gru", inputs=5, H=6, grad=False)
    with pytest.raises(RuntimeError, match=r"hx of layer 1: expected shape"):
        kernels.stack_forward(*forward_arguments([calls[0], wide]))


def test_batch_invariance_is_refused() -> None:
    calls = make_calls("gru")
    with rnnkernels.batch_invariant(), pytest.raises(RuntimeError, match="layers one by one"):
        ops.run_stack(calls)
