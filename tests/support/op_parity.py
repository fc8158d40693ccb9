"""Holds the two sequence ops of a backend against the reference; for the tests of any backend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import op_calls
from cases import make_call
from rnnkernels._core import reference
from rnnkernels._core.call import Clip, Layer
from rnnkernels.cells import CELLS, NORMED, find


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    cell: str
    D: int = 1
    T: int = 5
    B: int = 4
    H: int = 7
    R: int = 0  # 0: no projection
    I: int = 3
    bias: bool = True
    lengths: bool = False
    reset: bool = False
    window: int = 0
    clip: Clip = field(default_factory=Clip)
    flow: bool = False
    packed: bool = False  # in place of lengths
    drop: bool = False  # recurrent dropout
    heads: int = 1  # of each direction, with H units each

    def __str__(self) -> str:
        names = ("bias", "lengths", "reset", "flow", "packed", "drop")
        options = [name for name in names if getattr(self, name)]
        options += [f"heads{self.heads}"] * (self.heads > 1)
        options += [f"window{self.window}"] * (self.window > 0)
        options += [f"{self.clip.kind}{self.clip.bound}"] * (self.clip.kind != "none")
        return "-".join([self.cell, f"D{self.D}T{self.T}B{self.B}H{self.H}R{self.R}", *options])


CLIPS = [Clip("value", 0.1), Clip("norm", 0.3), Clip("tanh", 0.1)]
#: Cells whose gradients of the gates fit the memory of what forward saves.
OVER_SAVED = [name for name, cell in CELLS.items() if cell.K == cell.G + cell.A]
WINDOWS = (1, 2, 3, 5, 9)  # of T = 5
ALL: dict[str, Any] = {"lengths": True, "reset": True, "flow": True}
CASES = [
    *(Case(cell, D) for cell in CELLS for D in (1, 2)),
    *(Case(cell, D, lengths=True, reset=True) for cell in CELLS for D in (1, 2)),
    *(Case("lstm", D, R=3, lengths=True, reset=True) for D in (1, 2)),
    Case("lstm", 2, R=9, H=5),
    Case("lstm", 2, T=6, B=5, H=33, R=3, bias=False),
    Case("gru", 2, T=6, B=5, H=33, bias=False),
    Case("gru", 2, T=6, lengths=True),
    Case("lstm", 2, T=6, reset=True),
    *(Case(cell, 2, T=0) for cell in ("lstm", "gru")),
    *(Case(cell, 2, B=0, lengths=True, reset=True) for cell in ("lstm", "gru")),
    *(Case("lstm", 2, T=T, B=B, R=3) for T, B in ((0, 3), (3, 0))),
    *(Case(cell, 1, T=1, B=1, H=1, I=1) for cell in CELLS),
    *(Case(cell, 2, window=k, **ALL) for cell in CELLS for k in WINDOWS),
    *(Case(cell, 2, clip=clip, **ALL) for cell in CELLS for clip in CLIPS),
    *(Case("lstm", 2, R=3, window=k, clip=clip, **ALL) for k, clip in enumerate(CLIPS, 1)),
    *(Case("gru", 1, T=6, window=k, clip=clip) for k, clip in enumerate(CLIPS, 1)),
    *(Case("lstm", 2, T=6, R=3, window=k, flow=True) for k in WINDOWS),
    *(Case("gru", 2, T=T, B=B, window=1, clip=CLIPS[1], **ALL) for T, B in ((0, 3), (3, 0))),
    *(Case(cell, 2, B=6, reset=True, flow=True, packed=True) for cell in CELLS),
    *(Case("gru", 1, window=k, flow=True, packed=True) for k in WINDOWS[:3]),
    *(Case("lstm", 2, B=9, H=20, reset=True, window=2, clip=c, packed=True) for c in CLIPS),
    Case("lstm", 2, R=3, B=6, window=2, reset=True, flow=True, packed=True),
    Case("gru", 1, T=1, B=3, packed=True),
]
#: Of recurrent dropout, which some backends refuse.
DROPPED = [
    *(Case(cell, 2, drop=True, H=H) for cell in CELLS for H in (7, 33)),
    *(Case(cell, 2, drop=True, clip=clip, **ALL) for cell, clip in zip(CELLS, CLIPS, strict=False)),
    *(Case("lstm", 2, R=3, drop=True, window=k, **ALL) for k in (0, 2)),
    *(Case(cell, 2, drop=True, window=2, packed=True, reset=True) for cell in ("lstm", "gru")),
    *(Case("gru", D, T=T, drop=True) for D in (1, 2) for T in (0, 1)),
]
#: Of heads, likewise.
HEADED = [
    Case("lstm", 2, heads=2, window=2, drop=True, **ALL),
    Case("gru", 1, heads=3, H=4, packed=True, reset=True, bias=False),
    Case("rnn_tanh", 2, heads=2, clip=CLIPS[1], **ALL),
]


#: Of cells whose products are normalised, likewise: one part of a row for each thread or more.
NORMED_CASES = [
    *(Case(cell, D, H=H, **ALL) for cell in NORMED for D, H in ((1, 7), (2, 37))),
    *(Case(cell, 2, window=k, **ALL) for cell in NORMED for k in (1, 3)),
    *(Case(cell, 2, clip=clip, **ALL) for cell in NORMED for clip in CLIPS),
    *(Case(cell, 1, T=1, B=1, H=1, bias=False) for cell in NORMED),
    *(Case(cell, 2, T=T, B=B) for cell, T, B in zip(NORMED, (0, 3), (3, 0), strict=True)),
    *(Case(cell, 2, drop=True, window=2, packed=True, reset=True) for cell in NORMED),
    Case("layer_norm_lstm", 2, R=3, H=9, drop=True, **ALL),
    Case("layer_norm_lstm", 1, R=9, H=5, window=2, clip=CLIPS[1], packed=True, flow=True),
]


def make(case: Case, dtype: torch.dtype, device: str = "cpu") -> Layer:
    """A call with random values; row 0 has length 0 where there are lengths, one row is whole.

    Packed rows get shorter one by one, and the last has a single step.
    """
    lengths = (torch.arange(case.B) * 2) % (case.T + 1)
    lengths[case.B // 2 :][:1] = case.T
    if case.packed:
        lengths = (case.T - torch.arange(case.B)).clamp(min=1)
    gen = torch.Generator().manual_seed(1)
    reset = torch.rand(case.T, case.B, generator=gen) < 0.4
    reset[-1:, case.B // 2 :][:, :1] = True  # in the last step of a whole row
    call = make_call(
        case.cell,
        case.T,
        case.B,
        case.I,
        case.H,
        case.D,
        heads=case.heads,
        proj=case.R,
        bias="double" if case.bias else "none",
        lengths=lengths.tolist() if case.lengths or case.packed else False,
        reset=reset if case.reset else False,
        all_states=find(case.cell).S > 1,
        grad=False,
        gain=0.5,
        dtype=dtype,
        device=device,
        seed=1,
    )
    flow = None
    if case.flow:
        flow = torch.zeros(case.T, case.B, case.D * case.heads, dtype=torch.float64)
    if case.drop:
        kept = torch.rand(call.h0.shape, generator=gen) >= 0.4
        call = call._replace(h_mask=(kept / 0.6).to(call.h0))
    call = call._replace(window=case.window, clip=case.clip, flow=flow)
    return packed(call) if case.packed else call


def exists(call: Layer) -> Tensor:
    """Whether there is a step at each position: [T, B]."""
    assert call.lengths is not None
    return torch.arange(call.T, device=call.x.device)[:, None] < call.lengths


def packed(call: Layer) -> Layer:
    """The same call without its padding; its rows stand longest first."""
    steps = exists(call)
    starts = torch.nn.functional.pad(steps.sum(1).cumsum(0), (1, 0))
    reset = None if call.reset is None else call.reset[steps]
    flow = None if call.flow is None else call.flow[steps]
    return call._replace(x=call.x[steps], reset=reset, starts=starts, flow=flow)


def padded(call: Layer, t: Tensor) -> Tensor:
    """A tensor [N, ...] of a packed call as [T, B, ...]; an empty one was not kept."""
    whole = t.new_zeros(call.T, call.B, *t.shape[1:])
    if t.numel():
        whole[exists(call)] = t
    return whole


def unpacked(call: Layer) -> Layer:
    """A packed call with padding in its place."""
    reset = None if call.reset is None else padded(call, call.reset)
    flow = None if call.flow is None else padded(call, call.flow)
    return call._replace(x=padded(call, call.x), reset=reset, starts=None, flow=flow)


def with_exact_projection(call: Layer) -> Layer:
    """The same call with x and W_ih in eighths: float32 holds every sum of their products.

    The product in front of the loop is torch's, which adds in an order that may depend on the
    number of rows; where no order rounds, the bits of the result are those of the loop alone.
    """

    def eighths(t: Tensor) -> Tensor:
        return (t * 8).round().clamp(-32, 32) / 8

    return call._replace(x=eighths(call.x), w_ih=[eighths(w) for w in call.w_ih])


def rows(call: Layer, b: slice) -> Layer:
    """The same weights for some rows of a call without lengths and resets."""
    some = {name: getattr(call, name) for name in ("x", "h0", "c0")}
    return call._replace(**{n: t if t is None else t[:, b].contiguous() for n, t in some.items()})


def converted(tensors: Any, dtype: torch.dtype, device: str | None = None) -> Any:
    """The same call, list or tensor with floating tensors in this dtype, away from autograd; on
    this device, or where it is."""
    if isinstance(tensors, Tensor):
        tensors = tensors.detach().to(device or tensors.device)
        return tensors.to(dtype, copy=True) if tensors.is_floating_point() else tensors
    if isinstance(tensors, list | tuple):
        items = [converted(t, dtype, device) for t in tensors]
        return type(tensors)(*items) if hasattr(tensors, "_fields") else type(tensors)(items)
    return tensors


def forward(ops: Any, call: Layer, save: bool = True) -> list[Tensor]:
    """y, h_n, c_n, c, h_raw, saved."""
    return op_calls.forward(call, ops, save=save)


def backward(ops: Any, call: Layer, out: list[Tensor], grads: list[Tensor | None]) -> list[Tensor]:
    """dgates, dh0, dc0, dproj, flow of what forward returned, for those of y, h_n, c_n and c; and
    dunit where the cell has parameters."""
    return op_calls.backward(call, out, grads, ops)


def backward_over_saved(
    ops: Any, call: Layer, out: list[Tensor], grads: list[Tensor | None]
) -> list[Tensor]:
    """The same by the op that writes dgates over what forward saved, here a copy of that."""
    return op_calls.backward_over_saved(call, out, grads, ops)


def random_gradients(call: Layer, out: list[Tensor], given: str = "all") -> list[Tensor | None]:
    """Of y, h_n, c_n and c, as far as the cell has them; `given` names the one that is not None."""
    gen = torch.Generator().manual_seed(2)
    grads: list[Tensor | None] = []
    for name, t in zip(("y", "h_n", "c_n", "c"), out, strict=False):
        some = call.c0 is not None or name in ("y", "h_n")
        g = torch.randn(t.shape, generator=gen, dtype=torch.float64).to(t)
        grads.append(g if some and given in ("all", name) else None)
    return grads


def entering(call: Layer, y: Tensor, d: int) -> Tensor:
    """The h that W_hh is multiplied by at each position of direction d, of which each head is one:
    [T, B, R]; any value in the padding."""
    R, turned = call.h0.size(2), d >= call.heads
    h, T, B = y[..., d * R : (d + 1) * R], y.size(0), y.size(1)
    ends = torch.full((B,), T, device=y.device) if call.lengths is None else call.lengths
    time = torch.arange(T, device=y.device)[:, None]
    first = (time == (ends - 1 if turned else 0)).expand(T, B)  # the position of step 0
    prev = torch.where(first[..., None], call.h0[d], h.roll(-1 if turned else 1, 0))
    prev = prev if call.h_mask is None else prev * call.h_mask[d]
    if call.reset is None:
        return prev
    cut = call.reset.roll(-1, 0) & ~first if turned else call.reset
    return prev.masked_fill(cut[..., None], 0)


def _by(n: int, parts: Iterable[Tensor]) -> list[list[Tensor]]:
    found = list(parts)
    return [found[i : i + n] for i in range(0, len(found), n)]


def _of_parameters(dunit: Tensor, P: int, heads: int) -> list[Tensor]:
    """[heads*H] each, of each direction all parameters of the cell, from [W*B, D, P*H]."""
    by_head = dunit.sum(0).unflatten(0, (-1, heads)).unflatten(2, (P, -1))  # [D, heads, P, H]
    return list(by_head.transpose(1, 2).flatten(0, 1).flatten(1))


def parameter_gradients(call: Layer, out: list[Tensor], back: list[Tensor]) -> list[Tensor]:
    """Gradients of `call.tensors`, in that order, from the results of both ops."""
    if call.starts is not None:
        outs = [padded(call, t) if i in (0, 3, 4) else t for i, t in enumerate(out)]
        backs = [padded(call, t) if i in (0, 3) else t for i, t in enumerate(back)]
        dx, *others = parameter_gradients(unpacked(call), outs, backs)
        return [dx[exists(call)], *others]
    cell, (y, _, _, _, h_raw, _), (dgates, dh0, dc0, dproj, _, *dunit) = call.cell, out, back
    GH, AH = (n * (dgates.size(3) // (cell.G + cell.A)) for n in (cell.G, cell.A))
    directions, heads = range(len(call.w_ih) * call.heads), call.heads
    dgx = [dgates[:, :, d, :GH] for d in directions]
    dgh = [torch.cat([dgates[:, :, d, : GH - AH], dgates[:, :, d, GH:]], -1) for d in directions]
    w_ih = [w for all_heads in call.w_ih for w in all_heads.chunk(heads)]
    hidden = directions if call.w_hh else ()

    def outer(a: Tensor, b: Tensor) -> Tensor:
        return a.flatten(0, 1).t() @ b.flatten(0, 1)

    def joined(parts: Iterable[Tensor]) -> list[Tensor]:
        """Of each direction, from those of each head."""
        return [torch.cat(some) for some in _by(heads, parts)]

    if cell.normed:  # whose x is that of the gates themselves
        of_input = [torch.cat(dgx, -1), *(torch.zeros_like(w) for w in w_ih)]
    else:
        dx = sum((dgx[d] @ w_ih[d] for d in directions), torch.zeros_like(call.x))
        of_input = [dx, *joined(outer(dgx[d], call.x) for d in directions)]
    return [
        *of_input,
        *joined(outer(dgh[d], entering(call, y, d)) for d in hidden),
        *joined(dgx[d].sum((0, 1)) for d in directions if call.b_ih),
        *joined(dgh[d].sum((0, 1)) for d in directions if call.b_hh),
        *joined(outer(dproj[:, :, d], h_raw[:, :, d]) for d in directions if call.w_hr),
        dh0,
        *([] if call.c0 is None else [dc0]),
        *(row for sums in dunit for row in _of_parameters(sums, cell.P, heads)),
    ]


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, in units of the largest value or 1; infinite where it is NaN."""
    assert got.shape == want.shape
    if got.numel() == 0:
        return 0.0
    want = want.to(torch.float64)
    worst = (got.to(want) - want).abs().max() / want.abs().max().clamp(min=1)
    return worst.nan_to_num(nan=torch.inf).item()


