"""What the weights of one direction of a layer have to do with tangents, behind any loop over time:
see :mod:`rnnkernels._ops.tangents`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rnnkernels._ops.duals import Dual, Maybe, over_steps, product, total
from rnnkernels._ops.steps import Steps
from rnnkernels.cells import Cell


def own_names(cell: Cell) -> list[str]:
    """Those of a cell's own parameters among the weights of a direction."""
    return [f"params.{name}" for name in cell.params]


def needed(t: Maybe) -> Tensor:
    """A product of two tensors that are there."""
    assert t is not None
    return t


class DirectionWeights:
    """``weights`` are by the names of :class:`rnnkernels._core.call.LayerWeights`, the parameters
    of the cell itself by :func:`own_names`; ``h`` [T, B, R] is the state before each step, and
    ``h_raw`` [T, B, H] that after it before its projection, where there is one."""

    #: The gradients of both parts of the gates [T, B, G*H], and of h behind its projection
    #: [T, B, R], where there is one: values.
    dgx: Tensor
    dgh: Tensor
    dproj: Maybe

    def __init__(
        self,
        cell: Cell,
        steps: Steps,
        x: Dual,
        weights: Mapping[str, Dual],
        h_mask: Maybe,
        h: Dual,
        h_raw: Dual | None,
    ) -> None:
        self.cell, self.steps, self.weights, self.h_mask = cell, steps, weights, h_mask
        self.x = steps.quiet_dual(x)  # which may hold anything there
        self.w_hh, self.w_hr = weights.get("w_hh"), weights.get("w_hr")
        self.h, self.h_raw = h, h_raw

    def masked(self, t: Tensor) -> Tensor:
        """An h [..., B, R] as W_hh is multiplied by it, or a gradient that comes from there."""
        return t if self.h_mask is None else t * self.h_mask

    def entered(self) -> Dual:
        """The h before each step [T, B, R], as W_hh is multiplied by it."""
        value, tangent = self.h
        return Dual(self.masked(value), None if tangent is None else self.masked(tangent))

    def gate_tangent(self, t: Dual, w: Dual | None, b: Dual | None) -> Maybe:
        """That of W t + b [T, B, G*H]."""
        if w is None:
            return None
        by_w = product(t.value, None if w.tangent is None else w.tangent.t())
        found = total(product(t.tangent, w.value.t()), by_w, None if b is None else b.tangent)
        return None if found is None else found.expand(*t.value.shape[:-1], found.size(-1))

    def take_gradients(self, dgates: Tensor, dproj: Maybe) -> None:
        """Those that backward's loop has found [T, B, (G+A)*H], and of h behind its projection."""
        self.dgx, self.dgh = self.both_parts(dgates)
        self.dproj = dproj

    def both_parts(self, dgates: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of gx and gh [T, B, G*H], of those that a loop has found."""
        G, A = self.cell.G, self.cell.A
        H = dgates.size(-1) // (G + A)
        dgx = dgates[..., : G * H]
        if not A:
            return dgx, dgx
        dgh = dgates.new_empty(dgx.shape)
        dgh[..., : (G - A) * H] = dgates[..., : (G - A) * H]
        dgh[..., (G - A) * H :] = dgates[..., G * H :]
        return dgx, dgh

    def gradients(self, dgx: Tensor, dgh: Tensor, dproj: Maybe) -> dict[str, Maybe]:
        """The tangents of the gradients of the weights and of x, by name, from those of the
        gradients of both parts of the gates, and of h behind its projection."""
        x, h, w_ih = self.x, self.entered(), self.weights["w_ih"]
        found = {
            "x": total(product(dgx, w_ih.value), product(self.dgx, w_ih.tangent)),
            "w_ih": over_steps((dgx, x.value), (self.dgx, x.tangent)),
            "w_hh": over_steps((dgh, h.value), (self.dgh, h.tangent)),
            "b_ih": (of_b_ih := dgx.sum((0, 1))),
            # In memory of its own: callers may change it.
            "b_hh": dgh.sum((0, 1)) if self.cell.A else of_b_ih.clone(),
        }
        if self.h_raw is not None:
            raw = self.h_raw
            found["w_hr"] = over_steps((dproj, raw.value), (self.dproj, raw.tangent))
        return found

    def dx(self) -> Tensor:
        return needed(product(self.dgx, self.weights["w_ih"].value))
