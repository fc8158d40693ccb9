"""recompute= as it is asked for, under torch's compilers, transforms and modes, and its errors."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import rnnkernels as rk
from cases import make_call
from graphs import Graphs, Model, assert_same, options_for, result, tokens
from helpers import counted, multiplies_itself
from layers import Sizes
from modes import Dispatch
from op_calls import forward_arguments
from rnnkernels.diagnostics import gradient_flow
from rnnkernels.testing import assert_close

FORWARD = "rnnkernels.recomputed_forward.default"
BACKWARD = "rnnkernels.recomputed_backward.default"
RTOL = 1e-12
T, B, I, H = 7, 3, 4, 5
layer, sequence = Sizes(T, B, I, H).layer, Sizes(T, B, I, H).sequence


def grads_of(y: Tensor, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(y.sin().sum(), inputs, **options))


# Compilers


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("options", "extra", "ops"),
    [
        ({"num_layers": 2}, (), 1),
        ({"num_layers": 2, "bidirectional": True, "truncate": 4}, ("lengths", "reset"), 2),
    ],
    ids=["stack", "both-ways"],
)
def test_one_graph_for_every_size(options: Any, extra: tuple[str, ...], ops: int) -> None:
    """No window is in the graph, whose backward therefore computes again what it needs."""
    model, graphs = Model(recompute=3, **options), Graphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs.backend)
    for i, (steps, rows) in enumerate([(7, 3), (10, 2)]):
        args, more = tokens(steps, rows), options_for(steps, rows, *extra)
        want = result(model, model, args, recompute=None, **more)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_same(result(model, compiled, args, **more), want)
    assert graphs.ops(graphs.forward[0]) == [FORWARD] * ops
    assert graphs.ops(graphs.backward[0]) == [BACKWARD] * ops


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by the compiler
def test_compiled_autograd() -> None:
    """The backward of a call inside another's, below whose autograd it may run."""
    module, x = layer(), sequence()
    want = [p.detach() for p in grads_of(module(x)[0], list(module.parameters()))]
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        module(x, recompute=3)[0].sin().sum().backward()
    assert_close([p.grad for p in module.parameters()], want, rtol=RTOL)


def test_opcheck() -> None:
    module, x, states = layer(num_layers=2), sequence(), sequence(2, B, H)
    lengths = torch.tensor([7, 0, 4])
    call = ("lstm", 2, 1, 1, False, "concat", 2, "none", 1.0, x, list(module.parameters()), states,
            states.detach(), None, states.detach().abs(), lengths, None, None, None, None, None,
            False, True, False)  # fmt: skip
    op = torch.ops.rnnkernels.recomputed_forward.default
    torch.library.opcheck(
        op,
        ("cpu", 3, False, *call),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    kept = op("cpu", 3, False, *call)[-2:]
    wanted = [0, 1, 3]
    torch.library.opcheck(
        torch.ops.rnnkernels.recomputed_backward.default,
        ("cpu", 3, False, wanted, sequence(T, B, H), None, None, None, None, *kept, *call),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_arguments_of_the_ops() -> None:
    """Behind their own, those of ``sequence_forward``."""
    ops = torch.ops.rnnkernels
    want = [(a.name, str(a.type)) for a in ops.sequence_forward.default._schema.arguments]
    for op, own in ((ops.recomputed_forward, 3), (ops.recomputed_backward, 11)):
        arguments = op.default._schema.arguments[own:]
        assert [(a.name, str(a.type)) for a in arguments] == want


WITHOUT_VALUES = {
    "weight_hh_l1": "weight_hh_l1: expected device cpu like the input, got meta",
    "hx": "Input and hidden tensors are not at the same device",
    "lengths": "lengths: expected values, got a tensor on the device meta",
}


@pytest.mark.parametrize("name", WITHOUT_VALUES)
@pytest.mark.parametrize("kind", ["GRU", "MGU"])
def test_tensors_without_values_are_refused(kind: str, name: str) -> None:
    """As without recompute: torch would run what has no values either."""
    layer = getattr(rk, kind)(3, 4, num_layers=2, recompute=2)
    given = {"hx": torch.zeros(2, 2, 4), "lengths": torch.tensor([5, 3])}
    if name in given:
        given[name] = given[name].to("meta")
    else:
        setattr(layer, name, nn.Parameter(getattr(layer, name).to("meta")))
    with pytest.raises(RuntimeError, match=WITHOUT_VALUES[name]):
        layer(torch.zeros(5, 2, 3), **given)


@pytest.mark.parametrize(
    ("wanted", "sums", "message"),
    [
        ([3], [], "^sums: expected one for each weight that is wanted, got 0"),
        ([0], ["w_hh"], "^sums: expected one for each weight that is wanted, 0, got 1"),
        ([3, 3], ["w_ih", "w_ih"], "^wanted: expected positions from 0 to 6, .* each once, got 3"),
        ([2], [], "^wanted: expected positions from 0 to 6, .* where there is one, .* got 2"),
        ([7], [], "^wanted: expected positions from 0 to 6, .* got 7"),
        ([3], ["b_ih"], r"^sums: expected a contiguous .* shape \[15, 4\].* got shape \[15\]"),
    ],
)
def test_wrong_sums_of_a_window(wanted: list[int], sums: list[str], message: str) -> None:
    """Nothing is written to, whatever else there was to add up."""
    call = make_call("gru", grad=False)
    given = [torch.ones_like(getattr(call, name)[0]) for name in sums]
    out = None, call.h0, None, None, None
    with pytest.raises(ValueError, match=message):
        torch.ops.rnnkernels.window_gradients(*forward_arguments(call), *out, wanted, given, False)
    assert all(bool((t == 1).all()) for t in given)


def test_sums_of_another_type() -> None:
    """A wider one is filled; in one that is not, sums would be rounded at every addition."""
    call = make_call("gru", grad=False)
    assert call.x.dtype == torch.float64
    out = None, call.h0, None, None, None
    for dtype in (torch.float32, torch.int64):
        sums = [torch.ones_like(call.w_ih[0], dtype=dtype)]
        with pytest.raises(
            ValueError, match=r"^sums: expected dtype Double like its weight, or a wider"
        ):
            torch.ops.rnnkernels.window_gradients(*forward_arguments(call), *out, [3], sums, False)
        assert bool((sums[0] == 1).all())


# Derivatives


def test_gradcheck() -> None:
    """Of first and second order, with rows that end before others."""
    module = rk.LSTM(2, 2, dtype=torch.float64)
    names, parameters = zip(*module.named_parameters(), strict=True)
    lengths = torch.tensor([4, 2])

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, weights, strict=True))
        y, (h_n, c_n) = functional_call(module, given, (x,), {"recompute": 3, "lengths": lengths})
        return y, h_n, c_n

    inputs = sequence(4, 2, 2), *parameters
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs, fast_mode=True)


