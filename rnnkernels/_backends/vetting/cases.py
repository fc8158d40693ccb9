"""Small cases of kernels, and what the reference makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from rnnkernels._core import reference
from rnnkernels._core.call import ARGUMENTS, NO_CLIP, Call, Clip
from rnnkernels._core.closeness import relative_error
from rnnkernels.cells import CELLS, NORMED, find

#: Largest differences that rounding may make, relative to the greatest magnitude of a result, over
#: the few steps of a case. Whatever a fault of a hand-off leaves out or adds twice is far larger.
TOLERANCE = {
    "float64": 1e-10,
    "float32": 2e-5,
    "tf32": 5e-3,
    "tf32x3": 1e-4,
    "float16": 1e-2,
    "bfloat16": 6e-2,
}
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}

#: A pass of a case: its results by name.
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    cell: str
    H: int
    T: int = 5
    B: int = 18  # more than one tile of rows has
    D: int = 1
    layers: int = 1
    lengths: bool = False
    reset: bool = False
    clip: Clip = NO_CLIP
    drop: bool = False  # recurrent dropout

    def __str__(self) -> str:
        options = [name for name in ("lengths", "reset") if getattr(self, name)]
        options += ["recurrent_dropout"] * self.drop
        options += [f"grad_clip {self.clip.kind}"] * (self.clip.kind != "none")
        sizes = f"[T={self.T}, B={self.B}, D={self.D}, H={self.H}, L={self.layers}]"
        return " ".join([self.cell, sizes, *options])


def make(case: Case) -> Call:
    """In float64 on the CPU, of numbers that every dtype holds exactly, products in TF32 too.

    The first W_ih is the identity: what each gate gets is x, and its gradient that of x. Of a cell
    whose products are normalised, x is that by itself, of each direction.
    """
    gen = torch.Generator().manual_seed(crc32(str(case).encode()))
    cell = find(case.cell)
    GH = cell.G * case.H

    def values(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=gen, dtype=torch.float64, device="cpu") * scale
        return drawn.bfloat16().double()

    weights: list[Tensor] = []
    for layer in range(case.layers):
        for _ in range(case.D):
            inputs = case.D * case.H
            w_ih = values(GH, inputs, scale=0.5 * inputs**-0.5)
            if layer == 0:
                w_ih = torch.eye(GH, dtype=torch.float64, device="cpu")
            # A norm divides by the deviation of a product, and multiplies its rounding by as much.
            w_hh = values(GH, case.H, scale=(2 if cell.normed else 0.5) * case.H**-0.5)
            weights += [w_ih, w_hh, values(GH, scale=0.1)]
            if cell.normed:
                weights[-3] = w_ih.new_empty(GH, 0)
                weights += [values(case.H, scale=0.5) for _ in cell.params]
            else:
                weights.append(values(GH, scale=0.1))
    lengths = torch.arange(case.B, device="cpu") * 2 % (case.T + 1)
    lengths[case.B // 2] = case.T
    states = case.layers * case.D, case.B, case.H
    return Call(
        case.cell,
        layers=case.layers,
        directions=case.D,
        heads=1,
        projected=False,
        merge_mode="concat",
        window=0,
        clip=case.clip.kind,
        bound=case.clip.bound,
        x=values(case.T, case.B, GH * (case.D if cell.normed else 1)),
        weights=weights,
        h0=values(*states),
        c0=values(*states) if cell.S > 1 else None,
        h_mask=2 * (values(*states) > 0).double() if case.drop else None,
        lengths=lengths if case.lengths else None,
        reset=torch.rand(case.T, case.B, generator=gen, device="cpu") < 0.3 if case.reset else None,
    )


def converted(call: Call, dtype: torch.dtype, device: torch.device) -> Call:
    """The same call of numbers of this dtype, on this device."""

    def to(value: Any) -> Any:
        if isinstance(value, list):
            return [to(t) for t in value]
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    return Call(*map(to, call))


def gradients(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of y, h_n and c_n, the same for the same sizes."""
    gen = torch.Generator().manual_seed(7)

    def like(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=gen, dtype=torch.float64, device="cpu")
        return drawn.bfloat16().to(call.x)

    y = like(*call.x.shape[:2], call.directions * call.H)
    return y, like(*call.h0.shape), None if call.c0 is None else like(*call.h0.shape)


def _named(**results: Tensor | None) -> Results:
    return {k: t.detach().cpu().double() for k, t in results.items() if t is not None}


