"""truncate= with everything else that a layer can do, and how it is asked for."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkernels as rk
from cases import convert, gradients, make_call
from layers import Sizes
from op_calls import backward_arguments, forward, run
from rnnkernels import _backends
from rnnkernels._core import reference
from rnnkernels._core.call import Call
from rnnkernels.testing import assert_close

T, B, I, H = 11, 3, 4, 6
layer = partial(Sizes(T, B, I, H).layer, num_layers=2)
sequence = Sizes(T, B, I, H).sequence
KINDS: list[Any] = [3, (2, 5)]
both_kinds = pytest.mark.parametrize("truncate", KINDS, ids=str)


def grads_of(y: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Of a loss on y that weighs every element differently, in whatever order it stands."""
    return list(torch.autograd.grad(y.sin().sum(), inputs))


@both_kinds
def test_batch_first_and_unbatched(truncate: Any) -> None:
    lstm, x = layer(truncate=truncate), sequence()
    inputs = [x, *lstm.parameters()]
    expected = grads_of(lstm(x)[0], inputs)
    lstm.batch_first = True
    got = grads_of(lstm(x.transpose(0, 1))[0], inputs)
    assert_close(got, expected, rtol=1e-12)
    lstm.batch_first = False
    row = x[:, 1]
    alone = grads_of(lstm(row)[0], [x])[0][:, 1]
    assert_close(alone, expected[0][:, 1], rtol=1e-12)


@both_kinds
def test_packed_equals_lengths(truncate: Any) -> None:
    lstm, x = layer(), sequence()
    inputs, lengths = [x, *lstm.parameters()], [5, 11, 8]
    y, (h, c) = lstm(x, lengths=lengths, truncate=truncate)
    expected = torch.autograd.grad(y.sin().sum() + (h * c).sum(), inputs)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    z, (h, c) = lstm(packed, truncate=truncate)
    got = torch.autograd.grad(z.data.sin().sum() + (h * c).sum(), inputs)
    assert_close(got, expected, rtol=1e-12)


@both_kinds
def test_all_states_carry_gradients(truncate: Any) -> None:
    """Through the states of the last layer as through the output; h and c of the first as well."""
    lstm, x = layer(), sequence()
    inputs = [x, *lstm.parameters()]
    expected = grads_of(lstm(x, truncate=truncate)[0], inputs)
    _, _, states = lstm(x, truncate=truncate, return_all_states=True)
    plain = lstm(x, return_all_states=True)[2]
    assert all(map(torch.equal, [*states.h, *states.c], [*plain.h, *plain.c]))
    assert_close(grads_of(states.h[1][:, :, 0], inputs), expected, rtol=1e-12)
    # A loss on c_t of the first layer at steps 4 and 5 reaches no step before their window.
    _, _, states = lstm(x, truncate=truncate, return_all_states=True)
    (dx,) = torch.autograd.grad(states.c[0][4:6].sum(), [x])
    first = 3 if truncate == 3 else 1
    assert dx[:first].eq(0).all() and dx[first:6].ne(0).all() and dx[6:].eq(0).all()


def test_a_loss_reaches_back_to_its_window_only() -> None:
    lstm, x = layer(), sequence()
    for t in range(T):
        (dx,) = torch.autograd.grad(lstm(x, truncate=4)[0][t].sum(), [x])
        assert dx[: t // 4 * 4].eq(0).all() and dx[t // 4 * 4 : t + 1].ne(0).all()
        (dx,) = torch.autograd.grad(lstm(x, truncate=(2, 4))[0][t].sum(), [x])
        end = min(t // 2 * 2 + 2, T)
        assert dx[: max(end - 4, 0)].eq(0).all() and dx[max(end - 4, 0) : t + 1].ne(0).all()


@both_kinds
@pytest.mark.parametrize("option", ["dropout", "recurrent_dropout", "input_dropout"])
def test_dropout_draws_the_same_noise(option: str, truncate: Any) -> None:
    """The same bits as without truncation, and in the windows the noise that the output saw."""
    lstm, x = layer(**{option: 0.5}), sequence()
    torch.manual_seed(5)
    plain = lstm(x)[0]
    after = torch.rand(3)
    torch.manual_seed(5)
    y = lstm(x, truncate=truncate)[0]
    assert torch.equal(y, plain)
    assert torch.equal(torch.rand(3), after)
    torch.manual_seed(5)
    full = lstm(x, truncate=T if isinstance(truncate, int) else (T, T))[0]
    assert_close(grads_of(full, [x]), grads_of(plain, [x]), rtol=1e-12)


@both_kinds
def test_without_gradients_nothing_is_run_twice(truncate: Any) -> None:
    calls: list[Call] = []

    def observer(call: Call, name: str | None) -> Any:
        calls.append(call)
        return _backends.select(call, name).run(call)

    lstm, x = layer(truncate=truncate), sequence()
    with torch.no_grad(), _backends.observe(observer):
        y = lstm(x)[0]
    assert len(calls) == 1
    assert torch.equal(y, lstm(x, truncate=None)[0])


@both_kinds
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(0, 3, I), (5, 0, I), (1, 1, I)], ids=str)
def test_empty_and_smallest(shape: tuple[int, ...], backend: str, truncate: Any) -> None:
    lstm, x = layer(truncate=truncate, backend=backend), sequence(*shape)
    h0 = sequence(2, shape[1], H)
    c0 = sequence(2, shape[1], H)
    y, (h, c) = lstm(x, (h0, c0))
    got = torch.autograd.grad(
        y.sum() + h.sum() + (c * c).sum(), [x, h0, c0], materialize_grads=True
    )
    y, (h, c) = lstm(x, (h0, c0), truncate=None)
    expected = torch.autograd.grad(
        y.sum() + h.sum() + (c * c).sum(), [x, h0, c0], materialize_grads=True
    )
    assert_close(got, list(expected), rtol=1e-12)


