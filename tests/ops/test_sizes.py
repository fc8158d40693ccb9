"""Sizes near 2^62, and parts of a call that do not belong together: refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkernels as rk
from cases import make_call, random_like
from op_calls import backward, forward
from rnnkernels import _ops
from rnnkernels._backends.cuda_plan import DEVICES, plan
from rnnkernels._core.call import Call
from rnnkernels.cells.normed import NORMED
from stack_calls import backward_arguments, forward_arguments, joined, make_calls
from stack_parity import masks

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

kernels = torch.ops.rnnkernels
MOST = 2**63 - 1


def wide(*shape: int) -> Tensor:
    """Of any size, in the memory of one number."""
    return torch.zeros((), dtype=torch.float64).as_strided(shape, [0] * len(shape))


def by_name(op: Any, arguments: list[Any]) -> dict[str, Any]:
    return dict(zip((a.name for a in op.default._schema.arguments), arguments, strict=True))


def calls_of(cell: str = "lstm", layers: int = 3, **options: Any) -> list[tuple[Any, dict]]:
    """Good calls of forward, backward and of the gradients, with their arguments by name."""
    made = make_calls(cell, layers, grad=False, **options)
    between = [torch.cat([mask] * len(made[0].w_hh), -1) for mask in masks(made, 0.4)]
    arguments = forward_arguments(made, between)
    out = kernels.sequence_forward(*arguments)
    given = dict(zip(Call._fields, joined(made, between), strict=True))
    douts = [t if t.numel() else None for t in random_like(out[:5])]
    back = by_name(kernels.sequence_backward, backward_arguments(made, out, douts, between))
    names = [a.name for a in kernels.sequence_gradients.default._schema.arguments]
    more = {"h_raw": out[5], "wanted": [0, 1], "lanes": 0}
    gradients = {n: more.get(n, back.get(n, given.get(n))) for n in names}
    return [
        (kernels.sequence_forward, by_name(kernels.sequence_forward, arguments)),
        (kernels.sequence_backward, back),
        (kernels.sequence_gradients, gradients),
    ]


def refused(
    op: Any, arguments: dict[str, Any], error: type[Exception], text: str, **changes: Any
) -> None:
    with pytest.raises(error, match=text) as caught:
        op(*{**arguments, **changes}.values())
    assert type(caught.value) is error


def test_the_calls_are_good() -> None:
    """Those that the others spoil."""
    for op, arguments in calls_of(D=2) + calls_of(layers=1, D=2, proj=2):
        op(*arguments.values())


@pytest.mark.parametrize("cell", sorted(NORMED))
def test_a_normalised_cell_takes_no_second_bias(cell: str) -> None:
    """Kernels would leave it out in silence."""
    for op, arguments in calls_of(cell, layers=1):
        weights = list(arguments["weights"])
        weights.insert(3, torch.zeros_like(weights[2]))
        text = r"weights: expected \[w_ih, w_hh, b_ih, w_hr\] as far as they exist"
        refused(op, arguments, ValueError, text, weights=weights)


@pytest.mark.parametrize("lanes", [-1, 4, MOST])
def test_lanes_that_do_not_divide_the_batch(lanes: int) -> None:
    op, arguments = calls_of(B=3)[2]
    op(*{**arguments, "lanes": 3}.values())
    text = rf"lanes: expected 0, or a divisor of the batch of 3 rows, got {lanes}"
    refused(op, arguments, ValueError, text, lanes=lanes)


@pytest.mark.parametrize("heads", [2**62, MOST, 2**62 - 1])
@pytest.mark.parametrize("merge_mode", ["concat", "sum"])
def test_heads_that_no_product_holds(merge_mode: str, heads: int) -> None:
    for D in (1, 2):
        for op, arguments in calls_of(D=D):
            text = rf"heads: expected sizes of which the product fits 64 bits, got {heads}"
            refused(op, arguments, ValueError, text, heads=heads, merge_mode=merge_mode)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"x": wide(2**59, 3, 4)}, "input: .* got 576460752303423488 steps beside"),
        ({"x": wide(5, 3, 2**58)}, "input: .* got 288230376151711744 features"),
        ({"h0": wide(1, 2**58, 5), "c0": wide(1, 2**58, 5)}, "hx: .* got 288230376151711744 rows"),
        ({"h0": wide(1, 3, 2**58), "c0": wide(1, 3, 2**58)}, "hx: .* got .* hidden units"),
        ({"x": wide(2**59, 0, 4), "h0": wide(1, 0, 5), "c0": wide(1, 0, 5)}, "input: .* steps"),
    ],
    ids=["steps", "features", "rows", "units", "steps-without-rows"],
)
def test_tensors_of_sizes_that_no_product_holds(changes: dict[str, Tensor], text: str) -> None:
    op, arguments = calls_of(layers=1)[0]
    refused(op, arguments, ValueError, text, masks=None, **changes)


def test_windows_longer_than_any_sequence() -> None:
    """There is one, of a cell with parameters of its own too, whose gradients come by windows."""
    made = make_call("layer_norm_gru", inputs=15, grad=False)
    made = made._replace(w_ih=[made.w_ih[0][:, :0]], b_ih=[], b_hh=[], number=0)
    out = forward(made)
    grads = [torch.ones_like(out[0]), None, None, None]
    found = [backward(made._replace(window=n), out, grads) for n in (5, 2**62, MOST)]
    assert found[0][-1].any()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backward", [False, True])
def test_plans_of_any_size(backward: bool) -> None:
    for device in DEVICES.values():
        for H, rows, steps in ((MOST, 1, 5), (64, MOST, 5), (64, 8, MOST), (2**62, 2**62, 2**62)):
            found = plan("lstm", backward, "bfloat16", H, rows, 1, device, layers=3, steps=steps)
            assert found.reason if H > 64 else found.family in ("stepwise", "cluster", "grid")
            assert min(found.blocks, found.units, found.tiles, found.rows) >= 0


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("options", [{}, {"recompute": 1}], ids=["plain", "recompute"])
def test_steps_that_nobody_lists(backend: str, options: dict[str, Any]) -> None:
    """Without rows they take no memory themselves, but the list of them would."""
    for kind in ("RNN", "LSTM", "GRU"):
        layer = getattr(rk, kind)(3, 4, dtype=torch.float64, backend=backend, **options)
        with pytest.raises(ValueError, match="input: expected fewer than 2147483648"):
            layer(wide(2**59, 0, 3))
        assert layer(wide(6, 0, 3))[0].shape == (6, 0, 4)


def test_no_rows_in_as_many_directions_as_there_may_be() -> None:
    op, arguments = calls_of("rnn_tanh", layers=1)[0]
    n = 2**24
    weights = [wide(n * 5, 4), wide(n * 5, 5)]
    y, h_n, *_ = op(
        *{**arguments, "x": wide(2, 0, 4), "h0": wide(n, 0, 5), "weights": weights, "heads": n,
          "masks": None}.values()
    )  # fmt: skip
    assert y.shape == (2, 0, n * 5) and h_n.shape == (n, 0, 5)


#: What is done to what sequence_gradients takes apart by layers before any backward is called.
PARTS = ("ys", "dys", "c", "dc", "saved", "h0", "c0", "dh_n", "dc_n", "masks")


def last_layer(arguments: dict[str, Any]) -> dict[str, Any]:
    """Gradients of its weights alone, so that backward is asked for that layer alone."""
    count = len(arguments["weights"])
    return {**arguments, "wanted": [3 + count - 1]}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_the_layers_below(name: str) -> None:
    op, arguments = calls_of()[2]
    arguments = last_layer(arguments)

    def shorter(value: Any) -> Any:
        return [value[0][:-1], *value[1:]] if name == "masks" else value[:1]

    refused(op, arguments, RuntimeError, f"{name}: expected", **{name: shorter(arguments[name])})


def test_as_many_masks_as_there_are_layers_to_lead_to() -> None:
    op, arguments = calls_of()[2]
    first = arguments["masks"][:1]
    refused(op, last_layer(arguments), ValueError, "masks: expected 2 tensors", masks=first)
    wrong = [t.float() for t in arguments["masks"]]
    refused(op, last_layer(arguments), ValueError, "masks: expected dtype", masks=wrong)


def test_h_before_its_projection() -> None:
    """It is read where there is one, and else not looked at."""
    op, arguments = calls_of(layers=1, D=2, proj=2)[2]
    arguments["wanted"] = [3, 7]
    good = arguments["h_raw"]
    for bad in (good[:, :-1], good[None], good.flatten(), good[..., :1], good.new_empty(0)):
        refused(op, arguments, RuntimeError, "h_raw: expected shape", h_raw=bad)
    refused(op, arguments, ValueError, "h_raw: expected dtype", h_raw=good.float())
    op, arguments = calls_of("rnn_relu", layers=2)[2]
    want, _ = op(*arguments.values())
    got, _ = op(*{**arguments, "h_raw": torch.zeros(1, 0)}.values())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_first_input_weights() -> None:
    """No loop takes them: only the gradient of x does, by a product."""
    op, arguments = calls_of(layers=1, D=2)[2]
    arguments["wanted"] = [0]
    for place, name in ((0, "weight_ih_l0"), (4, "weight_ih_l0_reverse")):
        good = arguments["weights"][place]
        for bad in (good[:0, :0], good[:-1], good[:, 1:], good.t(), good.float()):
            weights = [bad if i == place else w for i, w in enumerate(arguments["weights"])]
            error = ValueError if bad.dtype == torch.float32 else RuntimeError
            refused(op, arguments, error, rf"\b{name}: expected", weights=weights)


def test_a_gradient_that_is_wanted_twice() -> None:
    op, arguments = calls_of()[2]
    first, again = op(*{**arguments, "wanted": [3, 3]}.values())[0]
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", ["x", "h0", "y", "dgates"])
def test_none_in_place_of_a_tensor(name: str) -> None:
    """A tensor on the device meta among the others brings a call to where shapes alone are made."""
    ops: list[tuple[Any, dict[str, Any]]] = calls_of()
    ops.append((kernels.input_gradient, {"dgates": wide(2, 1, 4), "w_ih": [wide(4, 3)]}))
    seen = 0
    for op, arguments in ops:
        if name not in arguments or (name == "y" and "x" in arguments):  # shapes are those of x
            continue
        with pytest.raises((RuntimeError, TypeError, ValueError), match=rf"\b{name}\b|input"):
            op(*{**arguments, name: None}.values())
        lists = "w_ih" if name == "dgates" else "weights"
        there = [t.to("meta") for t in arguments[lists]]
        refused(
            op, arguments, TypeError, f"{name}: expected a Tensor", **{lists: there, name: None}
        )
        seen += 1
    assert seen


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"layers": 0}, ValueError, "layers: expected 1 or more, got 0"),
        ({"heads": -(2**62)}, ValueError, "heads: expected 1 or more"),
        ({"c0": None}, ValueError, "c0: a cell 'lstm' takes an initial c, got none"),
        ({"cell": "gru"}, ValueError, "c0: a cell 'gru' takes no c, got one"),
        ({"h0": wide(5)}, RuntimeError, "h0: expected 3 dimensions"),
        ({"wanted": [99]}, ValueError, "wanted: expected positions from 0 to 14"),
    ],
)
def test_shapes_alone(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    """Where nothing runs, as on the device meta, sizes are refused as by the kernels."""
    for op, arguments in calls_of():
        if set(changes) <= set(arguments):
            there = {n: v.to("meta") for n, v in arguments.items() if isinstance(v, Tensor)}
            moved = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in changes.items()}
            lists = {"weights": [w.to("meta") for w in arguments["weights"]], "masks": None}
            refused(op, {**arguments, **there, **lists}, error, text, **moved)