def contents(value: Any) -> Any:
    """What is in a call, list or tensor: equal where every number is the same, bit by bit."""
    if isinstance(value, Tensor):
        number = value.detach().cpu().contiguous()
        return str(value.device), value.dtype, value.shape, bytes(number.view(torch.uint8).numpy())
    if isinstance(value, list | tuple):
        return tuple(map(contents, value))
    return value


class Exact:
    """The reference on a call in float64, whose graph is kept: many tests ask for the gradients of
    one call, by other kernels and layouts or for other gradients of its results."""

    def __init__(self, call: Layer) -> None:
        self._call = converted(call, torch.float64)
        for t in self._call.tensors:
            t.requires_grad_()
        self._results = reference.run_layer(self._call)
        self.results = [t if t is None else t.detach() for t in self._results]
        self._found: dict[Any, tuple[list[Tensor], Tensor | None]] = {}

    def gradients(self, grads: list[Tensor | None]) -> tuple[list[Tensor], Tensor | None]:
        """Of the call's tensors, for those of its results; and the norms of those of h."""
        key = contents(grads)
        if key not in self._found:
            self._found[key] = self._backward(grads)
        return self._found[key]

    def _backward(self, grads: list[Tensor | None]) -> tuple[list[Tensor], Tensor | None]:
        flow, tensors = self._call.flow, self._call.tensors
        if flow is not None:
            flow.zero_()
        loss = self._results[0].new_zeros(()) + 0 * self._call.h0.sum()
        for o, g in zip(self._results, grads, strict=True):
            if g is not None:
                loss = loss + (o * converted(g, torch.float64)).sum()
        want = torch.autograd.grad(
            loss, tensors, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return list(want), None if flow is None else flow.clone()


_exact: dict[Any, Exact] = {}
_MOST = 128  # calls whose reference is kept


def exact(call: Layer) -> Exact:
    """The reference on a call, run once for as long as it is among the last that were asked for."""
    key = contents(call)
    found = _exact.pop(key, None) or Exact(call)
    _exact[key] = found
    if len(_exact) > _MOST:
        del _exact[next(iter(_exact))]
    return found


def forward_error(call: Layer, out: list[Tensor]) -> float:
    """Of y, h_n, c_n and c against the reference in float64."""
    want = exact(call).results
    return max(error(g, w) for g, w in zip(out, want, strict=False) if w is not None)


def backward_error(
    call: Layer, out: list[Tensor], back: list[Tensor], grads: list[Tensor | None]
) -> float:
    """Of all gradients, and the norms of those of h, against the reference in float64."""
    want, flow = exact(call).gradients(grads)
    as64 = [converted(t, torch.float64) for t in (call, out, back)]
    got = parameter_gradients(*as64)
    flow = torch.zeros_like(back[4]) if flow is None else flow
    pairs = zip([*got, back[4]], [*want, flow], strict=True)
    return max(error(g, w) for g, w in pairs)


def padding_is_zero(call: Layer, tensors: list[Tensor]) -> bool:
    """Are these [T, B, ...] tensors zero past the end of each row? An empty tensor was not kept."""
    if call.lengths is None or call.starts is not None:
        return True
    past = ~exists(call)
    return all(bool((t[past] == 0).all()) for t in tensors if t.numel())
