"""Layers in one call of the op against the same layers one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd.graph import saved_tensors_hooks

from cases import NAMES, assert_keeping_the_graph_changes_no_bit, random_like
from helpers import counted, same_bits, tensors
from modes import Wanted
from op_parity import CLIPS, OVER_SAVED
from rnnkernels import _ops
from rnnkernels._core.call import ARGUMENTS, Layer
from rnnkernels.testing import assert_close
from stack_calls import (
    backward_arguments,
    forward_arguments,
    inputs_of,
    joined,
    leaves,
    loss_of,
    make_calls,
    one_by_one,
    together,
)
from stack_parity import masks

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

kernels = torch.ops.rnnkernels
BACKWARD, OVER = "rnnkernels::sequence_backward", "rnnkernels::sequence_backward_"

# The op itself


#: What falls out between the layers.
with_masks = pytest.mark.parametrize("dropout", [0, 0.4], ids=["unmasked", "masked"])


def results_and_gradients(
    run: Any, calls: list[Layer], dropout: float, used: Sequence[int] = ()
) -> list[Any]:
    results = run(calls, masks(calls, dropout))
    inputs = [t for t in inputs_of(calls) if t.requires_grad]
    grads = torch.autograd.grad(loss_of(results, used), inputs, materialize_grads=True)
    return [*(t for result in results for t in result), *grads]


def assert_same_as_layers(calls: list[Layer], dropout: float, used: Sequence[int] = ()) -> None:
    got = results_and_gradients(together, calls, dropout, used)
    assert same_bits(got, results_and_gradients(one_by_one, calls, dropout, used))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two-layers": {"layers": 2, "lengths": [5, 0, 2]},
    "one-layer": {"layers": 1, "reset": True},
    "lengths-reset": {"lengths": [3, 5, 0], "reset": True, "all_states": True},
    "no-bias": {"bias": "none"},
    "single-bias": {"bias": "single", "lengths": True},
    "window": {"window": 2, "lengths": True},
    "float32": {"dtype": torch.float32, "H": 33, "B": 9, "reset": True},
    "bfloat16": {"dtype": torch.bfloat16, "all_states": True},
    "no-time": {"T": 0},
    "no-batch": {"B": 0, "lengths": True, "reset": True},
    "one-step": {"T": 1, "B": 1, "H": 8},
    **{f"clip-{clip.kind}": {"clip": clip, "window": 3} for clip in CLIPS},
}


@with_masks
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cell", NAMES)
def test_same_bits_as_one_by_one(cell: str, options: dict[str, Any], dropout: float) -> None:
    """Results and gradients of every input, under a loss on the results of every layer."""
    assert_same_as_layers(make_calls(cell, **options), dropout)


@with_masks
@pytest.mark.parametrize("used", [(i,) for i in range(8)] + [(0, 7), (1, 2), (3, 4), (2, 5, 6)])
def test_some_results_in_the_loss(used: tuple[int, ...], dropout: float) -> None:
    """Of y, h_n, c_n and c of two layers; layers that no gradient reaches get zeros."""
    assert_same_as_layers(make_calls(layers=2, all_states=True, lengths=[5, 0, 3]), dropout, used)


@with_masks
@pytest.mark.parametrize("asked", [(0,), (1,), (4,), (9,), (11, 12), (2, 17), (18,)], ids=str)
def test_some_inputs_ask_for_their_gradient(asked: tuple[int, ...], dropout: float) -> None:
    """The numbers are those of inputs_of."""
    calls = make_calls("lstm", grad=False)
    inputs = inputs_of(calls)
    for i in asked:
        inputs[i].requires_grad_()
    assert_same_as_layers(calls, dropout)
    used = counted(loss_of(together(calls, masks(calls, dropout))).backward)
    assert used[OVER] == 1 and BACKWARD not in used


#: Inputs of two layers, what is asked for if one wants a gradient (h0 of both in one tensor), and
#: how many products with W_ih and masks lead there: 1 through the upper layer, and to x one more.
WANTED = {"x": (0, 0, 2, 1), "weight_ih_l0": (1, 3, 1, 1), "h0_l0": (5, 1, 1, 1),
          "weight_ih_l1": (7, 7, 0, 1), "h0_l1": (11, 1, 1, 1)}  # fmt: skip


@pytest.mark.parametrize("name", WANTED)
def test_products_that_nobody_asked_for_are_left_out(name: str) -> None:
    """Those of the masks too: of what reaches the lower layer, and of what the upper one took."""
    number, place, down, masked = WANTED[name]
    calls = make_calls("lstm", 2, grad=False)
    inputs_of(calls)[number].requires_grad_()
    y = together(calls, masks(calls, 0.4))[1].y
    asked: list[list[int]] = []
    with Wanted(asked):
        used = counted(lambda: y.backward(torch.ones_like(y)))
    assert asked == [[place]]
    # torch's products, where they are taken, are those of a weight's gradient too.
    of_weight = int(name.startswith("weight"))
    assert (
        used.get("rnnkernels::input_gradient", used.get("aten::mm", of_weight) - of_weight) == down
    )
    assert used.get("aten::mul", 0) + used.get("aten::mul_", 0) == masked


@with_masks
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_second_derivatives(cell: str, dropout: float) -> None:
    calls = make_calls(
        cell, 2, T=3, B=2, inputs=2, H=2, lengths=[3, 2], reset=True, all_states=True
    )
    inputs = inputs_of(calls)

    def run(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(together(calls, masks(calls, dropout))))

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@with_masks
@pytest.mark.parametrize("asked", [None, 0, 7, 12], ids=str)
def test_differentiable_gradients(asked: int | None, dropout: float) -> None:
    """The first and the second derivative under create_graph, also where lower layers want none."""

    def derivatives(run: Any) -> list[Any]:
        calls = make_calls("lstm", grad=asked is None, lengths=[5, 1, 3])
        inputs = inputs_of(calls)
        chosen = inputs if asked is None else [inputs[asked].requires_grad_()]
        results = run(calls, masks(calls, dropout))
        first = torch.autograd.grad(loss_of(results), chosen, create_graph=True)
        square = torch.stack([g.square().sum() for g in first]).sum()
        return [*first, *torch.autograd.grad(square, chosen)]

    torch.testing.assert_close(
        derivatives(together), derivatives(one_by_one), rtol=1e-12, atol=1e-12
    )


class Look(torch.utils._python_dispatch.TorchDispatchMode):
    """Takes what each op of ours returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "rnnkernels":
            self.seen[str(func)] = out
        return out


