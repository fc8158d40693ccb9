"""Tangents of one layer by the CPU kernels' own loops: see :mod:`rnnkernels._ops.tangents`.

Forward's loop runs once more with tangents as its states, and backward's twice: with values, to
leave behind what each step was run with, and with tangents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkernels._core.call import Call
from rnnkernels._ops.duals import Dual, Maybe, or_zero, product, total
from rnnkernels._ops.steps import Steps
from rnnkernels._ops.tangent_layer import Layer, stacked
from rnnkernels._ops.tangent_weights import DirectionWeights
from rnnkernels.cells import CELLS

_SETTINGS = Call._fields.index("x")


def takes(cell: str, like: Tensor) -> bool:
    """Whether there are such loops of a cell, on the device of a tensor."""
    key = like.device.type.upper()
    has = torch._C._dispatch_has_kernel_for_dispatch_key("rnnkernels::forward_tangents", key)
    return cell in CELLS and has


class KernelLayer(Layer):
    """On a CPU, of a cell that is built in."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.directions = [self._direction(d) for d in range(self.D)]

    @property
    def sides(self) -> Sequence[DirectionWeights]:
        return self.directions

    def _direction(self, d: int) -> DirectionWeights:
        steps = Steps(self.a, d >= self.a.heads)
        h = steps.entering(self.y[..., self.columns(d)], self.h0.value[d])
        assert h is not None
        mask = None if self.call.h_mask is None else self.call.h_mask[d]
        raw = Dual(self.h_raw[0, :, :, d]) if self.a.projected else None
        return DirectionWeights(self.cell, steps, self.x, self.of_direction(d), mask, Dual(h), raw)

    def _every(self, parts: Sequence[Maybe], width: int) -> Maybe:
        """Of all directions [T, B, D, width]; None where all are zero."""
        none = self.y.new_empty(()).expand(*self.y.shape[:2], width)
        return stacked(parts, [none] * self.D, 2)

    def _added_to_gates(self) -> tuple[Maybe, Maybe]:
        """What tangents of W_ih and W_hh add to both parts of the gates [T, B, D, G*H]."""
        of_gx: list[Maybe] = []
        of_gh: list[Maybe] = []
        for side in self.directions:
            by_w = side.weights["w_ih"].tangent, side.weights["w_hh"].tangent
            x, h = side.x.value, side.entered().value
            of_gx.append(None if by_w[0] is None else product(x, by_w[0].t()))
            of_gh.append(None if by_w[1] is None else product(h, by_w[1].t()))
        if not self.cell.A:  # then it makes no difference which
            of_gx = [total(*pair) for pair in zip(of_gx, of_gh, strict=True)]
            of_gh = [None] * self.D
        width = self.cell.G * self.call.H
        return self._every(of_gx, width), self._every(of_gh, width)

    def _added_to_h(self) -> Maybe:
        """What that of W_hr adds to the projected h [T, B, D*R]."""
        found = [
            None
            if side.h_raw is None or side.w_hr is None or side.w_hr.tangent is None
            else product(side.h_raw.value, side.w_hr.tangent.t())
            for side in self.directions
        ]
        every = self._every(found, self.R)
        return None if every is None else every.flatten(2)

    def forward(self) -> None:
        self.dy, self.dh_n, self.dc_n, self.dc = Dual(self.y), None, None, None
        self.tangents: Sequence[Maybe] = []  # of y, c and saved
        sources = [self.x.tangent, self.h0.tangent, None if self.c0 is None else self.c0.tangent]
        if all(t is None for t in (*sources, *(w.tangent for w in self.weights))):
            return
        call, x = self.call, self.x
        dx, of_input = x.tangent, [w.value for w in self.weights]
        if dx is None:  # a product over nothing
            dx = x.value.new_empty(*x.value.shape[:2], 0)
        each = len(self.weights) // self.a.directions
        for i in range(self.a.directions):
            first = i * each
            if x.tangent is None:
                of_input[first] = of_input[first][:, :0]
            for place, name in enumerate(self.names):
                if name in ("b_ih", "b_hh"):
                    bias = self.weights[first + place]
                    of_input[first + place] = or_zero(bias.tangent, bias.value)
        h0 = or_zero(self.h0.tangent, self.h0.value)
        c0 = None if self.c0 is None else or_zero(self.c0.tangent, self.c0.value)
        y, h_n, c_n, _, c, h_raw, saved = self.ops.forward_tangents(
            *call[:_SETTINGS], dx, of_input, h0, c0, None, call.h_mask, call.lengths, None,
            call.reset, None, None, None, True, True, False,
            call.h0, call.c0, self.y, self.every_c, self.saved,
            *self._added_to_gates(), self._added_to_h(),
        )  # fmt: skip
        self.dy, self.dh_n, self.tangents = Dual(self.y, y), h_n, (h0, c0, y, c, saved)
        if self.c0 is not None:
            self.dc_n, self.dc = c_n, c[0]
        for d, side in enumerate(self.directions):
            entering = side.steps.entering(y[..., self.columns(d)], h0[d])
            side.h = Dual(side.h.value, entering)
            if side.h_raw is not None:
                side.h_raw = Dual(side.h_raw.value, h_raw[0, :, :, d])

    def backward(
        self, dy: Dual | None, dh_n: Dual | None, dc_n: Dual | None, dc: Dual | None
    ) -> list[dict[str, Maybe]]:
        given = (dy, dh_n, dc_n, dc)
        values = self._arguments([None if t is None else t.value for t in given])
        dgates, _, _, dproj, _, _, dnext = self.ops.backward_record(*values)
        mine = slice(None), slice(None)
        for d, side in enumerate(self.directions):
            side.take_gradients(dgates[0, :, :, d], dproj[0, :, :, d] if self.a.projected else None)
        # What tangents of W_hh and W_hr add: to the state before each step, and to h before its
        # projection behind it.
        by_hidden = [side.steps.leaving(self._through(side)) for side in self.directions]
        to_y = self._every([every for every, _ in by_hidden], self.R)
        of_raw = self._every([self._through_projection(s) for s in self.directions], self.call.H)
        changes = [None if t is None else t.tangent for t in given]
        changes[0] = total(changes[0], None if to_y is None else to_y.flatten(2))
        dgates, dh0, dc0, dproj, _, _ = self.ops.backward_tangents(
            *self._arguments(changes), dnext, *self._of_states(), of_raw
        )
        results = []
        for d, (side, (_, of_h0)) in enumerate(zip(self.directions, by_hidden, strict=True)):
            of_proj = dproj[0][(*mine, d)] if self.a.projected else None
            found = side.gradients(*side.both_parts(dgates[0][(*mine, d)]), of_proj)
            found["h0"] = total(dh0[d], of_h0)
            found["c0"] = None if self.c0 is None else dc0[d]
            results.append(found)
        return results

    def _through(self, side: DirectionWeights) -> Maybe:
        """[T, B, R]"""
        found = product(side.dgh, side.weights["w_hh"].tangent)
        return None if found is None else side.masked(found)

    def _through_projection(self, side: DirectionWeights) -> Maybe:
        """[T, B, H]"""
        return None if side.w_hr is None else product(side.dproj, side.w_hr.tangent)

    def _arguments(self, given: Sequence[Maybe]) -> list[Any]:
        """Those of backward's loop for gradients of y, h_n, c_n and c."""
        call, (dy, dh_n, dc_n, dc) = self.call, given
        return [
            *call[:_SETTINGS], dy, dh_n, dc_n, None, None if dc is None else dc[None],
            call.weights, call.h0, call.c0, None, call.h_mask, self.y, self.y.new_empty(0),
            self.every_c, self.saved, call.lengths, None, call.reset, None, None, False, True,
            False,
        ]  # fmt: skip

    def _of_states(self) -> Sequence[Maybe]:
        """Tangents of h0, c0, y, c and saved."""
        if self.tangents:
            return self.tangents
        values = (self.call.h0, self.call.c0, self.y, self.every_c, self.saved)
        return [None if t is None else torch.zeros_like(t) for t in values]
