"""NaN, infinite and huge numbers in calls of layers, and where they have to show; for the tests of
any backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import op_parity
from op_parity import CLIPS, Case
from rnnkernels._core import reference
from rnnkernels._core.call import Layer
from rnnkernels.cells import CELLS, find

INF, NAN = torch.inf, torch.nan
ROW, STEP = 2, 2  # where it is one number that is special; the row is whole, whatever the lengths


def _in(name: str, value: float) -> Callable[[Layer], None]:
    """Sets one number of x, or of an initial state."""

    def change(call: Layer) -> None:
        t = getattr(call, name)
        if t is not None:
            t[STEP if name == "x" else slice(None), ROW, 0] = value

    return change


def _weight(value: float) -> Callable[[Layer], None]:
    def change(call: Layer) -> None:
        call.w_hh[0][1, 2] = value

    return change


def _huge(call: Layer) -> None:
    """Products that overflow to one side; of two sides, fused additions decide what is left."""
    for w in (*call.w_ih, *call.w_hh):
        w.copy_(w.abs() * largest(w) ** 0.8)
    call.x.copy_(call.x.abs() * largest(call.x) ** 0.5)


def _doubling(call: Layer) -> None:
    """Each unit by itself, until it overflows."""
    for w in call.w_hh:
        rows, R = w.shape
        w.copy_(torch.eye(R, dtype=w.dtype).repeat(-(-rows // R), 1)[:rows] * largest(w) ** 0.2)


def _closed(call: Layer) -> None:
    """Gates that are shut in front of a huge, or an infinite, state."""
    for b in (*call.b_ih, *call.b_hh):
        b.fill_(-200)
    state = call.h0 if call.c0 is None else call.c0
    state.copy_(largest(state) ** 0.95)
    state[:, ROW] = INF


def largest(t: Tensor) -> float:
    return float(torch.finfo(t.dtype).max)


SPECIAL: dict[str, Callable[[Layer], None]] = {
    "nan input": _in("x", NAN),
    "inf input": _in("x", INF),
    "-inf input": _in("x", -INF),
    "nan h0": _in("h0", NAN),
    "inf h0": _in("h0", INF),
    "-inf h0": _in("h0", -INF),
    "nan c0": _in("c0", NAN),
    "inf c0": _in("c0", INF),
    "nan weight": _weight(NAN),
    "inf weight": _weight(INF),
    "huge": _huge,
    "doubling": _doubling,
    "closed": _closed,
    "nan gradient": lambda call: None,  # of one unit of y, which the call does not hold
}


def _means_something(case: Case, title: str) -> bool:
    if case.reset and title.endswith("weight"):
        return False  # a state of zeros may be multiplied by it, or skipped
    if title == "closed" and not case.bias:
        return False
    return find(case.cell).S > 1 or not title.endswith("c0")


def special(call: Layer, name: str) -> Layer:
    """The same call with such numbers in it; no tensor is shared."""
    call = op_parity.converted(call, call.x.dtype)
    with torch.no_grad():
        SPECIAL[name](call)
    return call


def difference(got: Tensor, want: Tensor, near: float = 1e-3) -> str:
    """Where two tensors are not NaN, or infinite, in the same places and near elsewhere; or ""."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    finite = want[want.isfinite()].abs()
    bound = near * finite.max() if len(finite) else 0.0
    differs = ~((got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= bound))
    if not differs.any():
        return ""
    at = tuple(int(i) for i in differs.nonzero()[0])
    return f"{list(at)}: {got[at].item():.4g}, not {want[at].item():.4g}; {int(differs.sum())} more"


CASES = [
    *(Case(cell) for cell in CELLS),
    *(Case(cell, D=2, T=6, lengths=True, bias=False) for cell in CELLS),
    *(Case(cell, B=5, H=19, reset=True, window=2) for cell in CELLS),
    *(Case("gru", clip=clip) for clip in CLIPS),
    *(Case("rnn_relu", lengths=True, reset=True, clip=clip) for clip in CLIPS),
]
TITLES = [(case, title) for case in CASES for title in SPECIAL if _means_something(case, title)]
#: A share of them, for what takes long: of each case other titles.
SOME = TITLES[::5] + [
    (case, title) for case, title in TITLES if case.clip.kind != "none" and title == "nan gradient"
]
some = pytest.mark.parametrize(("case", "title"), SOME, ids=str)


@contextmanager
def without_onednn() -> Iterator[None]:
    """oneDNN's products of bfloat16 on AMX read past the end of a row of odd length, and multiply
    that by zeros: an infinite number in one row makes NaN of the row before (torch 2.13: a product
    [25, 5] x [5, 76] in two of three trials). Projections in front of kernels are such products.

    ``torch.backends.mkldnn.flags`` would set other switches as well, and warn of one."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


@without_onednn()
def check(ops: Any, case: Case, title: str, dtype: torch.dtype = torch.float32) -> None:
    """Both ops of a backend on such a call against the reference in float32, or float64: outputs,
    and the gradients that need no sum over steps but that of the biases."""
    call = special(op_parity.make(case, dtype), title)
    out = op_parity.forward(ops, call)
    # Of one sign, or what is left of products that overflow depended on their order.
    grads = [g if g is None else g.abs() for g in op_parity.random_gradients(call, out)]
    if title == "nan gradient" and grads[0] is not None:
        grads[0][STEP, ROW, 1] = NAN
    back = op_parity.backward(ops, call, out, grads)

    wide = torch.promote_types(dtype, torch.float32)
    near = 5e-2 if dtype.itemsize == 2 else 1e-3
    exact = op_parity.converted(call, wide)
    for t in exact.tensors:
        t.requires_grad_()
    want = reference.run_layer(exact)
    wrong = {}
    for name, g, w in zip(("y", "h_n", "c_n", "c"), out, want, strict=False):
        if w is not None:
            wrong[name] = difference(g, w.to(dtype), near)
    pairs = [(o, g.to(wide)) for o, g in zip(want, grads, strict=True) if o is not None]
    loss = torch.stack([(o * g).sum() for o, g in pairs]).sum()
    inputs = {"x": exact.x, "h0": exact.h0, "c0": exact.c0}
    inputs |= {f"b_ih {d}": b for d, b in enumerate(exact.b_ih)}
    inputs |= {f"b_hh {d}": b for d, b in enumerate(exact.b_hh)}
    inputs = {name: t for name, t in inputs.items() if t is not None}
    wanted = dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))
    as_wide = [op_parity.converted(t, wide) for t in (call, out, back)]
    found = op_parity.parameter_gradients(*as_wide)
    got = dict(zip(map(id, call.tensors), found, strict=True))
    named = {"x": call.x, "h0": call.h0, "c0": call.c0}
    named |= {f"b_ih {d}": b for d, b in enumerate(call.b_ih)}
    named |= {f"b_hh {d}": b for d, b in enumerate(call.b_hh)}
    for name, w in wanted.items():
        wrong[f"gradient of {name}"] = difference(got[id(named[name])].to(dtype), w.to(dtype), near)
    assert not any(wrong.values()), {name: text for name, text in wrong.items() if text}
