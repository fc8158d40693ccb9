"""A stack of layers through one op against the same layers one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import NAMES, make_call, random_like
from helpers import counted, same_bits, tensors
from op_parity import CLIPS, OVER_SAVED
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd.graph import saved_tensors_hooks

import rnnkernels
from rnnkernels import ops
from rnnkernels.call import Call, Result

if ops.missing is not None:
    pytest.skip(f"no compiled kernels: {ops.missing}", allow_module_level=True)

kernels = torch.ops.rnnkernels
LAYER, STACK = "rnnkernels::sequence_backward", "rnnkernels::stack_backward"
OVER = "rnnkernels::stack_backward_"

# The op itself


def make_calls(cell: str = "lstm", layers: int = 3, H: int = 5, **options: Any) -> list[Call]:
    """The calls of a stack, which share what is not a layer's own."""
    changes = {k: options.pop(k) for k in ("window", "clip") if k in options}
    first = make_call(cell, H=H, **options)._replace(layer=0, **changes)
    seed = 100 * options.get("seed", 0)
    upper = [
        make_call(cell, H=H, **options | {"inputs": H, "seed": seed + i}) for i in range(1, layers)
    ]
    shared = {"lengths": first.lengths, "reset": first.reset, **changes}
    return [first, *(call._replace(layer=i, **shared) for i, call in enumerate(upper, 1))]


def one_by_one(calls: Sequence[Call]) -> list[Result]:
    results: list[Result] = []
    for call in calls:
        results.append(ops.run(call._replace(x=results[-1].y) if results else call))
    return results


def inputs_of(calls: Sequence[Call]) -> list[Tensor]:
    """Every tensor that may get a gradient; x of upper layers is none."""
    return [*calls[0].tensors, *(t for call in calls[1:] for t in call.tensors[1:])]


def loss_of(results: Sequence[Result], used: Sequence[int] = ()) -> Tensor:
    """A fixed random loss on the results of these numbers, or on all."""
    out = [t for result in results for t in result if t is not None]
    terms = [(t * g).sum() for t, g in zip(out, random_like(out), strict=True)]
    return torch.stack([terms[i] for i in used] if used else terms).sum()


def results_and_gradients(run: Any, calls: list[Call], used: Sequence[int] = ()) -> list[Any]:
    results = run(calls)
    inputs = [t for t in inputs_of(calls) if t.requires_grad]
    grads = torch.autograd.grad(loss_of(results, used), inputs, allow_unused=True)
    return [*(t for result in results for t in result), *grads]


def assert_same_as_layers(calls: list[Call], used: Sequence[int] = ()) -> None:
    got = results_and_gradients(ops.run_stack, calls, used)
    assert same_bits(got, results_and_gradients(one_by_one, calls, used))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two-layers": {"layers": 2, "lengths": [5, 0, 2]},
    "one-layer": {"layers": 1, "reset": True},
    "lengths-reset": {"lengths": [3, 5, 0], "reset": True, "all_c": True},
    "no-bias": {"bias": "none"},
    "single-bias": {"bias": "single", "lengths": True},
    "window": {"window": 2, "lengths": True},
    "float32": {"dtype": torch.float32, "H": 33, "B": 9, "reset": True},
    "bfloat16": {"dtype": torch.bfloat16, "all_c": True},
    "no-time": {"T": 0},
    "no-batch": {"B": 0, "lengths": True, "reset": True},
    "one-step": {"T": 1, "B": 1, "H": 8},
    **{f"clip-{clip.kind}": {"clip": clip, "window": 3} for clip in CLIPS},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cell", NAMES)
def test_same_bits_as_one_by_one(cell: str, options: dict[str, Any]) -> None:
    """Results and gradients of every input, under a loss on the results of every layer."""
    assert_same_as_layers(make_calls(cell, **options))


@pytest.mark.parametrize("used", [(i,) for i in range(8)] + [(0, 7), (1, 2), (3, 4), (2, 5, 6)])
def test_some_results_in_the_loss(used: tuple[int, ...]) -> None:
    """Of y, h_n, c_n and c of two layers; layers that no gradient reaches get none."""
    assert_same_as_layers(make_calls(layers=2, all_c=True, lengths=[5, 0, 3]), used)


