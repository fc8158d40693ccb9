"""grad_clip= against a backward loop written out step by step, and how it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkernels as rk
from cases import NAMES, convert, gradients, make_call, present, random_like
from op_calls import run
from rnnkernels import _backends
from rnnkernels._core import reference
from rnnkernels._core.call import Call, Clip, Layer
from rnnkernels.testing import assert_close

CLIPS = [Clip("value", 0.05), Clip("norm", 0.2), Clip("tanh", 0.1)]


def bounded(clip: Clip, dgx: Tensor, dgh: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas of the documentation, for gradients [B, G*H]."""
    kind, b = clip
    if kind == "value":
        return dgx.clip(-b, b), dgh.clip(-b, b)
    if kind == "tanh":
        return b * (dgx / b).tanh(), b * (dgh / b).tanh()
    factor = (b / dgx.square().sum(-1, keepdim=True).sqrt()).clip(max=1)
    return dgx * factor, dgh * factor


def by_hand(call: Layer, dy: Tensor, dstates: list[Tensor]) -> list[Tensor]:
    """dx, dW_ih, dW_hh, db_ih, db_hh, dh0 and dc0 of one direction, by the formulas alone."""
    cell, T = call.cell, call.x.size(0)
    w_ih, w_hh, b_ih, b_hh = call.w_ih[0], call.w_hh[0], call.b_ih[0], call.b_hh[0]
    prev = [call.h0[0]] if call.c0 is None else [call.h0[0], call.c0[0]]
    steps = []
    for t in range(T):
        gx, gh = call.x[t] @ w_ih.t() + b_ih, prev[0] @ w_hh.t() + b_hh
        next, saved = cell.forward(gx.chunk(cell.G, -1), gh.chunk(cell.G, -1), prev)
        steps.append((prev, list(next), saved))
        prev = list(next)
    dx = torch.zeros_like(call.x)
    dw_ih, dw_hh, db_ih, db_hh = (torch.zeros_like(w) for w in (w_ih, w_hh, b_ih, b_hh))
    dnext = list(dstates)
    for t in reversed(range(T)):
        prev, next, saved = steps[t]
        if call.window and (t + 1) % call.window == 0 and t + 1 < T:
            dnext = [torch.zeros_like(d) for d in dnext]
        dnext[0] = dnext[0] + dy[t]
        parts, hidden, dprev = cell.backward(saved, prev, next, dnext)
        dgx, dgh = bounded(call.clip, torch.cat(list(parts), -1), torch.cat(list(hidden), -1))
        dx[t] = dgx @ w_ih
        dw_ih += dgx.t() @ call.x[t]
        dw_hh += dgh.t() @ prev[0]
        db_ih += dgx.sum(0)
        db_hh += dgh.sum(0)
        dnext = [dprev[0] + dgh @ w_hh, *dprev[1:]]
    return [dx, dw_ih, dw_hh, db_ih, db_hh, *(d[None] for d in dnext)]


def detached(t: Tensor) -> Tensor:
    return t.detach().clone()


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.kind)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_loop_by_hand(name: str, clip: Clip, window: int) -> None:
    call = make_call(name, T=8, B=3, H=21, grad=True)._replace(clip=clip, window=window)
    outs = present(run(call))
    douts = random_like(outs)
    expected = by_hand(convert(call, detached), douts[0], [d[0] for d in douts[1:]])
    for runner in (run, reference.run_layer):
        outs = present(runner(call))
        grads = torch.autograd.grad(outs, call.tensors, douts)
        assert_close(grads, [e.detach() for e in expected], rtol=1e-12)
    free = torch.autograd.grad(present(run(call._replace(clip=Clip()))), call.tensors, douts)
    assert not torch.allclose(free[0], grads[0])  # the bound is one that is felt


