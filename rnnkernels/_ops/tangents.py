"""Tangents of a call, and of its gradients, by loops over time like those of values.

A small change of all that a call takes changes a step by something linear: ``next' = J_gx gx' +
J_gh gh' + J_prev prev'``, with the Jacobians of a unit's arithmetic, which the cell's own
``backward`` gives for a gradient of one. Gradients change by what backward's loop multiplies with,
which is forward mode over the cell's ``backward``, and by what it carries on. This is the
R-operator of Pearlmutter (1994) on a loop over time.

``tangent_kernels.py`` has that from the CPU kernels, of cells that are built in;
``tangent_torch.py``, of other cells and devices, from loops in torch operations around the kernels'
own ones. What both have of the weights is in ``tangent_weights.py``.

Second derivatives are symmetric, so the same is the derivative of a gradient: in the direction of
its gradients, the tangents of the outputs are the gradients of ``dy`` and the others, and the
tangents of the gradients of x, states and weights are the gradients of these.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from rnnkernels._core.call import merge
from rnnkernels._ops import freed
from rnnkernels._ops.duals import Dual, Maybe, apart, joined, part, total
from rnnkernels._ops.schema import FIRST_WEIGHT
from rnnkernels._ops.steps import Packing
from rnnkernels._ops.tangent_kernels import KernelLayer
from rnnkernels._ops.tangent_kernels import takes as kernels_take
from rnnkernels._ops.tangent_layer import Layer, stacked
from rnnkernels._ops.tangent_torch import TorchLayer
from rnnkernels.cells import find as find_cell


class Found(NamedTuple):
    """Tangents, None for zero: of y, h_n, c_n, ys and c, and of the gradients of x, h0, c0 and the
    weights, by their number."""

    outputs: list[Maybe]
    gradients: dict[int, Maybe]


def refusal(a: Any, gradients: bool) -> str | None:
    """Why a call, or the arguments of an op, cannot go this way, None where it can; ``gradients``
    says whether tangents, or derivatives, of gradients are asked for."""
    T = a.x.size(0) if a.starts is None else a.starts.size(0) - 1
    if a.x.dtype not in (torch.float32, torch.float64):
        return "tangents of 16 bits would be rounded at every step"
    if a.x.size(0) == 0:
        return "there is no step"
    if find_cell(getattr(a, "cell_name", None) or a.cell).normed:
        return "layer_norm: the change of a norm in every step is not written down"
    if gradients and a.clip != "none":
        return "grad_clip: the loop backwards is none of a derivative of forward"
    if 0 < a.window < T:
        return "truncate: tangents stop between windows, which the loop does not know"
    return None


def takes(a: SimpleNamespace, tensors: Sequence[Maybe], gradients: bool) -> bool:
    """Whether this is a way for a call: for plain tensors that no transform has a part in, but a
    torch.func.jvp around all of them."""
    if any(type(t) not in (Tensor, nn.Parameter) for t in tensors if t is not None):
        return False
    changed = any(transformed(t) for t in tensors if t is not None)
    if (changed and not _only_jvp()) or (gradients and a.lanes):
        return False
    return refusal(a, gradients) is None


def _only_jvp() -> bool:
    """Whether what runs now is for one torch.func.jvp, with no other transform below it."""
    below = retrieve_all_functorch_interpreters()
    return [each.key() for each in below] == [TransformType.Jvp]


def transformed(t: Tensor) -> bool:
    """Whether a tensor is one of torch.func's, or a batch of gradients."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t)


def find(
    a: SimpleNamespace,
    tangents: dict[str, Maybe],
    of_weights: Sequence[Maybe],
    wanted: Collection[int] = (),
) -> Found:
    """The tangents that those of what a call takes bring about. ``a`` has the arguments of an op
    without any, ``tangents`` are by their names; ``wanted`` are the numbers of gradients."""
    with torch.no_grad(), _forward_mode():
        packing = None if a.starts is None else Packing(a)
        if packing:
            a, tangents = packing.padded(a, tangents)
        call = _Call(a, tangents, of_weights)
        outputs, gradients = call.forward(), call.backward(set(wanted)) if wanted else {}
        if packing:
            for i, dim in ((0, 0), (3, 1), (4, 1)):  # y, ys and c
                outputs[i] = packing.packed(outputs[i], dim)
            if 0 in gradients:
                gradients[0] = packing.packed(gradients[0], 0)
        call.show_freed_beside()
        return Found(outputs, gradients)


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Where tensors can have tangents: in the caller's forward mode, or in one of our own."""
    if forward_ad._current_level >= 0:
        yield
    else:
        with forward_ad.dual_level():
            yield


def _scaled(t: Dual, factors: Tensor) -> Dual:
    return Dual(t.value * factors, None if t.tangent is None else t.tangent * factors)


def _sum(a: Dual | None, b: Dual | None) -> Dual | None:
    if a is None or b is None:
        return b if a is None else a
    return Dual(a.value + b.value, total(a.tangent, b.tangent))


