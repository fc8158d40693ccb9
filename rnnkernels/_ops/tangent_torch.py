"""Tangents of one layer, by loops in torch operations: see :mod:`rnnkernels._ops.tangents`.

Forward all but ``W_hh h'`` is computed for all steps at once. Backward, what the loop multiplies
with changes: that enters it at every step from outside, by forward mode over the cell's
``backward``. And the loop carries on what has entered: it is linear, so the kernel does that, which
is handed what enters as gradients of every h and c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkernels._core import noise
from rnnkernels._core.call import Call
from rnnkernels._ops.duals import Dual, Maybe, or_zero, part, total
from rnnkernels._ops.tangent_layer import Layer, stacked
from rnnkernels._ops.tangent_steps import Direction


def _beside_h(states: Sequence[Maybe], like: Tensor) -> Maybe:
    """All states but h, one behind the other, as they are in ``like`` [.., C*H]."""
    others = states[1:]
    if all(t is None for t in others):
        return None
    parts = like.chunk(len(others), -1)
    return torch.cat([or_zero(t, z) for t, z in zip(others, parts, strict=True)], -1)


class TorchLayer(Layer):
    """On any device, and of any cell."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.directions = [self._direction(d) for d in range(self.D)]

    @property
    def sides(self) -> Sequence[Direction]:
        return self.directions

    def _direction(self, d: int) -> Direction:
        initial = [Dual(self.h0.value[d], part(self.h0.tangent, d))]
        states = [self.y[..., self.columns(d)]]
        if self.c0 is not None:
            assert self.c is not None
            others = self._others(self.c0.value[d]), self._others(part(self.c0.tangent, d))
            initial += [Dual(t, of_t) for t, of_t in zip(*others, strict=True) if t is not None]
            states += self.c[:, :, d].chunk(self.cell.C, -1)
        raw = self.h_raw[0, :, :, d] if self.a.projected else None
        kept = self.saved[0, :, :, d] if self.saved.dim() > 1 else self.saved
        mask = None if self.call.h_mask is None else self.call.h_mask[d]
        turned = d >= self.a.heads
        return Direction(
            self.a, turned, self.x, self.of_direction(d), initial, states, raw, kept, mask,
            self._drawn(d), self.ops.sequence_backward,
        )  # fmt: skip

    def _others(self, t: Maybe) -> Sequence[Maybe]:
        """Each state beside h [.., H] of all of them [.., C*H]."""
        return [None] * self.cell.C if t is None else t.chunk(self.cell.C, -1)

    def _drawn(self, d: int) -> list[Tensor]:
        """What the cell draws in a direction, [T, B, H] each."""
        if self.a.noise is None:
            return []
        T, B = self.y.shape[:2]
        steps = torch.arange(T, device=self.y.device)[:, None, None]
        like = self.y.new_empty(()).expand(T, B, self.call.H)
        return noise.at_step(self.a.noise, self.call.draws, steps, d, like)

    def forward(self) -> None:
        """The tangents of y [T, B, D*R], h_n [D, B, R], c_n [D, B, C*H] and c [T, B, D, C*H]."""
        every, last = zip(*(d.forward() for d in self.directions), strict=True)
        n = len(self.directions)
        y = stacked([s[0] for s in every], self.y.chunk(n, -1), 2)
        self.dy = Dual(self.y, None if y is None else y.flatten(2))
        self.dh_n = stacked([s[0] for s in last], self.call.h0.unbind())
        self.dc_n = self.dc = None
        if self.c is not None:
            assert self.call.c0 is not None
            of_c0, of_c = self.call.c0.unbind(), self.c.unbind(2)
            self.dc_n = stacked([_beside_h(s, c) for s, c in zip(last, of_c0, strict=True)], of_c0)
            self.dc = stacked([_beside_h(s, c) for s, c in zip(every, of_c, strict=True)], of_c, 2)

    def _loop(self, dy: Maybe, dh_n: Maybe, dc_n: Maybe, dc: Maybe) -> Any:
        """Backward's kernel: dgates, dproj, dunit, dh0 and dc0; dc is [T, B, D, C*H]."""
        call, every = self.call, None if dc is None else dc[None]
        empty = self.y.new_empty(0)
        dgates, dh0, dc0, dproj, _, dunit = self.ops.sequence_backward(
            *call[: Call._fields.index("x")], dy, dh_n, dc_n, None, every,
            call.weights, call.h0, call.c0, None, call.h_mask, self.y, empty, self.every_c,
            self.saved, call.lengths, None, call.reset, call.noise, call.draws, False, True, False,
        )  # fmt: skip
        of_params = dunit[0] if self.cell.P else None
        return dgates[0], dproj[0] if self.a.projected else None, of_params, dh0, dc0

    def backward(
        self, dy: Dual | None, dh_n: Dual | None, dc_n: Dual | None, dc: Dual | None
    ) -> list[dict[str, Maybe]]:
        """The tangents of the gradients, by name, of each direction: x, h0, c0 and the weights."""
        given = (dy, dh_n, dc_n, dc)
        dgates, dproj, *_ = self._loop(*(None if t is None else t.value for t in given))
        entered = []
        for d, of in enumerate(self.directions):
            of_states = [None if dy is None else dy.value[..., self.columns(d)]]
            of_last = [None if dh_n is None else dh_n.value[d]]
            if self.c is not None:
                of_states += self._others(None if dc is None else dc.value[:, :, d])
                of_last += self._others(None if dc_n is None else dc_n.value[d])
            own = part(dproj, slice(None), slice(None), d)
            entered.append(of.entering(dgates[:, :, d], own, of_states, of_last))
        to_y = stacked([e.of_states[0] for e in entered], self.y.chunk(self.D, -1), 2)
        to_c = None
        if self.c is not None:
            like = self.c.unbind(2)
            pairs = zip(entered, like, strict=True)
            to_c = stacked([_beside_h(e.of_states, c) for e, c in pairs], like, 2)
        changes = [None if t is None else t.tangent for t in given]
        changes[0] = total(changes[0], None if to_y is None else to_y.flatten(2))
        changes[3] = total(changes[3], to_c)
        dgates = dproj = dunit = dh0 = dc0 = None
        if any(t is not None for t in changes):
            dgates, dproj, dunit, dh0, dc0 = self._loop(*changes)
        results = []
        for d, (of, e) in enumerate(zip(self.directions, entered, strict=True)):
            mine = slice(None), slice(None), d
            own = part(dunit, slice(None), d)
            found = of.gradients_of_entering(part(dgates, *mine), part(dproj, *mine), own, e)
            found["h0"] = total(part(dh0, d), e.of_initial[0])
            if self.c is not None:
                assert self.call.c0 is not None
                found["c0"] = total(part(dc0, d), _beside_h(e.of_initial, self.call.c0[d]))
            results.append(found)
        return results