@pytest.mark.parametrize("asked", [(0,), (1,), (4,), (9,), (11, 12), (2, 17), (18,)], ids=str)
def test_some_inputs_ask_for_their_gradient(asked: tuple[int, ...]) -> None:
    """The numbers are those of inputs_of; only the layers above the lowest of them go back."""
    calls = make_calls("lstm", grad=False)
    inputs = inputs_of(calls)
    for i in asked:
        inputs[i].requires_grad_()
    assert_same_as_layers(calls)
    results = ops.run_stack(calls)
    lowest = max(asked[0] - 1, 0) // 6
    assert [r.y.requires_grad for r in results] == [i >= lowest for i in range(3)]
    used = counted(loss_of(results).backward)
    assert used[OVER] == 1 and used["rnnkernels::sequence_backward_"] == 3 - lowest


def test_products_that_nobody_asked_for_are_left_out() -> None:
    def products(number: int) -> int:
        calls = make_calls("lstm", 2, grad=False)
        inputs_of(calls)[number].requires_grad_()
        return counted(loss_of(ops.run_stack(calls)).backward).get("aten::mm", 0)

    between = 1  # what reaches the lower layer through the upper one
    assert products(0) == between + 1  # x
    assert products(1) == between + 1  # weight_ih_l0
    assert products(5) == between  # h0 of layer 0
    assert products(7) == 1  # weight_ih_l1
    assert products(11) == 0  # h0 of layer 1


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_second_derivatives(cell: str) -> None:
    calls = make_calls(cell, 2, T=3, B=2, inputs=2, H=2, lengths=[3, 2], reset=True, all_c=True)
    inputs = inputs_of(calls)

    def run(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(ops.run_stack(calls)))

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("asked", [None, 0, 7, 12], ids=str)
def test_differentiable_gradients(asked: int | None) -> None:
    """The first and the second derivative under create_graph, also where lower layers want none."""

    def derivatives(run: Any) -> list[Any]:
        calls = make_calls("lstm", grad=asked is None, lengths=[5, 1, 3])
        inputs = inputs_of(calls)
        chosen = inputs if asked is None else [inputs[asked].requires_grad_()]
        first = torch.autograd.grad(loss_of(run(calls)), chosen, create_graph=True)
        square = torch.stack([g.square().sum() for g in first]).sum()
        return [*first, *torch.autograd.grad(square, chosen)]

    torch.testing.assert_close(
        derivatives(ops.run_stack), derivatives(one_by_one), rtol=1e-12, atol=1e-12
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
        results = ops.run_stack(calls)
    assert same_bits(tensors(results), tensors(one_by_one(calls)))
    (lists,) = look.seen.values()
    assert [len(t) for t in lists] == [3, 3, 3, 0, 0]  # y, h_n, c_n; neither c nor saved
    y = kernels.stack_forward(*forward_arguments(calls, save=False))[0]
    with pytest.raises(RuntimeError, match=r"stack_forward: expected save=True"):
        y[2].sum().backward()


# Memory: the gradients of the gates take the place of what forward saved


def forward_arguments(calls: Sequence[Call], *, save: bool = True) -> list[Any]:
    """The arguments of ``torch.ops.rnnkernels.stack_forward``."""
    first = calls[0]
    lists = [[w for c in calls for w in getattr(c, k)] for k in ("w_ih", "w_hh", "b_ih", "b_hh")]
    c0 = [c.c0 for c in calls if c.c0 is not None]
    options = save, first.all_c, first.window, *first.clip
    h0 = [c.h0 for c in calls]
    return [first.cell_name, first.x, *lists, h0, c0, first.lengths, first.reset, *options]


def backward_arguments(calls: Sequence[Call], out: Any, douts: list[list[Any]]) -> list[Any]:
    """The arguments of ``stack_backward`` for what forward returned."""
    cell, _, w_ih, w_hh, _, _, h0, c0, *rows, _, _, window, clip, bound = forward_arguments(calls)
    y, _, _, c, saved = out
    kept = w_ih[1:], w_hh, h0, c0, y, c, saved
    return [cell, *douts, *kept, *rows, window, clip, bound, True]


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("cell", NAMES)
def test_keeping_the_graph_changes_no_bit(cell: str, window: int) -> None:
    """Also the last backward of a graph that was kept, which goes over the saved values."""
    calls = make_calls(cell, T=6, lengths=[6, 0, 4], window=window)
    loss, inputs = loss_of(ops.run_stack(calls)), inputs_of(calls)
    found: list[tuple[Tensor, ...]] = []

    def backward(keep: bool) -> dict[str, int]:
        run = lambda: found.append(torch.autograd.grad(loss, inputs, retain_graph=keep))  # noqa: E731
        return counted(run)

    used = [backward(keep) for keep in (True, True, False)]
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])
    assert all(STACK in u and OVER not in u for u in used[:2])
    over = cell in OVER_SAVED
    assert (OVER in used[2]) == over and (STACK in used[2]) == (not over)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        backward(False)


