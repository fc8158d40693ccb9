"""NaN, infinite and huge numbers in calls of layers, and where they have to show; for the tests of
any backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import op_parity
import torch
from op_parity import Case
from torch import Tensor

from rnnkernels import reference
from rnnkernels.call import Call

INF, NAN = torch.inf, torch.nan
ROW, STEP = 1, 2  # where it is one number that is special


def _in(name: str, value: float) -> Callable[[Call], None]:
    """Sets one number of x, or of an initial state."""

    def change(call: Call) -> None:
        t = getattr(call, name)
        if t is not None:
            t[STEP if name == "x" else slice(None), ROW, 0] = value

    return change


def _weight(value: float) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        call.w_hh[0][1, 2] = value

    return change


def _huge(call: Call) -> None:
    """Products that overflow, all to one side: of both, it depends on fused additions what is left."""
    for w in (*call.w_ih, *call.w_hh):
        w.copy_(w.abs() * largest(w) ** 0.8)
    call.x.copy_(call.x.abs() * largest(call.x) ** 0.5)


def _doubling(call: Call) -> None:
    """Each unit by itself, until it overflows."""
    for w in call.w_hh:
        rows, R = w.shape
        w.copy_(torch.eye(R).repeat(-(-rows // R), 1)[:rows] * largest(w) ** 0.2)


def _closed(call: Call) -> None:
    """Gates that are shut in front of a huge, or an infinite, state."""
    for b in (*call.b_ih, *call.b_hh):
        b.fill_(-200)
    state = call.h0 if call.c0 is None else call.c0
    state.copy_(largest(state) ** 0.95)
    state[:, ROW] = INF


def largest(t: Tensor) -> float:
    return float(torch.finfo(t.dtype).max)


SPECIAL: dict[str, Callable[[Call], None]] = {
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
}


def special(call: Call, name: str) -> Call:
    """The same call with such numbers in it; no tensor is shared."""
    call = op_parity.converted(call, call.x.dtype)
    with torch.no_grad():
        SPECIAL[name](call)
    return call


def difference(got: Tensor, want: Tensor) -> str:
    """Where two tensors are not NaN, or infinite, in the same places and near elsewhere; or ""."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    near = 1e-2 * want[want.isfinite()].abs().max() if want.isfinite().any() else 0.0
    differs = ~((got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= near))
    if not differs.any():
        return ""
    at = tuple(int(i) for i in differs.nonzero()[0])
    return f"{list(at)}: {got[at].item():.4g}, not {want[at].item():.4g}; {int(differs.sum())} more"


def gradients_at_hand(call: Call, out: list[Tensor], back: list[Tensor]) -> list[Tensor]:
    """dx, the gradients of the biases and of the initial states: no product over steps, which
    tests make themselves at this level."""
    found = op_parity.parameter_gradients(call, out, back)
    weights = len(call.w_ih) + len(call.w_hh)
    return [found[0], *found[1 + weights :]]


def check(ops: Any, case: Case, name: str, dtype: torch.dtype, **options: Any) -> None:
    """Both ops of a backend on such a call against the reference in float32, or float64."""
    call = special(op_parity.make(case, dtype), name)
    out = op_parity.forward(ops, call)
    grads = op_parity.random_gradients(call, out)
    back = op_parity.backward(ops, call, out, grads)
    wide = torch.promote_types(dtype, torch.float32)
    exact = op_parity.converted(call, wide)
    for t in exact.tensors:
        t.requires_grad_()
    want = reference.run(exact)
    pairs = zip(("y", "h_n", "c_n", "c"), out, want, strict=False)
    for what, g, w in pairs:
        if w is not None:
            assert not difference(g, w.to(dtype)), f"{what}{difference(g, w.to(dtype))}"
    loss = sum((o * g.to(wide)).sum() for o, g in zip(want, grads, strict=True) if o is not None)
    inputs = [exact.x, *exact.b_ih, *exact.b_hh, exact.h0]
    inputs += [] if exact.c0 is None else [exact.c0]
    wanted = torch.autograd.grad(loss, inputs)
    got = gradients_at_hand(
        *(op_parity.converted(t, wide) for t in (call, out, back)),
    )
    for n, (g, w) in enumerate(zip(got, wanted, strict=True)):
        assert not difference(g, w), f"gradient {n}{difference(g, w)}"
