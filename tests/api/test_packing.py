"""Rows of unequal lengths: no work, no memory and no numbers for padding, whatever the lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import op_parity
import rnnkernels as rk
from benchmarks.device import Cpu
from cases import NAMES, make_call, present, random_like
from op_calls import run
from op_parity import CASES, Case
from rnnkernels._core.packing import Packed, Rows
from rnnkernels.functional import _stack

kernels = torch.ops.rnnkernels
PACKED = [case for case in CASES if case.packed]
BIG = [
    Case("gru", 2, T=40, B=37, H=33, reset=True, packed=True),
    Case("lstm", 1, T=400, B=200, H=5, window=7, packed=True),
    Case("rnn_tanh", 2, T=300, B=140, H=5, window=2, packed=True),
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*PACKED, *BIG], ids=str)
def test_the_same_bits_as_padded(case: Case, dtype: torch.dtype, threads: int) -> None:
    """The loops: of every step that there is, what the padded call gives at its place."""
    call = op_parity.make(case, dtype)
    whole, steps = op_parity.unpacked(call), op_parity.exists(call)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, want = op_parity.forward(kernels, call), op_parity.forward(kernels, whole)
        grads = op_parity.random_gradients(call, out)
        padded = [op_parity.padded(call, g) if i in (0, 3) and g is not None else g
                  for i, g in enumerate(grads)]  # fmt: skip
        got = [*out, *op_parity.backward(kernels, call, out, grads)]
        want = [*want, *op_parity.backward(kernels, whole, want, padded)]
    finally:
        torch.set_num_threads(before)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w if g.shape == w.shape else w[steps])


def test_threads_that_share_rows_begin_together() -> None:
    """Two threads that share the units of few rows: the same gradients however often."""
    module = rk.LSTM(16, 300, backend="cpu")
    x = pack_padded_sequence(torch.randn(5, 2, 16), torch.tensor([5, 3]))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        y = module(x)[0].data
        dy, last = torch.randn_like(y), module.bias_hh_l0
        (first,) = torch.autograd.grad(y, last, dy)
        for _ in range(300):
            (again,) = torch.autograd.grad(module(x)[0].data, last, dy)
            assert torch.equal(first, again)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_matches_reference(case: Case) -> None:
    call = op_parity.make(case, torch.float64)
    out = op_parity.forward(kernels, call)
    grads = op_parity.random_gradients(call, out)
    back = op_parity.backward(kernels, call, out, grads)
    assert op_parity.forward_error(call, out) < 1e-12
    assert op_parity.backward_error(call, out, back, grads) < 1e-12


Change = Callable[[Tensor], Tensor | None]


def one_more(t: Tensor) -> Tensor:
    return torch.cat([t, t[-1:]])


#: What is done to a good call of lengths 5, 4, 3, 2, whose steps begin at 0, 4, 8, 11, 13 and end
#: at 14, and the error; a change of x is one of all that has a value for every step.
WRONG: dict[str, tuple[dict[str, Change], type[Exception], str]] = {
    "first": (
        {"starts": lambda s: s + 1, "x": one_more},
        ValueError,
        "starts: expected the first place to be 0 and the end 15, .* got 1 and 15",
    ),
    "fewer steps": ({"x": lambda t: t[:-1]}, ValueError, "starts: .* the end 13, .* got 0 and 14"),
    "more steps": ({"x": one_more}, ValueError, "starts: .* the end 15, .* got 0 and 14"),
    "last": (
        {"starts": lambda s: torch.cat([s[:-1], s[-1:] + 1]), "x": one_more},
        ValueError,
        "starts: expected 1 places at step 4, .* got 2",
    ),
    "between": (
        {"starts": lambda s: torch.cat([s[:2], s[2:3] + 1, s[3:]])},
        ValueError,
        "starts: expected 4 places at step 1, .* got 5",
    ),
    "descending": (
        {"starts": lambda s: torch.cat([s[:1], -s[1:-1], s[-1:]])},
        ValueError,
        "starts: expected 4 places at step 0, .* got -4",
    ),
    "shape": ({"starts": lambda s: s[None]}, ValueError, "starts: expected shape"),
    "dtype": ({"starts": Tensor.int}, TypeError, "starts: expected dtype int64"),
    "device": ({"starts": lambda s: s.to("meta")}, RuntimeError, "starts: expected device cpu"),
    "no step": ({"starts": lambda s: s[:1]}, ValueError, r"starts: expected .*1 step.*\[1\]"),
    "nothing": ({"starts": lambda s: s[:0]}, ValueError, r"starts: expected .*1 step.*\[0\]"),
    "no lengths": ({"lengths": lambda n: None}, ValueError, "starts: packed sequences need length"),
    "lengths on another device": (
        {"lengths": lambda n: n.to("meta")},
        RuntimeError,
        "lengths: expected device cpu",
    ),
    "longer rows": ({"lengths": lambda n: n + 1}, ValueError, "lengths: .* from 0 to 5, .* got 6"),
    "shorter rows": (
        {"lengths": lambda n: n - 1},
        ValueError,
        "starts: expected 3 places at step 1, .* got 4",
    ),
    "shortest first": ({"lengths": lambda n: n.flip(0)}, ValueError, "starts: .* that descend"),
    "another order": (
        {
            "lengths": lambda n: n[[0, 2, 1, 3]],
            "starts": lambda s: torch.tensor([0, 4, 8, 11, 14, 15]),
            "x": one_more,
        },
        ValueError,
        "lengths: expected the longest row first .* got 4 behind 3",
    ),
    "a row of no steps": (
        {
            "lengths": lambda n: torch.cat([n[:3], n[3:] * 0]),
            "starts": lambda s: torch.tensor([0, 3, 6, 9, 11, 12]),
            "x": lambda t: t[:12],
        },
        ValueError,
        "starts: expected 3 places at step 0, .* lengths above 0",
    ),
    "resets of padded steps": (
        {"reset": lambda r: torch.zeros(5, 4, dtype=torch.bool)},
        ValueError,
        r"reset: expected shape \[14\] \(packed steps\), got \[5, 4\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_places_that_do_not_fit_are_refused(name: str) -> None:
    """By both ops, before anything is read or written there."""
    change, error, message = WRONG[name]
    good = op_parity.make(Case("lstm", reset=True, packed=True), torch.float32)
    of_steps = change.get("x", lambda t: t)
    fields = {"reset": of_steps, **change}
    call = good._replace(**{field: f(getattr(good, field)) for field, f in fields.items()})
    with pytest.raises(error, match=message):
        op_parity.forward(kernels, call)
    out = op_parity.forward(kernels, good)
    grads = op_parity.random_gradients(good, out)
    N = good.x.size(0)
    out, grads = ([t if t is None or t.size(0) != N else of_steps(t) for t in ts]
                  for ts in (out, grads))  # fmt: skip
    with pytest.raises(error, match=message):
        op_parity.backward(kernels, call, out, grads)


def test_padded_values_do_not_stand_for_packed_ones() -> None:
    good = op_parity.make(Case("lstm", packed=True), torch.float32)
    out = op_parity.forward(kernels, good)
    grads = op_parity.random_gradients(good, out)
    with pytest.raises(RuntimeError, match=r"input: expected 2 dimensions .* \[5, 4, 3\]"):
        op_parity.forward(kernels, good._replace(x=op_parity.padded(good, good.x)))
    for place, message in ((0, r"^y: .*2 dim"), (3, r"^c: .*shape"), (5, r"^saved: .*shape")):
        wrong = [op_parity.padded(good, t) if i == place else t for i, t in enumerate(out)]
        with pytest.raises(RuntimeError, match=message):
            op_parity.backward(kernels, good, wrong, grads)
    for place, message in ((0, r"^dy: .*shape"), (3, r"^dc: .*shape")):
        wrong = [op_parity.padded(good, t) if i == place else t for i, t in enumerate(grads)]
        with pytest.raises(RuntimeError, match=message):
            op_parity.backward(kernels, good, out, wrong)


def test_numbers_of_steps_may_lie_apart_in_memory() -> None:
    good = op_parity.make(Case("gru", D=2, reset=True, packed=True), torch.float64)
    steps = {"lengths": good.lengths, "starts": good.starts, "reset": good.reset}
    apart = good._replace(**{
        name: torch.stack([t, t.roll(1)], 1)[:, 0] for name, t in steps.items() if t is not None
    })  # fmt: skip
    found = []
    for call in (good, apart):
        out = op_parity.forward(kernels, call)
        grads = op_parity.random_gradients(call, out)
        found.append([*out, *op_parity.backward(kernels, call, out, grads)])
    assert all(map(torch.equal, *found))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_way_there_and_back(lengths: list[int], more: int, batch_first: bool) -> None:
    T, B = max(max(lengths), 1) + more, len(lengths)
    values = torch.tensor(lengths)
    x = torch.arange(T * B * 2.0).view(B, T, 2).transpose(0, 1)
    x = x if batch_first else x.contiguous()
    if sum(lengths) == 0:
        return
    rows = Rows(values, T, x.device)
    packed = rows.pack(x)
    by_hand = pack_padded_sequence(x, values.clamp(min=1), enforce_sorted=False)
    if min(lengths) > 0:
        assert torch.equal(packed, by_hand.data)
        want = Packed.of_batch_sizes(by_hand.batch_sizes, B, x.device)
        assert all(map(torch.equal, rows.packed, want))
    exists = torch.arange(T)[:, None] < values
    assert torch.equal(rows.unpack(packed), x * exists[..., None])
    state = torch.randn(3, B, 2)
    assert torch.equal(rows.leave(state, rows.enter(state)), state)


def by_row(layer: nn.Module, x: Tensor, hx: Any, lengths: list[int]) -> tuple[Tensor, list[Tensor]]:
    """y [T, B, R] and final states, of a run of its own for each row."""
    T = x.size(0)
    outs, finals = [], []
    for b, n in enumerate(lengths):
        state = tuple(s[:, b : b + 1] for s in hx)
        y, last = layer(x[:n, b : b + 1], state if len(state) > 1 else state[0])
        outs.append(nn.functional.pad(y, (0, 0, 0, 0, 0, T - n)))
        finals.append(last if isinstance(last, tuple) else (last,))
    return torch.cat(outs, 1), [torch.cat(parts, 1) for parts in zip(*finals, strict=True)]


@given(
    kind=st.sampled_from(["RNN", "LSTM", "GRU"]),
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=9),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    given_hx=st.booleans(),
    way=st.sampled_from(["lengths", "packed"]),
)
@settings(max_examples=60, deadline=None)
def test_rows_of_any_lengths_are_rows_by_themselves(
    kind: str, lengths: list[int], layers: int, bidirectional: bool, given_hx: bool, way: str
) -> None:
    """Results and all gradients."""
    if way == "packed":
        lengths = [n for n in lengths if n] or [3]
    torch.manual_seed(0)
    layer = getattr(rk, kind)(3, 4, layers, bidirectional=bidirectional, dtype=torch.float64)
    T, B = max([*lengths, 1]), len(lengths)
    x = torch.randn(T, B, 3, dtype=torch.float64, requires_grad=True)
    states = [torch.randn(layers * (1 + bidirectional), B, 4, dtype=torch.float64)
              for _ in range(1 + (kind == "LSTM"))]  # fmt: skip
    states = [(s if given_hx else s * 0).requires_grad_() for s in states]

    def ours() -> tuple[Tensor, list[Tensor]]:
        hx = (tuple(states) if len(states) > 1 else states[0]) if given_hx else None
        if way == "lengths":
            y, last = layer(x, hx, lengths=lengths)
        else:
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            out, last = layer(packed, hx)
            y = pad_packed_sequence(out, total_length=T)[0]
        return y, list(last if isinstance(last, tuple) else (last,))

    results = []
    for y, last in (ours(), by_row(layer, x, states, lengths)):
        outs = [y, *last]
        gen = torch.Generator().manual_seed(1)
        loss = sum((o * torch.randn(o.shape, generator=gen, dtype=o.dtype)).sum() for o in outs)
        wanted = [x, *layer.parameters(), *(states if given_hx else [])]
        grads = torch.autograd.grad(loss, wanted, materialize_grads=True)
        results.append([*outs, *grads])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def convoy(kind: str, T: int, B: int, size: int) -> tuple[nn.Module, Tensor, list[int]]:
    """A layer, and a batch of one row of T steps and of others with one step each."""
    return getattr(rk, kind)(size, size), torch.randn(T, B, size), [T] + [1] * (B - 1)


@pytest.mark.parametrize("backend", ["cpu", "reference", "torch"])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("way", ["packed", "lengths"])
def test_memory_goes_with_the_steps_that_exist(
    one_thread: None, way: str, kind: str, backend: str
) -> None:
    """At its peak, of forward and backward, and what is kept for backward."""
    T, B, size = 200, 64, 16
    layer, x, lengths = convoy(kind, T, B, size)
    layer.backend = backend  # type: ignore[assignment]
    rows, padded = sum(lengths), T * B
    step = size * x.element_size()

    def run() -> None:
        out = layer(data)[0].data if way == "packed" else layer(x, lengths=lengths)[0]
        out.sum().backward()

    data = pack_padded_sequence(x, lengths)
    run()
    peak = Cpu().peak_allocated(run)
    # Per step, at most: x, y, states, gates, their gradients, and copies of these; and the padded
    # output with its gradient where it is padded.
    assert peak < 60 * rows * step + (0 if way == "packed" else 3 * padded * step)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_nothing_is_kept_for_padding(kind: str) -> None:
    T, B, size = 100, 32, 8
    layer, x, lengths = convoy(kind, T, B, size)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, lengths=lengths)
    weights = sum(p.nbytes for p in layer.parameters())
    assert sum(kept.values()) - weights < 20 * sum(lengths) * size * 4 + 4 * T * B


def test_a_batch_without_padding_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = rk.GRU(3, 4, backend="cpu"), torch.randn(5, 4, 3)
    whole = layer(x)[0]
    given: list[Any] = []

    def look(spec: Any, x: Tensor, hx: Any, steps: Any, *others: Any) -> Any:
        given.append(steps)
        return run_steps(spec, x, hx, steps, *others)

    run_steps = _stack._run
    monkeypatch.setattr(_stack, "_run", look)
    assert torch.equal(layer(x, lengths=[5] * 4)[0], whole)
    packed = layer(pack_padded_sequence(x, [5] * 4))[0]
    assert torch.equal(packed.data.view(5, 4, 4), whole)
    layer(x, lengths=[5, 5, 5, 4])
    assert [steps.lengths is not None for steps in given] == [False, False, True]


@pytest.mark.parametrize("name", NAMES)
def test_higher_derivatives(name: str) -> None:
    """The gradient that can be differentiated is the other one; and so are its own gradients."""
    call = op_parity.packed(make_call(name, T=4, B=3, inputs=2, H=2, D=2, reset=True)._replace(
        lengths=torch.tensor([4, 2, 1])))  # fmt: skip
    assert call.reset is not None and call.reset.any()
    outs = present(run(call))
    douts = random_like(outs)
    plain = torch.autograd.grad(outs, call.tensors, douts, retain_graph=True)
    differentiable = torch.autograd.grad(outs, call.tensors, douts, create_graph=True)
    for got, want in zip(differentiable, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)

    def output(x: Tensor, h0: Tensor, w_hh: Tensor) -> list[Tensor]:
        return present(run(call._replace(x=x, h0=h0, w_hh=[w_hh, *call.w_hh[1:]])))[:2]

    inputs = [t.detach().requires_grad_() for t in (call.x, call.h0, call.w_hh[0])]
    assert torch.autograd.gradgradcheck(output, inputs)


def test_packed_input_of_a_compiled_layer() -> None:
    layer = rk.LSTM(3, 4)
    compiled = torch.compile(layer, backend="eager")
    x = pack_padded_sequence(torch.randn(5, 3, 3), [5, 2, 1])
    got, want = compiled(x)[0], layer(x)[0]
    assert isinstance(got, PackedSequence)
    torch.testing.assert_close(got.data, want.data)
