"""Tangents of a call, and of its gradients, by the kernels and one further loop over time.

A small change of all that a call takes changes a step by something linear: ``next' = u + J_gh (W_hh
h') + J_prev prev'``, with the Jacobians of a unit's arithmetic, which the cell's own ``backward``
gives for a gradient of one. All but ``W_hh h'`` is computed for all steps at once.

Gradients change in two ways. What the loop of backward multiplies with changes: that enters it at
every step from outside, by forward mode over the cell's ``backward``. And the loop carries on what
has entered: it is linear, so the kernel does that, which is handed what enters as gradients of
every h and c. This is the R-operator of Pearlmutter (1994) on a loop over time.

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

from rnnkernels._core import noise
from rnnkernels._core.call import ARGUMENTS, Call, LayerWeights, merge
from rnnkernels._ops import freed
from rnnkernels._ops.duals import Dual, Maybe, apart, beside, joined, or_zero, part, total
from rnnkernels._ops.schema import FIRST_WEIGHT
from rnnkernels._ops.steps import Packing
from rnnkernels._ops.tangent_steps import Direction, own_names
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


def _stacked(parts: Sequence[Maybe], like: Sequence[Tensor], dim: int = 0) -> Maybe:
    """Those that are not zero, and zeros, side by side in a new dimension."""
    if all(t is None for t in parts):
        return None
    pairs = zip(parts, like, strict=True)
    return beside([torch.zeros_like(z) if t is None else t for t, z in pairs], dim)


def _beside_h(states: Sequence[Maybe], like: Tensor) -> Maybe:
    """All states but h, one behind the other, as they are in ``like`` [.., C*H]."""
    others = states[1:]
    if all(t is None for t in others):
        return None
    parts = like.chunk(len(others), -1)
    return torch.cat([or_zero(t, z) for t, z in zip(others, parts, strict=True)], -1)


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


class _Layer:
    """One layer, both directions."""

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
        cell = find_cell(a.cell)
        on = torch._C._dispatch_has_kernel_for_dispatch_key(
            "rnnkernels::sequence_forward", x.value.device.type.upper()
        )
        self.ops = torch.ops.rnnkernels if on else torch.ops.rnnkernels_triton
        own = slice(index * self.D, (index + 1) * self.D)
        draws = None if a.draws is None else noise.of_stream(a.draws, own.start)
        self.call = Call(
            a.cell, 1, a.directions, a.heads, a.projected, "concat", 0, "none", 1.0, x.value,
            [w.value for w in weights], h0.value, None if c0 is None else c0.value,
            lengths=a.lengths, reset=a.reset, noise=a.noise, draws=draws, save=True,
            all_states=True, h_mask=None if a.h_mask is None else a.h_mask[own],
        )  # fmt: skip
        self.y, self.every_c, h_raw, self.saved = self._results(index)
        self.c = None if c0 is None else self.every_c[0]  # [T, B, D, C*H]
        self.C = cell.C
        each = len(weights) // a.directions
        self.directions = []
        values = [w.value for w in weights[:each]]
        of_first = LayerWeights.from_list(values, a.projected, cell.P, cell.recurrent)
        present = zip(LayerWeights._fields, of_first[:-1], strict=False)
        self.names = [name for name, value in present if value is not None] + own_names(cell)
        for d in range(self.D):
            turned, head = divmod(d, a.heads)
            mine = [_of_head(w, head, a.heads) for w in weights[turned * each :][:each]]
            initial = [Dual(h0.value[d], part(h0.tangent, d))]
            states = [self.y[..., d * self.R : (d + 1) * self.R]]
            if c0 is not None:
                assert self.c is not None
                of_each = zip(
                    c0.value[d].chunk(self.C, -1), self._others(part(c0.tangent, d)), strict=True
                )
                initial += [Dual(*pair) for pair in of_each]
                states += self.c[:, :, d].chunk(self.C, -1)
            raw = h_raw[0, :, :, d] if a.projected else None
            kept = self.saved[0, :, :, d] if self.saved.dim() > 1 else self.saved
            named = dict(zip(self.names, mine, strict=True))
            loop = self.ops.sequence_backward
            mask = None if self.call.h_mask is None else self.call.h_mask[d]
            drawn = self._drawn(draws, d)
            self.directions.append(
                Direction(a, turned > 0, x, named, initial, states, raw, kept, mask, drawn, loop)
            )

    def _drawn(self, draws: Maybe, d: int) -> list[Tensor]:
        """What the cell draws in a direction, [T, B, H] each."""
        if self.a.noise is None:
            return []
        T, B = self.y.shape[:2]
        steps = torch.arange(T, device=self.y.device)[:, None, None]
        like = self.y.new_empty(()).expand(T, B, self.call.H)
        return noise.at_step(self.a.noise, draws, steps, d, like)

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

    def forward(self) -> None:
        """The tangents of y [T, B, D*R], h_n [D, B, R], c_n [D, B, C*H] and c [T, B, D, C*H]."""
        every, last = zip(*(d.forward() for d in self.directions), strict=True)
        n = len(self.directions)
        y = _stacked([s[0] for s in every], self.y.chunk(n, -1), 2)
        self.dy = Dual(self.y, None if y is None else y.flatten(2))
        self.dh_n = _stacked([s[0] for s in last], self.call.h0.unbind())
        self.dc_n = self.dc = None
        if self.c is not None:
            assert self.call.c0 is not None
            of_c0, of_c = self.call.c0.unbind(), self.c.unbind(2)
            self.dc_n = _stacked([_beside_h(s, c) for s, c in zip(last, of_c0, strict=True)], of_c0)
            self.dc = _stacked([_beside_h(s, c) for s, c in zip(every, of_c, strict=True)], of_c, 2)

    def _others(self, t: Maybe) -> Sequence[Maybe]:
        """Each state beside h [.., H] of all of them [.., C*H]."""
        return [None] * self.C if t is None else t.chunk(self.C, -1)

    def _loop(self, dy: Maybe, dh_n: Maybe, dc_n: Maybe, dc: Maybe) -> Any:
        """Backward's kernel: dgates, dproj, dunit, dh0 and dc0; dc is [T, B, D, C*H]."""
        call, every = self.call, None if dc is None else dc[None]
        empty = self.y.new_empty(0)
        dgates, dh0, dc0, dproj, _, dunit = self.ops.sequence_backward(
            *call[: Call._fields.index("x")], dy, dh_n, dc_n, None, every,
            call.weights, call.h0, call.c0, None, call.h_mask, self.y, empty, self.every_c,
            self.saved, call.lengths, None, call.reset, call.noise, call.draws, False, True, False,
        )  # fmt: skip
        of_params = dunit[0] if find_cell(self.a.cell).P else None
        return dgates[0], dproj[0] if self.a.projected else None, of_params, dh0, dc0

    def backward(
        self, dy: Dual | None, dh_n: Dual | None, dc_n: Dual | None, dc: Dual | None
    ) -> list[dict[str, Maybe]]:
        """The tangents of the gradients, by name, of each direction: x, h0, c0 and the weights."""
        given = (dy, dh_n, dc_n, dc)
        dgates, dproj, *_ = self._loop(*(None if t is None else t.value for t in given))
        entered = []
        R = self.R
        for d, of in enumerate(self.directions):
            columns = slice(d * R, (d + 1) * R)
            of_states = [None if dy is None else dy.value[..., columns]]
            of_last = [None if dh_n is None else dh_n.value[d]]
            if self.c is not None:
                of_states += self._others(None if dc is None else dc.value[:, :, d])
                of_last += self._others(None if dc_n is None else dc_n.value[d])
            own = part(dproj, slice(None), slice(None), d)
            entered.append(of.entering(dgates[:, :, d], own, of_states, of_last))
        to_y = _stacked([e.of_states[0] for e in entered], self.y.chunk(self.D, -1), 2)
        to_c = None
        if self.c is not None:
            like = self.c.unbind(2)
            pairs = zip(entered, like, strict=True)
            to_c = _stacked([_beside_h(e.of_states, c) for e, c in pairs], like, 2)
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
            found = of.gradients(part(dgates, *mine), part(dproj, *mine), own, e)
            found["h0"] = total(part(dh0, d), e.of_initial[0])
            if self.c is not None:
                assert self.call.c0 is not None
                found["c0"] = total(part(dc0, d), _beside_h(e.of_initial, self.call.c0[d]))
            results.append(found)
        return results

    def of_weights(self, results: list[dict[str, Maybe]]) -> list[Maybe]:
        """What ``backward`` has found for the weights, in their order, with the rows of all heads
        of a direction."""
        found, heads = [], self.a.heads
        for first in range(0, self.D, heads):
            of, some = self.directions[first].weights, results[first : first + heads]
            for name in self.names:
                parts = [result[name] for result in some]
                if heads == 1:
                    found.append(parts[0])
                    continue
                whole = _stacked(parts, [of[name].value] * heads)
                found.append(None if whole is None else whole.flatten(0, 1))
        return found


