"""One layer, and what a small change of all that it is given changes: see
:mod:`rnnkernels._ops.tangents`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from rnnkernels._core import noise
from rnnkernels._core.call import ARGUMENTS, Call, LayerWeights
from rnnkernels._ops.duals import Dual, Maybe, apart, beside
from rnnkernels._ops.tangent_weights import DirectionWeights, own_names
from rnnkernels.cells import find as find_cell


def stacked(parts: Sequence[Maybe], like: Sequence[Tensor], dim: int = 0) -> Maybe:
    """Those that are not zero, and zeros, side by side in a new dimension."""
    if all(t is None for t in parts):
        return None
    pairs = zip(parts, like, strict=True)
    return beside([torch.zeros_like(z) if t is None else t for t, z in pairs], dim)


class Layer(ABC):
    """All directions of one, and all heads, which count as directions.

    Attributes:
        dy, dh_n, dc_n, dc: once ``forward`` has run, y with its tangent, and the tangents of h_n
            [D, B, R], c_n [D, B, C*H] and c [T, B, D, C*H].
    """

    dy: Dual
    dh_n: Maybe
    dc_n: Maybe
    dc: Maybe

    def __init__(
        self,
        a: SimpleNamespace,
        index: int,
        x: Dual,
        weights: Sequence[Dual],
        h0: Dual,
        c0: Dual | None,
    ) -> None:
        self.a, self.D, self.R = a, a.directions * a.heads, h0.value.size(-1)
        self.cell = find_cell(a.cell)
        self.x, self.h0, self.c0, self.weights = x, h0, c0, weights
        own = slice(index * self.D, (index + 1) * self.D)
        draws = None if a.draws is None else noise.of_stream(a.draws, own.start)
        self.call = Call(
            a.cell, 1, a.directions, a.heads, a.projected, "concat", 0, "none", 1.0, x.value,
            [w.value for w in weights], h0.value, None if c0 is None else c0.value,
            lengths=a.lengths, reset=a.reset, noise=a.noise, draws=draws, save=True,
            all_states=True, h_mask=None if a.h_mask is None else a.h_mask[own],
        )  # fmt: skip
        on = torch._C._dispatch_has_kernel_for_dispatch_key(
            "rnnkernels::sequence_forward", x.value.device.type.upper()
        )
        self.ops = torch.ops.rnnkernels if on else torch.ops.rnnkernels_triton
        self.y, self.every_c, self.h_raw, self.saved = self._results(index)
        self.c = None if c0 is None else self.every_c[0]  # [T, B, D, C*H]
        each = len(weights) // a.directions
        values = [w.value for w in weights[:each]]
        of_first = LayerWeights.from_list(values, a.projected, self.cell.P, self.cell.recurrent)
        present = zip(LayerWeights._fields, of_first[:-1], strict=False)
        self.names = [name for name, value in present if value is not None] + own_names(self.cell)

    def of_direction(self, d: int) -> dict[str, Dual]:
        """The weights of one, by name."""
        turned, head = divmod(d, self.a.heads)
        each = len(self.weights) // self.a.directions
        own = self.weights[turned * each :][:each]
        return dict(zip(self.names, (_of_head(w, head, self.a.heads) for w in own), strict=True))

    def columns(self, d: int) -> slice:
        """Those of a direction in y."""
        return slice(d * self.R, (d + 1) * self.R)

    def _results(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What forward has kept: y, c, h_raw and saved, as of a call of this layer alone."""
        a = self.a
        y = getattr(a, "y", None)
        # Of a single step the node keeps no y, and has something of its size there.
        if y is None or a.x.size(0) == 1:
            y, _, _, _, *others = self.ops.sequence_forward(*self.call[:ARGUMENTS])
            return y, *others
        if index < (a.ys.size(0) if a.ys.dim() > 1 else 0):
            y = a.ys[index]
        every = (y, *(t[index : index + 1] if t.dim() > 1 else t for t in (a.c, a.h_raw, a.saved)))
        y, c, h_raw, saved = (apart(t).value for t in every)  # y and c have tangents themselves
        return y, c, h_raw, saved

    @property
    @abstractmethod
    def sides(self) -> Sequence[DirectionWeights]:
        """All directions."""

    @abstractmethod
    def forward(self) -> None:
        """Finds the tangents of the outputs."""

    @abstractmethod
    def backward(
        self, dy: Dual | None, dh_n: Dual | None, dc_n: Dual | None, dc: Dual | None
    ) -> list[dict[str, Maybe]]:
        """The tangents of the gradients, by name, of each direction: x, h0, c0 and the weights;
        dc is [T, B, D, C*H]."""

    def of_weights(self, results: list[dict[str, Maybe]]) -> list[Maybe]:
        """What ``backward`` has found for the weights, in their order, with the rows of all heads
        of a direction."""
        found, heads = [], self.a.heads
        for first in range(0, self.D, heads):
            of, some = self.of_direction(first), results[first : first + heads]
            for name in self.names:
                parts = [result[name] for result in some]
                if heads == 1:
                    found.append(parts[0])
                    continue
                whole = stacked(parts, [of[name].value] * heads)
                found.append(None if whole is None else whole.flatten(0, 1))
        return found


def _of_head(w: Dual, head: int, heads: int) -> Dual:
    """The rows of a head of those of all heads of a direction."""
    if heads == 1:
        return w
    return Dual(
        w.value.chunk(heads)[head], None if w.tangent is None else w.tangent.chunk(heads)[head]
    )