def by_reference(call: Call) -> tuple[Results, Callable[[], Results]]:
    """Forward of the reference, and what runs its backward."""
    weights = [t.clone().requires_grad_() for t in call.weights]
    leaves = [t.clone().requires_grad_() for t in (call.x, call.h0)]
    c0 = None if call.c0 is None else call.c0.clone().requires_grad_()
    out = reference.run(call._replace(x=leaves[0], h0=leaves[1], c0=c0, weights=weights))

    def backward() -> Results:
        dy, dh_n, dc_n = gradients(call)
        outputs = [out.y, out.h_n, *([] if out.c_n is None else [out.c_n])]
        torch.autograd.backward(outputs, [dy, dh_n, *([] if dc_n is None else [dc_n])])
        each = len(weights) // (call.layers * call.directions)
        grads = [[t.grad for t in weights[i : i + each]] for i in range(0, len(weights), each)]
        of_cell = [torch.cat([g for g in own[3:] if g is not None]) for own in grads]
        return _named(
            dgates=leaves[0].grad,
            dh0=leaves[1].grad,
            dc0=None if c0 is None else c0.grad,
            db_ih=torch.stack([own[2] for own in grads if own[2] is not None]),
            **{"dparams" if call.cell.normed else "db_hh": torch.stack(of_cell)},
        )

    return _named(y=out.y, h_n=out.h_n, c_n=out.c_n), backward


def by_ops(ops: Any, call: Call) -> tuple[Results, Callable[[], Results]]:
    """The same by the two ops of a library, without autograd: they run in this thread."""
    arguments = call._replace(save=True)[:ARGUMENTS]
    y, h_n, c_n, ys, c, _, saved = ops.sequence_forward(*arguments)
    has_c, cell = call.c0 is not None, call.cell

    def backward() -> Results:
        x, lengths, flow = (Call._fields.index(name) for name in ("x", "lengths", "flow"))
        dgates, dh0, dc0, _, _, dunit = ops.sequence_backward(
            *call[:x], *gradients(call), None, None, *call[x + 1 : lengths], y, ys, c, saved,
            *call[lengths:flow], False, True, False,
        )  # fmt: skip
        # [L, T, B, D, (G+A)*H]: those of gx, and behind them the hidden part of split gates.
        split, GH = cell.A * call.H, cell.G * call.H
        dgates = dgates.double()
        dgx = dgates[..., :GH]
        if cell.normed:
            of_cell = {"dparams": dunit.double().sum((0, 1))}
        else:
            dgh = torch.cat([dgates[..., : GH - split], dgates[..., GH:]], -1) if split else dgates
            of_cell = {"db_hh": dgh.sum((1, 2)).flatten(0, 1)}
        return _named(
            dgates=dgx[0].flatten(2) if cell.normed else dgx[0].sum(2),
            dh0=dh0,
            dc0=dc0 if has_c else None,
            db_ih=dgx.sum((1, 2)).flatten(0, 1),
            **of_cell,
        )

    return _named(y=y, h_n=h_n, c_n=c_n if has_c else None), backward


def _errors(found: Results, expected: Results) -> dict[str, float]:
    return {name: relative_error(found[name], t) for name, t in expected.items()}


def largest_error(found: Results, expected: Results) -> float:
    """Of all results, relative to the greatest magnitude of each."""
    return max(_errors(found, expected).values())


def mismatch(found: Results, expected: Results, numbers: str) -> str:
    """Which result is further away than rounding explains, or ``''``."""
    name, worst = max(_errors(found, expected).items(), key=lambda pair: pair[1])
    if worst <= TOLERANCE[numbers]:
        return ""
    return (
        f"{name} is off by {worst:.2g} of its largest value, where rounding in {numbers} explains "
        f"{TOLERANCE[numbers]:g}"
    )


def thorough(cases: Iterable[Case], stacks: bool, numbers: str) -> list[Case]:
    """Every cell and option at the sizes of these cases; stacks have one direction.

    The slope of relu jumps at 0: what rounding moves across has another gradient. So that cell is
    left to numbers of which none of a few thousand comes so near.
    """
    of_all = [c for c in CELLS if c != "rnn_relu" or numbers in ("float32", "float64")]
    found = []
    for n, case in enumerate(cases):
        for cell in NORMED if find(case.cell).normed else of_all:
            plain = replace(case, cell=cell, lengths=False, reset=False, clip=NO_CLIP)
            found.append(plain if stacks else replace(plain, D=2))
            if n == 0:
                found.append(replace(plain, lengths=True, reset=True, clip=Clip("value", 0.3)))
                found.append(replace(plain, clip=Clip("norm", 0.3)))
    return found