def test_no_grad_keeps_nothing() -> None:
    calls = make_calls("lstm")
    with torch.no_grad(), Look() as look:
        y = _ops.run(joined(calls)).y
    assert torch.equal(y, one_by_one(calls)[-1].y)
    (outputs,) = look.seen.values()
    # y, h_n, c_n; neither the y of lower layers, nor c, h_raw and saved
    assert [t.dim() for t in outputs] == [3, 3, 3, 1, 1, 1, 1]
    leaves = [t for call in calls for t in call.tensors[1:]]
    found = [
        torch.autograd.grad(kernels.sequence_forward(*args)[0].sum(), leaves)
        for args in (forward_arguments(calls, save=save) for save in (True, False))
    ]
    assert same_bits(*found)  # what a backward needs is kept without being asked for


# Memory: the gradients of the gates take the place of what forward saved


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("cell", NAMES)
def test_keeping_the_graph_changes_no_bit(cell: str, window: int) -> None:
    calls = make_calls(cell, T=6, lengths=[6, 0, 4], window=window)
    loss = loss_of(together(calls))
    assert_keeping_the_graph_changes_no_bit(cell, loss, inputs_of(calls))


@pytest.mark.parametrize("layer", [0, 2])
def test_values_that_others_see_are_left_alone(layer: int) -> None:
    """Of one layer is enough."""
    out = kernels.sequence_forward(*forward_arguments(make_calls("gru", T=6)))
    y, seen = out[0], out[6][layer]
    del out
    before = seen.clone()
    assert OVER not in counted(y.sum().backward)
    assert torch.equal(seen, before)


def test_values_from_hooks_are_left_alone() -> None:
    calls = make_calls("lstm", T=6)
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        y = together(calls)[2].y
    assert OVER not in counted(y.sum().backward)


def test_modes_see_no_op_that_writes() -> None:
    calls = make_calls("gru", T=6)
    inputs = inputs_of(calls)
    want = torch.autograd.grad(loss_of(together(calls)), inputs)
    loss = loss_of(together(calls))
    with Look() as look:
        got = torch.autograd.grad(loss, inputs)
    assert_close(got, want)
    assert list(look.seen) == ["rnnkernels.sequence_gradients.default"]


# What torch's own nodes and ops do


