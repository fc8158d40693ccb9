"""Which steps rows have, where tangents are computed of all steps at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rnnkernels._ops.duals import Dual, Maybe
from rnnkernels._ops.schema import OF_STEPS


class Steps:
    """Which steps the rows have in one direction, and where a state enters from."""

    def __init__(self, a: SimpleNamespace, turned: bool) -> None:
        T = a.x.size(0)
        self.turned, self.order = turned, range(T - 1, -1, -1) if turned else range(T)
        self.still: Maybe = None  # [T, B, 1]: the row has no such step
        self.own_end: Maybe = None  # [T, B, 1]: where the rows begin, if turned
        self.cut: Maybe = None  # [T, B, 1]: the state that enters is zeroed
        if a.lengths is not None:
            t = torch.arange(T, device=a.lengths.device)[:, None]
            self.still = (t >= a.lengths)[..., None]
            if turned:
                self.own_end = (t == a.lengths - 1)[..., None]
        if a.reset is not None:
            cut = a.reset[..., None]
            if turned:  # the boundary that this direction crosses lies behind the step
                cut = torch.cat([cut[1:], torch.zeros_like(cut[:1])])
                cut = cut if self.own_end is None else cut & ~self.own_end
            self.cut = cut if self.still is None else cut & ~self.still
        walls = [t for t in (self.cut, self.still) if t is not None]
        self._walls = walls[0] | walls[-1] if walls else None

    def entering(self, states: Maybe, initial: Maybe) -> Maybe:
        """The state before each step, of those after it [T, B, n] and the first [B, n]."""
        if states is None and initial is None:
            return None
        if states is None:
            assert initial is not None
            states = initial.new_zeros(len(self.order), *initial.shape)
        elif initial is None:
            initial = torch.zeros_like(states[0])
        if not self.turned:
            found = torch.cat([initial[None], states[:-1]])
        else:
            found = torch.cat([states[1:], initial[None]])
            if self.own_end is not None:
                found = torch.where(self.own_end, initial, found)
        return found if self._walls is None else found.masked_fill(self._walls, 0)

    def leaving(self, gradients: Maybe) -> tuple[Maybe, Maybe]:
        """What gradients of the states before each step [T, B, n] are to those after each step,
        and to the first."""
        if gradients is None:
            return None, None
        g = gradients if self._walls is None else gradients.masked_fill(self._walls, 0)
        nothing = torch.zeros_like(g[:1])
        if not self.turned:
            return torch.cat([g[1:], nothing]), g[0]
        initial = g[-1]
        if self.own_end is not None:
            initial = torch.where(self.own_end, g, 0).sum(0)
        return torch.cat([nothing, g[:-1]]), initial

    def quiet(self, t: Tensor, at: slice = slice(None)) -> Tensor:
        """Zero at the steps that a row does not have, of those steps alone that t has."""
        return t if self.still is None else t.masked_fill(self.still[at], 0)

    def quiet_dual(self, t: Dual) -> Dual:
        return Dual(self.quiet(t.value), None if t.tangent is None else self.quiet(t.tangent))


class Packing:
    """Between packed steps [N, ...] and padded ones [T, B, ...]."""

    def __init__(self, a: SimpleNamespace) -> None:
        T, B = a.starts.size(0) - 1, a.h0.size(1)
        rows = torch.arange(B, device=a.starts.device)
        there = (torch.arange(T, device=a.starts.device)[:, None] < a.lengths).flatten()
        # Padding holds what lies at the first place, and nobody looks.
        self.places = (a.starts[:-1, None] + rows).flatten() * there
        self.steps = there.nonzero()[:, 0]
        self.sizes = T, B

    def padded(
        self, a: SimpleNamespace, tangents: dict[str, Maybe]
    ) -> tuple[SimpleNamespace, dict[str, Maybe]]:
        """A call and tangents of padded steps."""
        changed: dict[str, Any] = {"starts": None}
        moved = dict(tangents)
        for name in OF_STEPS:
            value, dim = getattr(a, name, None), OF_STEPS[name] - 1
            if isinstance(value, (list, tuple)):
                changed[name] = [t if t.dim() == 3 else self._padded(t, dim) for t in value]
            elif value is not None:
                changed[name] = self._padded(value, dim)
            if name in tangents:
                moved[name] = self._padded(tangents[name], dim)
        return SimpleNamespace(**vars(a) | changed), moved

    def _padded(self, t: Maybe, dim: int) -> Maybe:
        if t is None or t.numel() == 0:  # zero, or not kept
            return t
        found = t.index_select(dim, self.places)
        return found.view(*t.shape[:dim], *self.sizes, *t.shape[dim + 1 :])

    def packed(self, t: Maybe, dim: int) -> Maybe:
        return None if t is None else t.flatten(dim, dim + 1).index_select(dim, self.steps)