@pytest.mark.parametrize("layer", [0, 2])
def test_values_that_others_see_are_left_alone(layer: int) -> None:
    """Of one layer is enough."""
    out = kernels.stack_forward(*forward_arguments(make_calls("gru", T=6)))
    y, seen = out[0][2], out[4][layer]
    del out
    before = seen.clone()
    assert OVER not in counted(y.sum().backward)
    assert torch.equal(seen, before)


def test_values_from_hooks_are_left_alone() -> None:
    calls = make_calls("lstm", T=6)
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        y = ops.run_stack(calls)[2].y
    assert OVER not in counted(y.sum().backward)


def test_modes_see_no_op_that_writes() -> None:
    calls = make_calls("gru", T=6)
    inputs = inputs_of(calls)
    want = torch.autograd.grad(loss_of(ops.run_stack(calls)), inputs)
    loss = loss_of(ops.run_stack(calls))
    with Look() as look:
        got = torch.autograd.grad(loss, inputs)
    assert same_bits(got, want)
    assert list(look.seen) == ["rnnkernels.stack_backward.default"]


# What torch's own nodes and ops do


@pytest.mark.parametrize("part", ["x", "w_hh", "b_ih", "h0", "c0", "lengths", "reset", "y"])
def test_changes_in_place_are_caught(part: str) -> None:
    calls = make_calls("lstm", lengths=[5, 4, 2], reset=True)
    results = ops.run_stack(calls)
    changed = results[1].y if part == "y" else getattr(calls[1 if part != "x" else 0], part)
    with torch.no_grad():
        (changed[0] if isinstance(changed, list) else changed).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        results[2].y.sum().backward()


def test_several_threads_go_backward_through_one_graph() -> None:
    calls = make_calls("lstm", T=9, B=5, H=40)
    loss, inputs = loss_of(ops.run_stack(calls)), inputs_of(calls)
    want = torch.autograd.grad(loss, inputs, retain_graph=True)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: torch.autograd.grad(loss, inputs, retain_graph=True), range(12))
    assert all(same_bits(f, want) for f in found)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_share_no_memory(cell: str) -> None:
    """Gradients may be changed in place, as clipping does."""
    calls = make_calls(cell)
    found = torch.autograd.grad(loss_of(ops.run_stack(calls)), inputs_of(calls))
    assert len({g.untyped_storage().data_ptr() for g in found}) == len(found)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by the compiler
@pytest.mark.parametrize("cell", ["lstm", "rnn_tanh"])
def test_compiled_autograd(cell: str, fresh_compiler: None) -> None:
    """Also of other values by the same graph, which may hold none."""
    stacks = [make_calls(cell, 2, lengths=[5, 0, 3], seed=seed) for seed in (3, 4)]

    def gradients(calls: list[Call]) -> list[Tensor | None]:
        loss_of(ops.run_stack(calls)).backward()
        return [t.grad for t in inputs_of(calls)]

    want = [torch.autograd.grad(loss_of(ops.run_stack(c)), inputs_of(c)) for c in stacks]
    compiler, graphs = CompileCounter(), torch._dynamo.compiled_autograd
    with graphs._enable(torch.compile(backend=compiler, fullgraph=True)):
        got = [gradients(calls) for calls in stacks]
    assert compiler.frame_count == 1
    torch.testing.assert_close(got, [list(w) for w in want])


def test_torch_func() -> None:
    calls = make_calls("gru", 2, grad=False)
    weight = calls[0].w_hh[0]

    def loss(weight: Tensor) -> Tensor:
        return loss_of(ops.run_stack([calls[0]._replace(w_hh=[weight]), calls[1]]))

    leaf = weight.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(weight), want)


OPCHECKS: list[tuple[str, dict[str, Any]]] = [
    ("lstm", {"lengths": [5, 0, 2], "reset": True, "all_c": True}),
    ("gru", {"bias": "single", "layers": 2}),
    ("rnn_tanh", {"bias": "none", "lengths": [1, 2, 5]}),
]


