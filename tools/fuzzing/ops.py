"""Random calls of the ops, below all checks in Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuzzing.judge import Attempt
from fuzzing.modules import _said
from fuzzing.spoil import FLOATS, Drawn
from rnnkernels._core import reference
from rnnkernels._core.call import ARGUMENTS, Call
from rnnkernels._ops import result
from rnnkernels.cells import CELLS, find

kernels = torch.ops.rnnkernels
FORWARD = Call._fields[:ARGUMENTS]
NAMES = (
    *FORWARD, "input", "hx", "hidden", "weight", "weight_ih", "weight_hh", "bias_ih", "bias_hh",
    "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "weight_hr", "parameter", "dy", "dh_n", "dc_n", "dys",
    "dc", "y", "ys", "saved", "h_raw", "wanted", "lanes", "record", "initial", "invariant",
    "dgates", "argument", "cell", "a", "b", "w", "sums", "tangents", "merge_mode", "layers",
    "h0_at", "c0_at", "y_at", "c_at", "saved_at", "of_gx", "of_gh", "of_h", "dnext", "h0_t",
    "c0_t", "y_t", "c_t", "saved_t", "of_raw",
)  # fmt: skip


def _call(d: Drawn) -> Call:
    """A good one."""
    rng, cell = d.rng, find(d.pick(*CELLS))
    T, B, I, H = d.pick(0, 1, 2, 3, 6), d.pick(0, 1, 2, 4), rng.randrange(1, 6), rng.randrange(1, 9)
    D, L, dtype = d.pick(1, 2), d.pick(1, 1, 2, 3), d.pick(*FLOATS)
    heads = d.pick(1, 1, 1, 2)
    projected = cell.S > 1 and heads == 1 and H > 1 and d.chance(0.3)
    R = rng.randrange(1, H) if projected else H
    merge = d.pick("concat", "concat", "sum", "mean", "mul") if D == 2 else "concat"
    weights: list[Tensor] = []
    biases, rows = d.pick(0, 1, 2), heads * cell.G * H
    for n in range(L):
        below = I if n == 0 else heads * R * (D if merge == "concat" else 1)
        for _ in range(D):
            weights += [d.tensor(rows, below, dtype=dtype, scale=0.5)]
            weights += [d.tensor(rows, R, dtype=dtype, scale=0.5)]
            weights += [d.tensor(rows, dtype=dtype, scale=0.5) for _ in range(biases)]
            weights += [d.tensor(R, H, dtype=dtype, scale=0.5)] if projected else []
    S = L * D * heads
    mask = d.chance(0.2) and L > 1
    lengths = [rng.randrange(T + 1) for _ in range(B)]
    return Call(
        cell.name, layers=L, directions=D, heads=heads, projected=projected, merge_mode=merge,
        window=d.pick(0, 0, 0, 1, 2, 9), clip=d.pick("none", "none", "value", "norm", "tanh"),
        bound=d.pick(0.5, 1.0, 2.0), x=d.tensor(T, B, I, dtype=dtype), weights=weights,
        h0=d.tensor(S, B, R, dtype=dtype),
        c0=d.tensor(S, B, cell.C * H, dtype=dtype) if cell.C else None,
        masks=[d.tensor(1, B, heads * R * (D if merge == "concat" else 1), dtype=dtype)
               for _ in range(L - 1)] if mask else None,
        h_mask=d.tensor(S, B, R, dtype=dtype) if d.chance(0.1) else None,
        lengths=torch.tensor(lengths, dtype=torch.long) if d.chance(0.3) else None,
        reset=torch.rand(T, B, generator=d.torch) < 0.3 if d.chance(0.3) else None,
        save=d.chance(0.5), all_states=d.chance(0.3), step=d.chance(0.05),
    )  # fmt: skip


def _spoil(d: Drawn, names: tuple[str, ...], values: list[Any], p: float = 0.75) -> None:
    while d.chance(p):
        place = d.rng.randrange(len(values))
        new = d.spoiled(names[place], values[place])
        if isinstance(new, int) and names[place] in ("layers", "heads", "lanes"):
            new = new if new < 100 or new >= 2**60 else 100
        values[place] = new
        p /= 2


def forward(d: Drawn, written: bool) -> Attempt:
    values: list[Any] = list(_call(d)[:ARGUMENTS])
    _spoil(d, FORWARD, values)

    def run() -> Any:
        outputs = kernels.sequence_forward(*values)
        return tuple(result(Call(*values), outputs))[:3]

    def expected() -> Any:
        call = Call(*values)  # numbers as the op takes them, whatever their types
        call = call._replace(projected=bool(call.projected), heads=int(call.heads))
        call = call if call.noise is not None else call._replace(draws=None)
        return tuple(reference.run(call._replace(directions=int(call.directions))))[:3]

    narrow = isinstance(values[9], Tensor) and values[9].dtype in (torch.bfloat16, torch.float16)
    said = _said(dict(zip(FORWARD, values, strict=True)))
    words = " ".join(d.done)
    skip = (narrow and "NaN" in words) or "huge" in words or d.chance(0.3)
    return Attempt(f"sequence_forward({said})", NAMES, run, None if skip else expected)


def backward(d: Drawn, written: bool) -> Attempt:
    """Gradients of a good call, with arguments that may not fit it."""
    call = _call(d)._replace(save=True)
    out = [t.detach() for t in kernels.sequence_forward(*call[:ARGUMENTS])]
    y, h_n, c_n, ys, c, h_raw, saved = out
    settings = dict(zip(FORWARD[:9], call[:9], strict=True))

    def grad(t: Tensor) -> Tensor | None:
        return torch.randn_like(t) if t.numel() and d.chance(0.7) else None

    asked: dict[str, Any] = {"dy": grad(y), "dh_n": grad(h_n)}
    asked |= {"dc_n": grad(c_n) if call.c0 is not None else None, "dys": None, "dc": None}
    model = {name: getattr(call, name) for name in ("weights", "h0", "c0", "masks", "h_mask")}
    steps = {name: getattr(call, name) for name in ("lengths", "starts", "reset", "noise", "draws")}
    which = d.pick("sequence_backward", "sequence_backward_", "sequence_gradients")
    if which == "sequence_gradients":
        wanted = [i for i in range(len(call.tensors)) if d.chance(0.6)]
        made = {"y": y, "ys": ys, "c": c, "h_raw": h_raw, "saved": saved}
        flags: dict[str, Any] = {"wanted": wanted, "record": d.chance(0.2), "invariant": False}
        arguments = {**settings, **asked, "x": call.x, **model, **made, **steps, **flags}
        arguments["lanes"] = 0
    else:
        made = {"y": y, "ys": ys, "c": c, "saved": saved}
        flags = {"record": d.chance(0.2), "initial": d.chance(0.7), "invariant": False}
        arguments = {**settings, **asked, **model, **made, **steps, **flags}
    names, values = tuple(arguments), list(arguments.values())
    _spoil(d, names, values)

    def run() -> Any:
        with torch.no_grad():
            return getattr(kernels, which)(*values)

    return Attempt(f"{which}({_said(dict(zip(names, values, strict=True)))})", NAMES, run)


def input_gradient(d: Drawn, written: bool) -> Attempt:
    rows, I, dtype = d.rng.randrange(1, 9), d.rng.randrange(1, 6), d.pick(*FLOATS)
    D, dims = d.pick(1, 2), d.pick([2, 3], [5], [0, 3])
    values: list[Any] = [d.tensor(*dims, D, rows, dtype=dtype)]
    values.append([d.tensor(rows, I, dtype=dtype) for _ in range(D)])
    names = ("dgates", "w_ih")
    _spoil(d, names, values)
    said = _said(dict(zip(names, values, strict=True)))
    return Attempt(f"input_gradient({said})", NAMES, lambda: kernels.input_gradient(*values))


def products(d: Drawn, written: bool) -> Attempt:
    """Those of tangents: rows by a matrix, and sums over steps."""
    K, M, N = (d.pick(0, 1, 2, 5, 17) for _ in "KMN")
    count, dtype = d.pick(1, 1, 2, 3), d.pick(*FLOATS)
    which = d.pick("rows_product", "steps_product")
    names = ("a", "w") if which == "rows_product" else ("a", "b")
    values: list[Any] = [d.tensor(M, K, dtype=dtype), d.tensor(K, N, dtype=dtype)]
    if which == "steps_product":
        values = [[d.tensor(K, of, dtype=dtype) for _ in range(count)] for of in (M, N)]
    _spoil(d, names, values)
    said = _said(dict(zip(names, values, strict=True)))
    return Attempt(f"{which}({said})", NAMES, lambda: getattr(kernels, which)(*values))


def window(d: Drawn, written: bool) -> Attempt:
    """A window of recompute: forward and backward, and sums to add gradients of weights to."""
    call = _call(d)._replace(save=True, step=False)
    of: dict[str, Any] = {
        "dy": None,
        "dh_n": torch.randn_like(call.h0),
        "dc_n": None,
        "dys": None,
        "dc": None,
    }
    first = len(call.tensors) - len(call.weights)
    wanted = [i for i, t in enumerate(call.tensors) if t is not None and d.chance(0.6)]
    sums = [torch.zeros_like(call.weights[i - first]) for i in wanted if i >= first]
    arguments: dict[str, Any] = dict(zip(FORWARD, call[:ARGUMENTS], strict=True))
    arguments |= {**of, "wanted": wanted, "sums": sums, "invariant": False}
    names, values = tuple(arguments), list(arguments.values())
    _spoil(d, names, values)
    said = _said(dict(zip(names, values, strict=True)))

    def run() -> Any:
        with torch.no_grad():
            return kernels.window_gradients(*values)

    return Attempt(f"window_gradients({said})", NAMES, run)


def tangents(d: Drawn, written: bool) -> Attempt:
    """Loops over tangents of one layer, with arguments that may not fit it."""
    call = _call(d)
    while call.layers > 1 or call.merge_mode != "concat":
        call = _call(d)
    call = call._replace(save=True, step=False, window=0, clip="none")
    y, _, _, _, c, _, saved = (t.detach() for t in kernels.sequence_forward(*call[:ARGUMENTS]))
    given: dict[str, Any] = dict(zip(FORWARD, call[:ARGUMENTS], strict=True))
    D, H = call.directions * call.heads, call.H
    steps, dtype = call.x.shape[:2], call.x.dtype

    def added(*after: int) -> Tensor | None:
        return d.tensor(*steps, *after, dtype=dtype) if d.chance(0.3) else None

    states = (call.h0, call.c0, y, c, saved)
    which = d.pick("forward_tangents", "backward_record", "backward_tangents")
    if which == "forward_tangents":
        width = find(call.cell_name).G * H
        extra: list[Any] = [*states, added(D, width), added(D, width), added(D * call.h0.size(2))]
        values = [*given.values(), *extra]
    else:
        known = given | {"y": y, "ys": y.new_empty(0), "c": c, "saved": saved}
        known |= {"dy": torch.randn_like(y), "record": False, "initial": True, "invariant": False}
        op = kernels.sequence_backward.default
        values = [known.get(a.name) for a in op._schema.arguments]
        if which == "backward_tangents":
            dnext = d.tensor(1, *steps, D, find(call.cell_name).S * H, dtype=dtype)
            values += [dnext, *states, added(D, H)]
    names = tuple(a.name for a in getattr(kernels, which).default._schema.arguments)
    _spoil(d, names, values)
    said = _said(dict(zip(names, values, strict=True)))

    def run() -> Any:
        with torch.no_grad():
            return getattr(kernels, which)(*values)

    return Attempt(f"{which}({said})", NAMES, run)
