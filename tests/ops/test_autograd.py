"""The autograd node of a layer: what it computes, keeps, gives back and refuses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import op_parity
import rnnkernels
from cases import NAMES, assert_keeping_the_graph_changes_no_bit, make_call, random_like
from helpers import counted, same_bits
from modes import Count, Wanted
from op_calls import backward, backward_arguments, forward, run
from op_parity import CASES, DROPPED, OVER_SAVED, Case
from rnnkernels import _ops
from rnnkernels._core.call import Layer
from rnnkernels.cells import CELLS
from rnnkernels.testing import assert_close

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

kernels = torch.ops.rnnkernels
BACKWARD, OVER = "rnnkernels::sequence_backward", "rnnkernels::sequence_backward_"


def loss_of(call: Layer) -> Tensor:
    out = [t for t in run(call) if t is not None]
    return torch.stack([(t * g).sum() for t, g in zip(out, random_like(out), strict=True)]).sum()


# Memory: the gradients of the gates take the place of what forward saved


@pytest.mark.parametrize("case", [c for c in CASES + DROPPED if c.cell in OVER_SAVED], ids=str)
def test_the_op_that_writes_over_saved_values(case: Case) -> None:
    """The same bits as in memory of their own, at every size of a storage type."""
    for dtype in (torch.float32, torch.bfloat16):
        call = op_parity.make(case, dtype)
        out = op_parity.forward(kernels, call)
        grads = op_parity.random_gradients(call, out)
        want = op_parity.backward(kernels, call, out, grads)
        assert same_bits(op_parity.backward_over_saved(kernels, call, out, grads), want)


@pytest.mark.parametrize("cell", OVER_SAVED)
def test_opcheck(cell: str) -> None:
    call = make_call(cell, D=2, lengths=[5, 0, 2], reset=True, grad=False)
    outs = forward(call)
    dy, dh_n, dc_n, _ = random_like(outs[:4])
    arguments = backward_arguments(call, outs, [dy, dh_n, None if call.c0 is None else dc_n, None])
    torch.library.opcheck(kernels.sequence_backward_.default, tuple(arguments))


def test_what_cannot_be_written_over() -> None:
    for cell in set(NAMES) - set(OVER_SAVED):
        call = make_call(cell, grad=False)
        outs = forward(call)
        with pytest.raises(ValueError, match=rf"saved: a cell '{cell}' .*Call sequence_backward"):
            kernels.sequence_backward_(*backward_arguments(call, outs, [None] * 4))
    call = make_call("lstm", grad=False)
    outs = list(forward(call))
    outs[5] = torch.stack([outs[5]] * 2, -1)[..., 0]
    with pytest.raises(RuntimeError, match="saved: expected contiguous memory"):
        kernels.sequence_backward_(*backward_arguments(call, outs, [None] * 4))


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("cell", NAMES)
def test_keeping_the_graph_changes_no_bit(cell: str, window: int) -> None:
    call = make_call(cell, T=6, D=2, lengths=[6, 0, 4], reset=True)._replace(window=window)
    assert_keeping_the_graph_changes_no_bit(cell, loss_of(call), call.tensors)


def test_values_that_others_see_are_left_alone() -> None:
    call = make_call("lstm", T=6, D=2)
    out = forward(call)
    saved = out[5].clone()
    assert OVER not in counted(out[0].sum().backward)
    assert torch.equal(out[5], saved)

    view = forward(call)
    y, storage = view[0], view[5].untyped_storage()
    del view
    before = storage.clone()
    assert OVER not in counted(y.sum().backward)
    assert storage.tolist() == before.tolist()


def test_values_from_hooks_are_left_alone() -> None:
    """What a hook hands out may be seen in ways that no tensor counts."""
    call = make_call("lstm", T=6, D=2)
    arrays: list[Any] = []

    def pack(t: Tensor) -> Any:
        arrays.append((t.detach().clone().numpy(), t.requires_grad))
        return arrays[-1]

    def unpack(packed: Any) -> Tensor:
        return torch.from_numpy(packed[0]).requires_grad_(packed[1])

    want = torch.autograd.grad(loss_of(call), call.tensors)
    with saved_tensors_hooks(pack, unpack):
        loss = loss_of(call)
    before = [array.copy() for array, _ in arrays]
    got = torch.autograd.grad(loss, call.tensors)
    assert same_bits(got, want)
    assert all((a == b).all() for a, (b, _) in zip(before, arrays, strict=True))


def test_modes_see_no_op_that_writes() -> None:
    """Compilers, and whoever else looks at every op, see a pure one."""
    seen: list[str] = []

    class Look(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    call = make_call("gru", T=6)
    want = torch.autograd.grad(loss_of(call), call.tensors)
    loss = loss_of(call)
    with Look():
        got = torch.autograd.grad(loss, call.tensors)
    assert_close(got, want)
    assert [name for name in seen if "rnnkernels" in name] == [
        "rnnkernels.sequence_gradients.default"
    ]


# What torch's own nodes do


@pytest.mark.parametrize("part", ["x", "w_hh", "b_ih", "h0", "c0", "lengths", "reset", "y"])
def test_changes_in_place_are_caught(part: str) -> None:
    call = make_call("lstm", lengths=[5, 4, 2], reset=True)
    result = run(call)
    loss = result.y.square().sum()
    changed = result.y if part == "y" else getattr(call, part)
    with torch.no_grad():
        (changed[0] if isinstance(changed, list) else changed).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_backward_inside_autocast_is_the_same() -> None:
    """Forward has cast what is cast; nothing is rounded once more on the way back."""
    call = make_call("gru", dtype=torch.float32, D=2)
    want = torch.autograd.grad(loss_of(call), call.tensors)
    loss = loss_of(call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(torch.autograd.grad(loss, call.tensors), want)


#: Parts of a call that want a gradient, how many products and sums that takes, of a single step,
#: and their places among the inputs.
WANTED: list[tuple[list[str], tuple[int, int], list[int]]] = [
    (["x"], (1, 0), [0]),
    (["w_ih"], (1, 0), [3]),
    (["w_hh"], (1, 0), [4]),
    (["b_ih"], (0, 1), [5]),
    (["b_ih", "b_hh"], (0, 1), [5, 6]),
    (["h0"], (0, 0), [1]),
    (["x", "w_ih", "w_hh", "b_hh", "h0", "c0"], (3, 1), [0, 1, 2, 3, 4, 6]),
]


@pytest.mark.parametrize(("parts", "products", "places"), WANTED)
def test_work_that_nobody_asked_for_is_left_out(
    parts: list[str], products: tuple[int, int], places: list[int]
) -> None:
    """Products and sums run for what needs a gradient, and for nothing else; of several steps a
    mode sees one op, which is told what to find."""
    for T in (1, 4):
        call = make_call("lstm", T=T, D=1, grad=False)
        for part in parts:
            value = getattr(call, part)
            (value[0] if isinstance(value, list) else value).requires_grad_()
        loss = run(call).y.sum()
        wanted: list[list[int]] = []
        with Count() as count, Wanted(wanted):
            loss.backward()
        if T == 1:
            of = count.of
            assert (of["aten.mm"] + of["aten.addmm_"], of["aten.sum"]) == products
        assert wanted == ([] if T == 1 else [places])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_share_no_memory(cell: str) -> None:
    """Gradients may be changed in place, as clipping does."""
    call = make_call(cell, D=2)
    found = torch.autograd.grad(loss_of(call), call.tensors)
    assert len({g.untyped_storage().data_ptr() for g in found}) == len(found)


def test_several_threads_go_backward_through_one_graph() -> None:
    call = make_call("lstm", T=9, B=5, H=40, D=2)
    loss = loss_of(call)
    want = torch.autograd.grad(loss, call.tensors, retain_graph=True)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(
            lambda _: torch.autograd.grad(loss, call.tensors, retain_graph=True), range(12)
        )
    assert all(same_bits(f, want) for f in found)


# Other ways into autograd


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "LSTMCell"])
def test_torch_func(name: str) -> None:
    """``grad``, ``grad`` of ``grad`` and ``vjp`` give what ``backward`` gives."""
    torch.manual_seed(0)
    module: Any = getattr(rnnkernels, name)(3, 4, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out = torch.func.functional_call(module, parameters, (x,))
        return (out if isinstance(out, Tensor) else out[0]).square().sum()

    want = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    got = torch.func.grad(loss)(parameters, x)
    torch.testing.assert_close(list(got.values()), list(want))

    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(loss(parameters, leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), leaf)
    of_x = torch.func.grad(lambda x: loss(parameters, x))
    torch.testing.assert_close(of_x(x), dx)
    torch.testing.assert_close(torch.func.grad(lambda x: of_x(x).square().sum())(x), second)
    torch.testing.assert_close(
        torch.func.vjp(lambda x: loss(parameters, x), x)[1](x.new_ones(()))[0], dx
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by the compiler
@pytest.mark.parametrize("name", ["LSTM", "GRU", "GRUCell"])
def test_compiled_autograd(name: str) -> None:
    torch.manual_seed(0)
    module: nn.Module = getattr(rnnkernels, name)(3, 4)
    x = torch.randn(2, 3)

    def backward() -> list[Tensor]:
        module.zero_grad()
        out = module(x)
        (out if isinstance(out, Tensor) else out[0]).square().sum().backward()
        return [p.grad for p in module.parameters() if p.grad is not None]

    want = backward()
    compiler = torch.compile(backend="eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        got = backward()
    torch.testing.assert_close(got, want)


# Who records the norms


@pytest.mark.parametrize("cell", NAMES)
def test_every_backward_fills_the_norms(cell: str) -> None:
    """Of its own call alone, and again where the graph is kept."""
    call = make_call(cell, T=4)
    flow, other = torch.full((2, 4, 3, 1), 7.0, dtype=torch.float64)
    y = run(call._replace(flow=flow)).y
    run(call._replace(flow=other))
    assert (flow == 7).all()
    y.sum().backward(retain_graph=True)
    first = flow.clone()
    assert (first > 0).all() and (other == 7).all()
    (y[:1] * 2).sum().backward()
    assert not flow[1:].any() and (flow[0] > 0).all()
    want = backward(call, forward(call), [torch.ones_like(y), None, None, None], record=True)[4]
    assert torch.equal(first, want)


def test_cells_that_fit() -> None:
    assert {"lstm", "gru"} <= {name for name in OVER_SAVED if CELLS[name].K}