@pytest.mark.parametrize("options", [{}, {"lengths": True}, {"reset": True}], ids=str)
@pytest.mark.parametrize("window", [0, 2, 3])
@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.kind)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_equal_the_reference(
    name: str, clip: Clip, window: int, options: dict[str, Any]
) -> None:
    for proj in [0, 3] if name == "lstm" else [0]:
        call = make_call(name, T=7, B=4, H=19, D=2, proj=proj, all_states=name == "lstm", **options)
        call = call._replace(clip=clip, window=window)
        for got, expected in zip(
            gradients(run, call), gradients(reference.run_layer, call), strict=True
        ):
            assert_close(got, [e.detach() for e in expected], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.kind)
def test_other_dtypes(clip: Clip, dtype: torch.dtype) -> None:
    call = make_call("gru", T=6, B=3, H=19, dtype=dtype)._replace(clip=clip, window=4)
    _, grads = gradients(run, call)
    _, expected = gradients(reference.run_layer, convert(call, Tensor.double))
    assert_close(grads, expected)


def test_a_norm_in_many_rows_and_threads() -> None:
    """More rows than a block holds, more units than a thread takes."""
    call = make_call("lstm", T=6, B=150, inputs=3, H=70)._replace(clip=CLIPS[1], window=2)
    _, grads = gradients(run, call)
    _, expected = gradients(reference.run_layer, call)
    assert_close(grads, [e.detach() for e in expected], rtol=1e-12)


def test_a_zero_gradient_stays_zero() -> None:
    """No division by a norm of zero."""
    for clip in CLIPS:
        call = make_call("lstm", T=4)._replace(clip=clip)
        for runner in (run, reference.run_layer):
            y = runner(call).y
            grads = torch.autograd.grad(y, call.tensors, torch.zeros_like(y))
            assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_bounds_what_would_overflow() -> None:
    """A gradient of 1e30 whose square is no float32."""
    call = make_call("rnn_tanh", T=3, H=5, dtype=torch.float32)._replace(clip=Clip("norm", 1.0))
    y = run(call).y
    grads = torch.autograd.grad(y, call.tensors, torch.full_like(y, 1e30))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize(
    ("asked", "clip"),
    [
        (0.5, Clip("value", 0.5)),
        (2, Clip("value", 2.0)),
        (("value", 0.5), Clip("value", 0.5)),
        (("norm", 1.0), Clip("norm", 1.0)),
        (["tanh", 3], Clip("tanh", 3.0)),
        (None, Clip()),
    ],
    ids=str,
)
def test_how_it_is_asked_for(asked: Any, clip: Clip) -> None:
    seen: list[Clip] = []

    def observer(call: Call, name: str | None) -> Any:
        seen.append(Clip(call.clip, call.bound))
        return _backends.select(call, name).run(call)

    x, gru, plain = torch.randn(3, 2, 4), rk.GRU(4, 5, grad_clip=asked), rk.GRU(4, 5)
    with _backends.observe(observer):
        gru(x)
        plain(x, grad_clip=asked)
        rk.functional.gru(x, None, plain.all_weights, grad_clip=asked)
        gru(x, grad_clip=None)
    assert seen == [clip, clip, clip, Clip()]


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (0, ValueError),
        (-1.0, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (("norm", 0.0), ValueError),
        (("size", 1.0), ValueError),
        (("none", 1.0), ValueError),
        (True, TypeError),
        ("norm", TypeError),
        (("norm", "1"), TypeError),
        ((1.0, "norm"), TypeError),
        (("norm", 1.0, 2.0), TypeError),
        (torch.tensor(1.0), TypeError),
    ],
    ids=str,
)
def test_errors(asked: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="grad_clip: expected"):
        rk.LSTM(3, 4, grad_clip=asked)
    with pytest.raises(error, match="grad_clip: expected"):
        rk.LSTM(3, 4)(torch.randn(2, 1, 3), grad_clip=asked)
    with pytest.raises(error, match="grad_clip: expected"):
        lstm = torch.nn.LSTM(3, 4)
        rk.functional.lstm(torch.randn(2, 1, 3), None, lstm.all_weights, grad_clip=asked)