def test_second_derivatives() -> None:
    """Also where x depends on a weight, and with windows of truncated BPTT."""
    module = layer(num_layers=2, truncate=4)

    def penalty(every: int | None) -> tuple[Tensor, ...]:
        x = sequence() @ module.weight_ih_l0[:I, :I]
        y = module(x, recompute=every)[0]
        dx, dw = grads_of(y, [x, module.weight_ih_l0], create_graph=True)
        return torch.autograd.grad(dx.square().sum() + dw.sin().sum(), list(module.parameters()))

    assert_close(penalty(3), penalty(None), rtol=1e-11)


def test_many_gradients_at_once() -> None:
    module, x = layer(), sequence()
    vectors = sequence(3, T, B, H)

    def rows(every: int | None) -> list[Tensor]:
        y = module(x, recompute=every)[0]
        return list(
            torch.autograd.grad(y, [x, module.weight_hh_l0], vectors, is_grads_batched=True)
        )

    assert_close(rows(3), rows(None), rtol=RTOL)


def test_torch_func() -> None:
    """Which keeps everything: the call goes the way without windows."""
    module, x = layer(), sequence().detach()
    got, want = (
        torch.func.grad(lambda x, k=k: module(x, recompute=k)[0].sum())(x) for k in (3, None)
    )
    assert_close(got, want, rtol=RTOL)


