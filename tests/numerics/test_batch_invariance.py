"""A row has the same bits in any batch: in the loop over time always, else with the option on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rnnkernels
from cases import NAMES, convert, make_call, random_like
from helpers import counted, multiplies_itself, require_backend
from op_calls import run
from rnnkernels import _backends, _ops
from rnnkernels._core import reference
from rnnkernels._core.call import Layer, LayerResult
from rnnkernels.testing import assert_close


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    require_backend("cpu")
    yield
    assert not rnnkernels.is_batch_invariant()
    torch._dynamo.reset()


def results(call: Layer, douts: Sequence[Tensor] | None) -> list[Tensor]:
    """Outputs with the batch second, then the gradients of x, h0 and c0 for these gradients."""
    outs = [t for t in run(call) if t is not None]
    if douts is None:
        return [t.detach() for t in outs]
    inputs = [call.x, call.h0, *([] if call.c0 is None else [call.c0])]
    grads = torch.autograd.grad(outs, inputs, list(douts))
    return [*(t.detach() for t in outs), *grads]


def rows_of(call: Layer, rows: Tensor) -> Layer:
    """The same weights for some rows of the batch."""

    def of(t: Tensor | None, dim: int) -> Tensor | None:
        if t is None:
            return None
        part = t.detach().index_select(dim, rows)
        return part.requires_grad_(t.requires_grad)

    return call._replace(
        x=of(call.x, 1),
        h0=of(call.h0, 1),
        c0=of(call.c0, 1),
        lengths=of(call.lengths, 0),
        reset=of(call.reset, 1),
    )


def same_bits(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def assert_rows_agree(call: Layer, rows: Tensor, threads: tuple[int, int]) -> None:
    """Some rows, in any order and alone, have the bits that they have in the whole batch."""
    torch.set_num_threads(threads[0])
    douts = random_like([t.detach() for t in run(call) if t is not None])
    whole = results(call, douts)
    torch.set_num_threads(threads[1])
    some = results(rows_of(call, rows), [d.index_select(1, rows) for d in douts])
    assert same_bits(some, [t.index_select(1, rows) for t in whole])


@st.composite
def batches(draw: st.DrawFn) -> tuple[Layer, Tensor, tuple[int, int]]:
    cell = draw(st.sampled_from(NAMES))
    B = draw(st.integers(1, 70))
    T = draw(st.integers(1, 6))
    rows = draw(st.lists(st.integers(0, B - 1), min_size=1, max_size=B, unique=True))
    H = draw(st.sampled_from([1, 5, 16, 33, 70, 130]))
    call = make_call(
        cell,
        T=T,
        B=B,
        inputs=draw(st.sampled_from([1, 7, 32, 65, 300])),
        H=H,
        D=draw(st.integers(1, 2)),
        proj=draw(st.integers(1, 40)) if cell == "lstm" and draw(st.booleans()) else 0,
        lengths=draw(st.booleans()),
        reset=draw(st.booleans()),
        all_states=cell == "lstm",
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])),
        seed=draw(st.integers(0, 99)),
    )
    window = draw(st.integers(0, T))
    threads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return call._replace(window=window), torch.tensor(rows), threads


@settings(deadline=None, max_examples=150, derandomize=True, database=None)
@given(batches())
def test_rows_have_the_same_bits_in_any_batch(case: Any) -> None:
    with rnnkernels.batch_invariant():
        assert_rows_agree(*case)


@pytest.mark.parametrize("cell", NAMES)
def test_large_batches(cell: str) -> None:
    """Long sums, in parts that fit the cache, and more rows than go through the loop at once."""
    call = make_call(cell, T=3, B=150, inputs=600, H=520, D=2, dtype=torch.float32)
    with rnnkernels.batch_invariant():
        for rows in ([149], [0, 77], list(range(149, -1, -1))):
            assert_rows_agree(call, torch.tensor(rows), (2, 1))


@pytest.mark.parametrize("B", [1, 2, 40])
@pytest.mark.parametrize("cell", NAMES)
def test_first_steps_do_not_depend_on_what_follows(cell: str, B: int) -> None:
    call = make_call(cell, T=9, B=B, inputs=40, H=48, dtype=torch.float32, grad=False)
    with rnnkernels.batch_invariant():
        whole = run(call).y
        for T in (1, 5):
            assert torch.equal(run(call._replace(x=call.x[:T])).y, whole[:T]), T


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_padding_changes_nothing(kind: str) -> None:
    """A padded row of a stack has the bits of the same row alone and unpadded."""
    module = getattr(rnnkernels, kind)(20, 24, num_layers=2)
    lengths = [7, 1, 5, 3]
    x = torch.randn(7, 4, 20, requires_grad=True)
    with rnnkernels.batch_invariant():
        y = module(x, lengths=lengths)[0]
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        for b, n in enumerate(lengths):
            alone = x[:n, b : b + 1].detach().requires_grad_()
            y_alone = module(alone)[0]
            assert torch.equal(y_alone, y[:n, b : b + 1])
            (dx_alone,) = torch.autograd.grad(y_alone, alone, dy[:n, b : b + 1])
            assert torch.equal(dx_alone, dx[:n, b : b + 1])


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_a_cell_takes_the_steps_of_its_layer(kind: str) -> None:
    cell, layer = getattr(rnnkernels, kind)(40, 48), getattr(rnnkernels, kind[:-4])(40, 48)
    for name, w in cell.named_parameters():
        getattr(layer, f"{name}_l0").data.copy_(w.data)
    x = torch.randn(4, 30, 40)
    with rnnkernels.batch_invariant(), torch.no_grad():
        y = layer(x)[0]
        state = None
        for t in range(4):
            state = cell(x[t], state)
            assert torch.equal(state[0] if isinstance(state, tuple) else state, y[t])


def test_backward_follows_its_forward() -> None:
    """What counts is the setting when forward ran, wherever backward runs."""
    call = make_call("gru", T=1, B=33, inputs=300, H=130, dtype=torch.float32)
    one = rows_of(call, torch.tensor([20]))

    def gradients(call: Layer, dy: Tensor, on: bool) -> list[Tensor]:
        with rnnkernels.batch_invariant():
            y = run(call).y
        with rnnkernels.batch_invariant(on):
            return list(torch.autograd.grad(y, [call.x, call.h0], dy))

    dy = torch.randn(1, 33, 130)
    inside = gradients(call, dy, True)
    assert same_bits(gradients(call, dy, False), inside)
    alone = gradients(one, dy[:, 20:21], False)
    assert same_bits(alone, [t[:, 20:21] for t in inside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_gradient_of_the_input_is_that_of_the_reference(
    cell: str, D: int, dtype: torch.dtype
) -> None:
    """To the rounding; and the kernels add it up, not torch, or the option would be of no use."""
    call = make_call(cell, T=6, B=33, inputs=300, H=130, D=D, dtype=dtype)
    dy = torch.randn(6, 33, D * 130)

    def dx(call: Layer, run: Callable[[Layer], LayerResult]) -> Tensor:
        return torch.autograd.grad(run(call).y, call.x, dy.to(call.x))[0]

    found: list[Tensor] = []
    with rnnkernels.batch_invariant():
        inside = counted(lambda: found.append(dx(call, run)))
    assert_close(found[0], dx(convert(call, Tensor.double), reference.run_layer))
    assert "rnnkernels::input_gradient" in inside
    outside = counted(lambda: dx(call, run))
    assert ("rnnkernels::input_gradient" in outside) == multiplies_itself(dtype)


def test_switches() -> None:
    @rnnkernels.batch_invariant()
    def inside() -> bool:
        return rnnkernels.is_batch_invariant()

    assert inside()
    rnnkernels.set_batch_invariant(True)
    try:
        with rnnkernels.batch_invariant(False):
            assert not rnnkernels.is_batch_invariant()
            assert not _ops._C.batch_invariant()
        assert _ops._C.batch_invariant()
    finally:
        rnnkernels.set_batch_invariant(False)
    with pytest.raises(RuntimeError, match="boom"), rnnkernels.batch_invariant():
        raise RuntimeError("boom")
    with pytest.raises(TypeError, match="mode should be"):
        rnnkernels.set_batch_invariant("yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_other_backends_refuse(name: str) -> None:
    gru, x = rnnkernels.GRU(3, 4, backend=name), torch.randn(2, 1, 3)
    gru(x)
    with rnnkernels.batch_invariant():
        with pytest.raises(RuntimeError, match="batch_invariant is on"):
            gru(x)
        explained = rnnkernels.explain(rnnkernels.GRU(3, 4), x).choices[0]
        assert explained.backend == "cpu"
        assert "batch_invariant" in explained.refusals[name]


def test_no_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "AUTOMATIC", ("cuda", "reference"))
    monkeypatch.setattr(_backends, "undisturbed", lambda name: False)
    gru, x = rnnkernels.GRU(3, 4), torch.randn(2, 1, 3)
    with rnnkernels.batch_invariant():
        with pytest.raises(RuntimeError, match=r"none can run this layer.*batch_invariant is on"):
            gru(x)
        assert rnnkernels.explain(gru, x).choices[0].backend is None


def test_no_double_backward() -> None:
    """The gradient itself is that of the kernels; there is no derivative of it."""
    gru, x = rnnkernels.GRU(3, 4), torch.randn(2, 5, 3, requires_grad=True)
    with rnnkernels.batch_invariant():
        y, one = gru(x)[0], gru(x[:, 1:2])[0]
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (of_one,) = torch.autograd.grad(one.sum(), x)
    assert torch.equal(dx[:, 1], of_one[:, 1])
    with pytest.raises(RuntimeError, match=r"batch_invariant: .*create_graph"):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch.func.jvp
def test_no_tangents() -> None:
    gru, x = rnnkernels.GRU(3, 4), torch.randn(2, 5, 3)
    with (
        rnnkernels.batch_invariant(),
        pytest.raises(RuntimeError, match=r"batch_invariant: a tangent"),
    ):
        torch.func.jvp(lambda x: gru(x)[0], (x,), (x,))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = rnnkernels.GRU(300, 130)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


@pytest.mark.parametrize("T", [1, 6])
def test_a_compiled_graph_follows_the_setting(T: int) -> None:
    """One compiled before keeps its own graph: with the option on there is another."""
    model = Wrapped()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    x, dy = torch.randn(T, 33, 300), torch.randn(T, 33, 130)

    def run(model: Any, rows: slice) -> list[Tensor]:
        leaf = x[:, rows].clone().requires_grad_()
        y = model(leaf)
        return [y.detach(), *torch.autograd.grad(y, leaf, dy[:, rows])]

    plain = run(compiled, slice(None))
    with rnnkernels.batch_invariant():
        whole = run(compiled, slice(None))
        assert same_bits(whole, run(model, slice(None)))
        one = run(compiled, slice(20, 21))
        assert same_bits(one, [t[:, 20:21] for t in whole])
    assert same_bits(run(compiled, slice(None)), plain)


def test_bad_arguments_of_input_gradient() -> None:
    op = torch.ops.rnnkernels.input_gradient
    dgates, w = torch.randn(2, 3, 1, 8), torch.randn(8, 5)
    assert op(dgates, [w]).shape == (2, 3, 5)
    for bad, weights, message in [
        (dgates[0, 0], [w], "dgates: expected 4 dimensions"),
        (dgates, [w, w], "w_ih: expected 1 tensors"),
        (dgates, [torch.randn(9, 5)], "w_ih: expected matrices of 1 to 8 rows"),
        (dgates, [w.double()], "w_ih: expected dtype"),
        (dgates.int(), [w], "dgates: expected float32"),
    ]:
        with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
            op(bad, weights)
    torch.library.opcheck(op.default, (dgates, [w]))
    assert op(dgates[:0], [w]).shape == (0, 3, 5)
    assert op(dgates, [w[:, :0]]).shape == (2, 3, 0)