def _merged(y: Dual, mode: str) -> Dual:
    return apart(merge(joined(y), mode))


def _unmerged(g: Dual, y: Dual, mode: str) -> Dual:
    """The gradient of both directions of y [..., 2*R] from that of what ``merge`` makes of them."""
    given = joined(g)
    if mode == "mul":
        forward, reverse = joined(y).chunk(2, dim=-1)
        return apart(torch.cat([given * reverse, given * forward], -1))
    given = given if mode == "sum" else given / 2
    return apart(torch.cat([given, given], -1))


class _Call:
    """All layers."""

    def __init__(
        self, a: SimpleNamespace, tangents: dict[str, Maybe], of_weights: Sequence[Maybe]
    ) -> None:
        self.a, self.tangents = a, tangents
        self.weights = [Dual(w, t) for w, t in zip(a.weights, of_weights, strict=True)]
        self.merges = a.directions > 1 and a.merge_mode != "concat"
        self.by_kernels = kernels_take(a.cell, a.x)

    def _given(self, name: str, *at: Any) -> Dual | None:
        """An argument with its tangent, or a part of it."""
        value = getattr(self.a, name, None)
        if value is None:
            return None
        tangent = self.tangents.get(name)
        return Dual(value[at], part(tangent, *at)) if at else Dual(value, tangent)

    def _rows(self, index: int) -> slice:
        D = self.a.directions * self.a.heads
        return slice(index * D, (index + 1) * D)

    def show_freed_beside(self) -> None:
        """Has the C library keep what is freed now for the next call, which takes as much again."""
        x, cell = self.a.x, find_cell(self.a.cell)
        of_unit = cell.G * (cell.S * (1 + (cell.A > 0)) + 4) + 20  # about as many tensors [T, B, H]
        states = x[..., 0].numel() * self.a.h0.size(0) * self.a.h0.size(-1)
        if x.device.type == "cpu":
            freed.show(states * of_unit * x.element_size())

    def forward(self) -> list[Maybe]:
        """The tangents of y, h_n, c_n, ys and c."""
        a, x = self.a, self._given("x")
        each = len(self.weights) // a.layers
        self.layers: list[Layer] = []
        for index in range(a.layers):
            rows = self._rows(index)
            own = self.weights[index * each : (index + 1) * each]
            h0, c0 = self._given("h0", rows), self._given("c0", rows)
            assert x is not None and h0 is not None
            kind = KernelLayer if self.by_kernels else TorchLayer
            layer = kind(a, index, x, own, h0, c0)
            layer.forward()
            self.layers.append(layer)
            x = _merged(layer.dy, a.merge_mode) if self.merges else layer.dy
            if a.masks and index + 1 < a.layers:
                x = _scaled(x, a.masks[index])
        assert x is not None
        inner = self.layers if self.merges else self.layers[:-1]
        h_n = stacked([t.dh_n for t in self.layers], [t.call.h0 for t in self.layers])
        ys = stacked([t.dy.tangent for t in inner], [t.y for t in inner])
        c_n = c = None
        if a.c0 is not None:
            initial = list(a.c0.unflatten(0, (a.layers, -1)))
            c_n = stacked([t.dc_n for t in self.layers], initial)
            c = stacked([t.dc for t in self.layers], [t.every_c[0] for t in self.layers])
        flat = [None if t is None else t.flatten(0, 1) for t in (h_n, c_n)]
        return [x.tangent, *flat, ys, c]

    def backward(self, wanted: set[int]) -> dict[int, Maybe]:
        """The tangents of the gradients with these numbers."""
        a = self.a
        found: dict[int, Maybe] = {}
        h0: list[Maybe] = []
        c0: list[Maybe] = []
        g = self._given("dy")
        for index in range(a.layers - 1, -1, -1):
            layer, rows = self.layers[index], self._rows(index)
            if g is not None and a.masks and index + 1 < a.layers:
                g = _scaled(g, a.masks[index])
            if g is not None and self.merges:
                g = _unmerged(g, layer.dy, a.merge_mode)
            if a.dys is not None and index < a.dys.size(0):
                g = _sum(g, self._given("dys", index))
            results = layer.backward(
                g,
                self._given("dh_n", rows),
                self._given("dc_n", rows),
                self._given("dc", index),
            )
            first = FIRST_WEIGHT + index * (len(self.weights) // a.layers)
            found |= dict(enumerate(layer.of_weights(results), first))
            h0[:0] = [result["h0"] for result in results]
            c0[:0] = [result.get("c0") for result in results]
            dx = total(*(result["x"] for result in results))
            found[0] = dx
            if index:
                g = Dual(sum(of.dx() for of in layer.sides), dx)  # type: ignore[arg-type]
        found[1] = stacked(h0, a.h0.unbind())
        if a.c0 is not None:
            found[2] = stacked(c0, a.c0.unbind())
        return {i: t for i, t in found.items() if i in wanted}