def _of_head(w: Dual, head: int, heads: int) -> Dual:
    """The rows of a head of those of all heads of a direction."""
    if heads == 1:
        return w
    return Dual(
        w.value.chunk(heads)[head], None if w.tangent is None else w.tangent.chunk(heads)[head]
    )


class _Call:
    """All layers."""

    def __init__(
        self, a: SimpleNamespace, tangents: dict[str, Maybe], of_weights: Sequence[Maybe]
    ) -> None:
        self.a, self.tangents = a, tangents
        self.weights = [Dual(w, t) for w, t in zip(a.weights, of_weights, strict=True)]
        self.merges = a.directions > 1 and a.merge_mode != "concat"

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
        self.layers: list[_Layer] = []
        for index in range(a.layers):
            rows = self._rows(index)
            own = self.weights[index * each : (index + 1) * each]
            h0, c0 = self._given("h0", rows), self._given("c0", rows)
            assert x is not None and h0 is not None
            layer = _Layer(a, index, x, own, h0, c0)
            layer.forward()
            self.layers.append(layer)
            x = _merged(layer.dy, a.merge_mode) if self.merges else layer.dy
            if a.masks and index + 1 < a.layers:
                x = _scaled(x, a.masks[index])
        assert x is not None
        inner = self.layers if self.merges else self.layers[:-1]
        h_n = _stacked([t.dh_n for t in self.layers], [t.call.h0 for t in self.layers])
        ys = _stacked([t.dy.tangent for t in inner], [t.y for t in inner])
        c_n = c = None
        if a.c0 is not None:
            initial = list(a.c0.unflatten(0, (a.layers, -1)))
            c_n = _stacked([t.dc_n for t in self.layers], initial)
            c = _stacked([t.dc for t in self.layers], [t.every_c[0] for t in self.layers])
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
                g = Dual(sum(of.dx() for of in layer.directions), dx)  # type: ignore[arg-type]
        found[1] = _stacked(h0, a.h0.unbind())
        if a.c0 is not None:
            found[2] = _stacked(c0, a.c0.unbind())
        return {i: t for i, t in found.items() if i in wanted}