@both_kinds
def test_backends_agree(truncate: Any) -> None:
    lstm, x = layer(), sequence()
    inputs = [x, *lstm.parameters()]
    results = {}
    for backend in ("reference", "cpu"):
        with rk.use_backend(backend):
            results[backend] = grads_of(lstm(x, truncate=truncate)[0], inputs)
    assert_close(results["cpu"], results["reference"], rtol=1e-12)


def test_torch_refuses() -> None:
    lstm = layer(backend="torch")
    with pytest.raises(RuntimeError, match="does not truncate gradients"):
        lstm(sequence(), truncate=2)
    with pytest.raises(RuntimeError, match="does not bound gradients"):
        lstm(sequence(), grad_clip=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for name in ("rnn_relu", "gru", "lstm"):
        call = make_call(name, T=7, B=5, H=19, D=2, dtype=dtype, lengths=True)._replace(window=3)
        _, grads = gradients(run, call)
        _, expected = gradients(reference.run_layer, convert(call, Tensor.double))
        assert_close(grads, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "H", "proj"), [("lstm", 9, 0), ("gru", 70, 0), ("lstm", 40, 7)])
def test_many_windows(name: str, H: int, proj: int) -> None:
    """More windows than fit one block of rows, on any number of threads."""
    call = make_call(name, T=403, B=7, inputs=2, H=H, D=2, proj=proj, reset=True)
    call = call._replace(window=2)
    _, expected = gradients(reference.run_layer, call)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            _, grads = gradients(run, call)
            assert_close(grads, [e.detach() for e in expected], rtol=1e-12)
    finally:
        torch.set_num_threads(before)