@pytest.mark.parametrize("part", ["x", "weights", "h0", "c0", "lengths", "reset", "masks"])
def test_changes_in_place_are_caught(part: str) -> None:
    calls = make_calls("lstm", lengths=[5, 4, 2], reset=True)
    between = masks(calls, 0.4)
    call = leaves(calls, between)
    y = _ops.run(call).y
    changed = getattr(call, part)
    with torch.no_grad():
        (changed[-1] if isinstance(changed, list) else changed).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_outputs_may_be_changed() -> None:
    """Every state of every layer that callers are shown, before backward."""
    calls = make_calls("gru", all_states=True)
    call = leaves(calls)._replace(all_states=True)
    want = torch.autograd.grad(_ops.run(call).y.sum(), call.tensors)
    result = _ops.run(call)
    loss = result.y.sum()
    with torch.no_grad():
        for t in (result.y, result.h_n, *(result.h or ())):
            t.zero_()
    assert same_bits(torch.autograd.grad(loss, call.tensors), want)


def test_several_threads_go_backward_through_one_graph() -> None:
    calls = make_calls("lstm", T=9, B=5, H=40)
    loss, inputs = loss_of(together(calls)), inputs_of(calls)
    want = torch.autograd.grad(loss, inputs, retain_graph=True)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: torch.autograd.grad(loss, inputs, retain_graph=True), range(12))
    assert all(same_bits(f, want) for f in found)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_share_no_memory(cell: str) -> None:
    """Gradients may be changed in place, as clipping does."""
    calls = make_calls(cell)
    call = leaves(calls)
    found = torch.autograd.grad(_ops.run(call).y.sum(), call.tensors)
    assert len({g.untyped_storage().data_ptr() for g in found}) == len(found)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by the compiler
@pytest.mark.parametrize(("cell", "dropout"), [("lstm", 0.4), ("rnn_tanh", 0)])
def test_compiled_autograd(cell: str, dropout: float, fresh_compiler: None) -> None:
    """Also of other values by the same graph, which may hold none."""
    stacks = [make_calls(cell, 2, lengths=[5, 0, 3], seed=seed) for seed in (3, 4)]
    between = [[mask * n for mask in masks(calls, dropout)] for n, calls in enumerate(stacks, 1)]

    def gradients(calls: list[Layer], masks: list[Tensor]) -> list[Tensor | None]:
        for t in inputs_of(calls):
            t.grad = None
        loss_of(together(calls, masks)).backward()
        return [t.grad for t in inputs_of(calls)]

    want = [gradients(*both) for both in zip(stacks, between, strict=True)]
    compiler, graphs = CompileCounter(), torch._dynamo.compiled_autograd
    with graphs._enable(torch.compile(backend=compiler, fullgraph=True)):
        got = [gradients(*both) for both in zip(stacks, between, strict=True)]
    assert compiler.frame_count == 1
    torch.testing.assert_close(got, want)


@with_masks
def test_torch_func(dropout: float) -> None:
    calls = make_calls("gru", 2, grad=False)
    weight = calls[0].w_hh[0]

    def loss(weight: Tensor) -> Tensor:
        changed = [calls[0]._replace(w_hh=[weight]), calls[1]]
        return loss_of(together(changed, masks(calls, dropout)))

    leaf = weight.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(weight), want)


OPCHECKS: list[tuple[str, dict[str, Any]]] = [
    ("lstm", {"lengths": [5, 0, 2], "reset": True, "all_states": True}),
    ("gru", {"bias": "single", "layers": 2}),
    ("rnn_tanh", {"bias": "none", "lengths": [1, 2, 5]}),
]


@with_masks
@pytest.mark.parametrize(("cell", "options"), OPCHECKS)
def test_opcheck(cell: str, options: dict[str, Any], dropout: float) -> None:
    calls = make_calls(cell, **options)
    between = masks(calls, dropout)
    op = kernels.sequence_forward
    torch.library.opcheck(op.default, tuple(leaves(calls, between)[:ARGUMENTS]))
    bare = make_calls(cell, **options, grad=False)
    torch.library.opcheck(op.default, tuple(forward_arguments(bare, between, save=False)))
    out = op(*forward_arguments(bare, between))
    dy, dh_n, dc_n, dys, _ = random_like(out[:5])
    has_c = bare[0].c0 is not None
    some = [dy, dh_n, dc_n if has_c else None, dys, None]
    for douts in (some, [None, some[1], None, None, None]):
        arguments = tuple(backward_arguments(bare, out, douts, between))
        torch.library.opcheck(kernels.sequence_backward.default, arguments)
        if cell in OVER_SAVED:
            torch.library.opcheck(kernels.sequence_backward_.default, arguments)