@pytest.mark.parametrize(("cell", "options"), OPCHECKS)
def test_opcheck(cell: str, options: dict[str, Any]) -> None:
    calls = make_calls(cell, **options)
    torch.library.opcheck(kernels.stack_forward.default, tuple(forward_arguments(calls)))
    bare = make_calls(cell, **options, grad=False)
    arguments = forward_arguments(bare, save=False)
    torch.library.opcheck(kernels.stack_forward.default, tuple(arguments))
    out = kernels.stack_forward(*forward_arguments(bare))
    none: list[None] = [None] * len(bare)
    some = [random_like(out[0]), random_like(out[1]), random_like(out[2]), []]
    for douts in (some, [none, some[1], [], []]):
        arguments = backward_arguments(bare, out, douts)
        torch.library.opcheck(kernels.stack_backward.default, tuple(arguments))
        if cell in OVER_SAVED:  # torch cannot functionalize an op that writes and returns lists
            checks = "test_schema", "test_autograd_registration", "test_faketensor"
            op = kernels.stack_backward_.default
            torch.library.opcheck(op, tuple(arguments), test_utils=checks)


def test_what_cannot_be_written_over() -> None:
    calls = make_calls("rnn_tanh", grad=False)
    out = kernels.stack_forward(*forward_arguments(calls))
    with pytest.raises(ValueError, match=r"saved: a cell 'rnn_tanh' .*Call sequence_backward"):
        kernels.stack_backward_(*backward_arguments(calls, out, [[]] * 4))


FORWARD_LISTS = {"w_ih": 2, "w_hh": 3, "b_ih": 4, "b_hh": 5, "h0": 6, "c0": 7}
BACKWARD_LISTS = {
    **{"dy": 1, "dh_n": 2, "dc_n": 3, "dc": 4, "w_ih": 5},
    **{"h0": 7, "c0": 8, "y": 9, "c": 10, "saved": 11},
}


@pytest.mark.parametrize("grad", [True, False])
def test_lists_of_another_length_are_refused_by_name(grad: bool) -> None:
    calls = make_calls("lstm", grad=grad)
    arguments = forward_arguments(calls)
    for name, at in FORWARD_LISTS.items():
        bad = [*arguments[:at], arguments[at][:-1], *arguments[at + 1 :]]
        wrong = "w_ih" if name == "w_hh" else name  # the layers are counted by it
        with pytest.raises(ValueError, match=rf"{wrong}: expected \d tensors, one per layer"):
            kernels.stack_forward(*bad)
    out = kernels.stack_forward(*arguments)
    arguments = backward_arguments(calls, out, [random_like(t) for t in (*out[:3], out[3])])
    for name, at in BACKWARD_LISTS.items():
        bad = [*arguments[:at], arguments[at][:-1], *arguments[at + 1 :]]
        with pytest.raises(ValueError, match=rf"{name}: expected \d tensors, one per layer"):
            kernels.stack_backward(*bad)


@pytest.mark.parametrize(("name", "at"), [("y", 9), ("w_ih", 5), ("dy", 1)])
def test_what_has_to_agree_between_layers(name: str, at: int) -> None:
    calls = make_calls("lstm", grad=False)
    out = kernels.stack_forward(*forward_arguments(calls))
    arguments = backward_arguments(calls, out, [random_like(t) for t in out[:4]])
    for change, error in ((lambda t: t[:-1], RuntimeError), (Tensor.float, ValueError)):
        bad = [*arguments[at][:-1], change(arguments[at][-1])]
        with pytest.raises(error, match=rf"{name} of layer 2: expected"):
            kernels.stack_backward(*arguments[:at], bad, *arguments[at + 1 :])


def test_all_layers_have_one_hidden_size() -> None:
    calls = make_calls("gru", 2, grad=False)
    wide = make_call("gru", inputs=5, H=6, grad=False)
    with pytest.raises(RuntimeError, match=r"hx of layer 1: expected shape"):
        kernels.stack_forward(*forward_arguments([calls[0], wide]))


def test_batch_invariance_is_refused() -> None:
    calls = make_calls("gru")
    with rnnkernels.batch_invariant(), pytest.raises(RuntimeError, match="layers one by one"):
        ops.run_stack(calls)