def test_backward_again() -> None:
    module, x = layer(), sequence()
    y = module(x, recompute=3)[0].sin().sum()
    first = torch.autograd.grad(y, [x], retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(y, [x])[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, [x])


def test_outputs_may_be_changed() -> None:
    module, x = layer(), sequence()
    got = grads_of(module(x, recompute=3)[0].relu_(), [x])
    assert_close(got, grads_of(module(x)[0].relu(), [x]), rtol=RTOL)


# Surroundings


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_under_a_dispatch_mode(backend: str) -> None:
    module, x = layer(backend=backend), sequence()
    with Dispatch():
        got = grads_of(module(x, recompute=3)[0], [x, *module.parameters()])
    assert_close(got, grads_of(module(x)[0], [x, *module.parameters()]), rtol=RTOL)


def test_inside_a_checkpoint() -> None:
    module, x = layer(), sequence()
    y = checkpoint(lambda x: module(x, recompute=3)[0], x, use_reentrant=False)
    assert_close(grads_of(y, [x]), grads_of(module(x)[0], [x]), rtol=RTOL)


def test_backward_in_another_autocast() -> None:
    """What forward ran in is what runs again."""
    module, x = layer(backend="reference").float(), sequence().float().detach().requires_grad_()
    want = grads_of(module(x)[0], [x])
    loss = module(x, recompute=3)[0].sin().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(loss, [x])
    assert_close(got, want, rtol=1e-5)


def test_batch_invariant() -> None:
    """Backward runs as forward did, wherever it runs: dx comes row by row, or from one product."""
    types = (torch.float32, torch.bfloat16, torch.float16)
    dtype = next((t for t in types if not multiplies_itself(t)), None)
    if dtype is None:
        pytest.skip("dx comes row by row in any case")
    module, x = layer().to(dtype), torch.randn(20, 9, I, dtype=dtype, requires_grad=True)
    with rk.batch_invariant():
        all_rows = module(x, recompute=4)[0]
        row = x[:, 4:5].detach().requires_grad_()
        alone = module(row, recompute=4)[0]
    by_rows = "rnnkernels::input_gradient"
    assert counted(lambda: all_rows.sum().backward())[by_rows] == 5
    assert torch.equal(x.grad[:, 4:5], torch.autograd.grad(alone.sum(), row)[0])
    y = module(x, recompute=4)[0]
    with rk.batch_invariant():
        assert by_rows not in counted(lambda: y.sum().backward())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("lengths", [None, [7, 2, 4]], ids=["", "lengths"])
def test_gradient_flow(backend: str, lengths: list[int] | None) -> None:
    module, x = layer(num_layers=2, bidirectional=True, backend=backend), sequence()

    def norms(every: int | None) -> list[Tensor]:
        with gradient_flow(module) as flow:
            module(x, recompute=every, lengths=lengths)[0].sin().sum().backward()
        return [flow.norms("", 0), flow.norms("", 1)]

    assert_close(norms(3), norms(None), rtol=RTOL)


# How it is asked for


def test_constructor_call_and_copies() -> None:
    module, x = layer(recompute=3), sequence()
    assert "recompute=3" in repr(module)
    assert pickle.loads(pickle.dumps(module)).recompute == 3
    own, none = kept(module, x), kept(module, x, recompute=None)
    assert own < none and kept(layer(), x, recompute=3) == own
    assert kept(layer(), x, recompute=np.int64(3)) == own
    old = rk.LSTM.__new__(rk.LSTM)
    old.__setstate__({k: v for k, v in module.__dict__.items() if k != "recompute"})
    assert old.recompute is None  # as pickled before this option was there
    assert "with recompute=3 ->" in str(rk.explain(module, x))


def kept(module: Any, x: Tensor, **call: Any) -> int:
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.nbytes) or t, lambda t: t
    ):
        module(x, **call)
    return sum(sizes)


def test_torch_nn_takes_its_place() -> None:
    """It changes no number, so a layer that asks for it may become one of torch.nn."""
    module, x = layer(recompute=3), sequence()
    want = module(x)[0]
    assert_close(rk.to_torch(module)(x)[0], want, rtol=RTOL)
    assert rk.from_torch(torch.nn.GRU(2, 3)).recompute is None


def test_functional() -> None:
    x = sequence()
    for module, function in ((rk.RNN, rk.functional.rnn), (rk.GRU, rk.functional.gru)):
        plain = module(I, H).double()
        y = function(x, None, plain.all_weights, recompute=2)[0]
        inputs = [x, *plain.parameters()]
        assert_close(grads_of(y, inputs), grads_of(plain(x)[0], inputs), rtol=RTOL)
        assert "recomputed_forward" in y.grad_fn.name()


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (0, ValueError, "recompute: expected at least 1 step, got 0"),
        (-3, ValueError, "recompute: expected at least 1 step, got -3"),
        (2.0, TypeError, "recompute: expected a number of steps, got float"),
        (True, TypeError, "recompute: expected a number of steps, got bool"),
        ((2, 3), TypeError, "recompute: expected a number of steps, got tuple"),
    ],
    ids=str,
)
def test_errors(asked: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rk.GRU(I, H, recompute=asked)
    with pytest.raises(error, match=message):
        rk.GRU(I, H)(torch.randn(T, B, I), recompute=asked)
    with pytest.raises(error, match=message):
        rk.functional.gru(torch.randn(T, B, I), None, rk.GRU(I, H).all_weights, recompute=asked)