def test_same_bits_whatever_the_number_of_threads() -> None:
    call = make_call("lstm", T=40, B=9, inputs=8, H=70, dtype=torch.float32)._replace(window=3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            outs = run(call)
            dh0 = torch.autograd.grad(outs.y.sin().sum(), [call.h0])[0]
            results.append(dh0)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


@both_kinds
def test_second_derivative(truncate: Any) -> None:
    """Of a truncated gradient, with the detached states as constants, as the loop has it."""
    lstm, x = layer(), sequence()

    def penalty(y: Tensor) -> Tensor:
        (dx,) = torch.autograd.grad(y.sin().sum(), [x], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [lstm.weight_hh_l0])[0]

    got = penalty(lstm(x, truncate=truncate)[0])
    with rk.use_backend("reference"):
        expected = penalty(lstm(x, truncate=truncate)[0])
    assert_close(got, expected, rtol=1e-11)
    if truncate == 3:
        hx, ys = None, []
        for start in range(0, T, 3):
            y, hx = lstm(x[start : start + 3], hx)
            hx = tuple(s.detach() for s in hx)
            ys.append(y)
        assert_close(got, penalty(torch.cat(ys)), rtol=1e-11)


@both_kinds
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_compiles_to_one_graph(truncate: Any) -> None:
    lstm, x = layer(truncate=truncate), sequence()
    inputs = [x, *lstm.parameters()]
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    y = compiled(x)[0]
    assert_close(y, lstm(x)[0], rtol=1e-12)
    assert_close(grads_of(y, inputs), grads_of(lstm(x)[0], inputs), rtol=1e-12)


def test_constructor_call_and_copies() -> None:
    lstm = layer(truncate=3, grad_clip=("norm", 2.0))
    assert "truncate=3, grad_clip=('norm', 2.0)" in repr(lstm)
    copy = pickle.loads(pickle.dumps(lstm))
    assert (copy.truncate, copy.grad_clip) == (3, ("norm", 2.0))
    state = {k: v for k, v in lstm.__dict__.items() if k not in ("truncate", "grad_clip")}
    old = rk.LSTM.__new__(rk.LSTM)
    old.__setstate__(state)  # as pickled before these options were there
    assert (old.truncate, old.grad_clip) == (None, None)
    x = sequence()
    inputs = [x, *lstm.parameters()]
    own = grads_of(lstm(x)[0], inputs)
    asked = grads_of(layer()(x, truncate=3, grad_clip=("norm", 2.0))[0], [x])
    assert torch.equal(own[0], asked[0])
    full = grads_of(lstm(x, truncate=None, grad_clip=None)[0], inputs)
    assert torch.equal(full[0], grads_of(layer()(x)[0], [x])[0])


def test_explain_and_convert_know_it() -> None:
    lstm = layer(truncate=3, grad_clip=0.5)
    text = str(rk.explain(lstm, sequence()))
    assert "with truncate=3 and grad_clip=('value', 0.5)" in text
    with pytest.raises(ValueError, match="truncate=3"):
        rk.to_torch(lstm)
    converted: Any = rk.from_torch(torch.nn.GRU(2, 3))
    assert (converted.truncate, converted.grad_clip) == (None, None)
    rk.to_torch(converted)


@both_kinds
def test_functional(truncate: Any) -> None:
    x = sequence()
    for module, function in ((rk.RNN, rk.functional.rnn), (rk.GRU, rk.functional.gru)):
        plain = module(I, H).double()
        inputs = [x, *plain.parameters()]
        got = grads_of(function(x, None, plain.all_weights, truncate=truncate)[0], inputs)
        assert_close(got, grads_of(plain(x, truncate=truncate)[0], inputs), rtol=0.0)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (0, ValueError, "truncate: expected at least 1 step, got 0"),
        (-3, ValueError, "truncate: expected at least 1 step, got -3"),
        (2.0, TypeError, "truncate: expected a number of steps, got float"),
        (True, TypeError, "truncate: expected a number of steps, got bool"),
        ("3", TypeError, "truncate: expected a number of steps, got str"),
        ((5, 4), ValueError, r"expected \(k1, k2\) with k2 >= k1.*got \(5, 4\)"),
        ((0, 4), ValueError, "k1 of truncate: expected at least 1 step, got 0"),
        ((1, 2.5), TypeError, "k2 of truncate: expected a number of steps, got float"),
        ((1, 2, 3), ValueError, "expected k or a pair"),
        ((), ValueError, "expected k or a pair"),
    ],
    ids=str,
)
def test_errors(asked: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rk.GRU(I, H, truncate=asked)
    with pytest.raises(error, match=message):
        rk.GRU(I, H)(torch.randn(T, B, I), truncate=asked)
    with pytest.raises(error, match=message):
        rk.functional.gru(torch.randn(T, B, I), None, rk.GRU(I, H).all_weights, truncate=asked)


def test_no_pair_for_two_directions() -> None:
    message = "a pair .* is not defined for bidirectional layers"
    with pytest.raises(ValueError, match=message):
        rk.LSTM(I, H, bidirectional=True, truncate=(2, 4))
    with pytest.raises(ValueError, match=message):
        rk.LSTM(I, H, bidirectional=True)(torch.randn(T, B, I), truncate=(2, 4))


def test_a_step_number_of_any_integer_type() -> None:
    import numpy as np

    gru, x = rk.GRU(I, H).double(), sequence()
    expected = grads_of(gru(x, truncate=3)[0], [x])
    assert torch.equal(grads_of(gru(x, truncate=np.int64(3))[0], [x])[0], expected[0])
    assert torch.equal(grads_of(gru(x, truncate=10**30)[0], [x])[0], grads_of(gru(x)[0], [x])[0])


def test_bad_numbers_at_the_op() -> None:
    from cases import random_like

    call = make_call(grad=False)
    outs = forward(call)
    arguments = backward_arguments(call, outs, random_like(outs[:4]))
    op = torch.ops.rnnkernels.sequence_backward
    at = {argument.name: i for i, argument in enumerate(op.default._schema.arguments)}
    for changes, message in (
        ({"window": -1}, "window: expected a number of steps"),
        ({"clip": "size"}, "clip: expected one of none, value, norm, tanh, got 'size'"),
        *(
            ({"clip": "norm", "bound": bound}, "bound: expected a finite number above zero")
            for bound in (0.0, -1.0, float("nan"), float("inf"))
        ),
    ):
        bad = list(arguments)
        for name, value in changes.items():
            bad[at[name]] = value
        with pytest.raises(ValueError, match=message):
            op(*bad)
