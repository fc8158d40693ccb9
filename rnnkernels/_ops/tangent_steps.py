"""Tangents of one direction of a layer: see :mod:`rnnkernels._ops.tangents`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkernels._ops.duals import Dual, Maybe, apart, filled, joined, or_zero, part, product, total
from rnnkernels._ops.steps import Steps
from rnnkernels._ops.tangent_weights import DirectionWeights, needed, own_names
from rnnkernels.cells import find

_BLOCK = 1 << 15  # numbers of a state: what comes of as many is found in a cache


def _units(like: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of the states after a step of which one is 1, state by state."""
    one, zero = torch.ones_like(like[0]), torch.zeros_like(like[0])
    for s in range(len(like)):
        yield [one if s == i else zero for i in range(len(like))]


def _blocks(T: int, numbers: int) -> Iterator[slice]:
    """Some steps at a time of T, of so many numbers each."""
    n = max(1, _BLOCK // max(1, numbers))
    return (slice(first, first + n) for first in range(0, T, n))


@cache
def _reaches(cell_name: str) -> list[bool]:
    """Of each state whether the next ones depend on it other than by the hidden part of gates."""
    cell, drawn = find(cell_name), torch.Generator().manual_seed(0)

    def some(n: int) -> list[Tensor]:
        return list(torch.randn(n, 64, dtype=torch.float64, generator=drawn))

    gx, gh, prev = some(cell.G), some(cell.G), some(cell.S)
    prev += some(cell.P + cell.E)
    next, saved = cell.forward(gx, gh, prev)
    each = [cell.backward(saved, prev, next, unit)[2] for unit in _units(next)]
    return [any(bool(dprev[j].any()) for dprev in each) for j in range(cell.S)]


class Entering(NamedTuple):
    """What enters backward's loop from outside of it, where its factors change; None is zero."""

    of_gx: Tensor  # [T, B, G*H]
    of_gh: Tensor
    of_states: list[Maybe]  # [T, B, n]: to those after each step
    of_initial: list[Maybe]  # [B, n]
    of_params: list[Maybe]  # [H]: to the gradients of the cell's own parameters


class Direction(DirectionWeights):
    """One direction of a layer: what its kernels have computed, and the tangents of that.

    ``initial`` are the first states [B, n], ``states`` those after each step [T, B, n], ``noise``
    [T, B, H] is what the cell draws. ``backward`` is the op of the loop backwards.
    """

    def __init__(
        self,
        a: SimpleNamespace,
        turned: bool,
        x: Dual,
        weights: dict[str, Dual],
        initial: Sequence[Dual],
        states: Sequence[Tensor],
        h_raw: Maybe,
        saved: Tensor,
        h_mask: Maybe,
        noise: Sequence[Tensor],
        backward: Callable[..., Sequence[Tensor]],
    ) -> None:
        steps = Steps(a, turned)
        entering = [steps.entering(s, i.value) for s, i in zip(states, initial, strict=True)]
        self.prev = [Dual(t) for t in entering if t is not None]  # the states before each step
        raw = None if h_raw is None else Dual(h_raw)
        super().__init__(find(a.cell), steps, x, weights, h_mask, self.prev[0], raw)
        self.backward, self.initial = backward, initial
        after = [states[0] if h_raw is None else h_raw, *states[1:]]
        self.next = [Dual(self.steps.quiet(t)) for t in after]  # h before the projection
        self.params, self.noise = [weights[name] for name in own_names(self.cell)], noise
        self.saved = self.steps.quiet(saved).chunk(self.cell.K, -1) if self.cell.K else ()
        self.H = self.next[0].value.size(-1)
        self.of_states: list[Maybe] = [None] * self.cell.S
        if not self._by_kernel():
            self._jacobians()

    def _before(self, at: slice = slice(None)) -> list[Dual]:
        """What the cell takes beside its gates at some steps: the states before each, its own
        parameters, what it draws."""
        states = [Dual(t.value[at], part(t.tangent, at)) for t in self.prev]
        like = self.next[0].value[at]
        own = [
            Dual(t.expand_as(like), None if dt is None else dt.expand_as(like))
            for t, dt in self.params
        ]
        return [*states, *own, *(Dual(t[at]) for t in self.noise)]

    def _jacobians(self) -> None:
        """Of each next state: of both parts of the gates [T, B, S, G, H], of each state before the
        step [T, B, S, H], where there is one, and of the cell's own parameters."""
        cell, (T, B, H) = self.cell, self.next[0].value.shape

        def empty(*sizes: int) -> Tensor:
            return self.next[0].value.new_empty(T, B, *sizes, H)

        self.of_gx = empty(cell.S, cell.G)
        self.of_gh = empty(cell.S, cell.G) if cell.A else self.of_gx
        self.of_states = [empty(cell.S) if reached else None for reached in _reaches(cell.name)]
        self.of_params = [empty(cell.S) for _ in cell.params]
        for at in _blocks(T, B * H):
            prev = [t.value for t in self._before(at)]
            next, saved = [t.value[at] for t in self.next], [t[at] for t in self.saved]
            each = [cell.backward(saved, prev, next, unit) for unit in _units(next)]
            for k, out in enumerate((self.of_gx, self.of_gh)[: 1 + (cell.A > 0)]):
                torch.stack([t for found in each for t in found[k]], 2, out=out[at].flatten(2, 3))
            for j, of_state in enumerate([*self.of_states, *self.of_params]):
                if of_state is not None:
                    torch.stack([dprev[j] for _, _, dprev in each], 2, out=of_state[at])

    def forward(self) -> tuple[list[Maybe], list[Maybe]]:
        """The tangents of the states after each step [T, B, n] and after the last one [B, n]."""
        self.dgx_in = self.gate_tangent(self.x, self.weights["w_ih"], self.weights.get("b_ih"))
        self.dgh_in = self.gate_tangent(self.entered(), self.w_hh, self.weights.get("b_hh"))
        moved = None if self.w_hr is None else self.w_hr.tangent
        own = [t.tangent for t in (*self.initial, *self.params)]
        sources = [self.dgx_in, self.dgh_in, moved, *own]
        if all(t is None for t in sources):
            return [None] * self.cell.S, [None] * self.cell.S
        if self._by_kernel():
            every = [self._loop_by_kernel(total(self.dgx_in, self.dgh_in))]
            raw, by_h, state = every[0], None, [every[0][self.steps.order[-1]].clone()]
        else:
            every, raw, by_h, state = self._loop(*self._sources(moved))
            del self.of_gx, self.of_gh  # the largest that there is, and nobody asks again
        self.dgh_in = total(self.dgh_in, by_h)
        if self.h_raw is not None:
            self.h_raw = Dual(self.h_raw.value, self.steps.quiet(raw))
        self.next = [
            Dual(t.value, self.steps.quiet(tangent))
            for t, tangent in zip(self.next, [raw, *every[1:]], strict=True)
        ]
        self.prev = [
            Dual(p.value, self.steps.entering(s, first.tangent))
            for p, s, first in zip(self.prev, every, self.initial, strict=True)
        ]
        self.h = self.prev[0]
        return [self.steps.quiet(t) for t in every], list(state)

    def _sources(self, moved: Maybe) -> tuple[Tensor, Maybe]:
        """What enters the loop from outside of it at each step: u [T, B, S, H], and what the change
        of the projection adds to h behind it [T, B, R]."""
        pairs = [(self.of_gx, self.dgx_in), (self.of_gh, self.dgh_in)]
        if not self.cell.A:
            pairs = [(self.of_gx, total(self.dgx_in, self.dgh_in))]
        u = torch.zeros_like(self.of_gx[:, :, :, 0])  # [T, B, S, H]
        for jacobian, t in pairs:
            for k, of_gate in enumerate(() if t is None else t.chunk(self.cell.G, -1)):
                u.addcmul_(jacobian[:, :, :, k], of_gate[:, :, None])
        for jacobian, (_, t) in zip(self.of_params, self.params, strict=True):
            if t is not None:
                u.addcmul_(jacobian, t)
        if moved is not None:
            assert self.h_raw is not None
            moved = product(self.h_raw.value, moved.t())
        return u, moved

    def _by_kernel(self) -> bool:
        """Whether the kernel of backward's loop can run this one: where the next state of a unit
        depends on one gate and nothing else, its Jacobian is one number, and both loops are alike.
        """
        cell, steps = self.cell, self.steps
        one = cell.G == cell.S == 1 and cell.K == cell.A == cell.P == cell.E == 0
        one = one and cell.recurrent and not _reaches(cell.name)[0]
        others = (self.w_hr, self.h_mask, steps.still, steps.cut)
        return one and all(t is None for t in others)

    def _loop_by_kernel(self, gates: Maybe) -> Tensor:
        """``h' = J (gates + W_hh h')`` [T, B, H]: backward's ``dgates = J (dy + W_hh^T dgates)``,
        with the steps the other way round and W_hh transposed."""
        assert self.w_hh is not None
        y, first, turned = self.next[0].value, self.initial[0].tangent, self.steps.turned
        w, empty, dy = self.w_hh.value.t(), y.new_empty(0), or_zero(gates, y)
        y, dy = (y, dy.clone()) if turned else (y.flip(0), dy.flip(0))
        if first is not None:
            dy[-1] += first @ w
        dgates = self.backward(
            self.cell.name, 1, 1, 1, False, "concat", 0, "none", 1.0, dy, None, None, None, None,
            [w, w], torch.zeros_like(y[:1]), None, None, None, y, empty, empty, empty,
            None, None, None, None, None, False, False, False,
        )[0]  # fmt: skip
        found = dgates[0, :, :, 0]
        return found if turned else found.flip(0)

    def _loop(self, u: Tensor, moved: Maybe) -> tuple[list[Tensor], Tensor, Maybe, list[Tensor]]:
        """``next' = u + J_gh (W_hh h') + J_prev prev'``: all states, h before the projection,
        ``W_hh h'``, and the last states."""
        steps, sizes = self.steps, (-1, 1, self.cell.G, u.size(-1))
        w_hh = None if self.w_hh is None else self.w_hh.value.t().contiguous()
        w_hr = None if self.w_hr is None else self.w_hr.value.t()
        u_at, gates_at = u.unbind(), self.of_gh.unbind()
        states_at = [None if t is None else t.unbind() for t in self.of_states]
        state = [or_zero(t.tangent, t.value) for t in self.initial]
        every = [s.new_empty(len(u_at), *s.shape) for s in state]
        raw = every[0] if w_hr is None else torch.empty_like(u[:, :, 0])
        by_h = None if w_hh is None else u.new_empty(*u.shape[:2], w_hh.size(1))
        for t in steps.order:
            before = state if steps.cut is None else [s.masked_fill(steps.cut[t], 0) for s in state]
            found = u_at[t]
            if w_hh is not None and by_h is not None:
                through_w = self.masked(before[0]) @ w_hh
                by_h[t] = through_w
                found = found + (gates_at[t] * through_w.view(sizes)).sum(2)
            for at, s in zip(states_at, before, strict=True):
                if at is not None:
                    found = torch.addcmul(found, at[t], s[:, None])
            next = list(found.unbind(1))
            if w_hr is not None:
                raw[t] = next[0]
                next[0] = next[0] @ w_hr if moved is None else torch.addmm(moved[t], next[0], w_hr)
            if steps.still is not None:
                next = [torch.where(steps.still[t], s, n) for n, s in zip(next, state, strict=True)]
            state = next
            for of, s in zip(every, state, strict=True):
                of[t] = s
        return every, raw, by_h, state

    def _in_time(self, of_steps: list[Tensor]) -> Tensor:
        return torch.stack(of_steps[::-1] if self.steps.turned else of_steps)

    def entering(
        self,
        dgates: Tensor,
        dproj: Maybe,
        of_states: Sequence[Maybe],
        of_last: Sequence[Maybe],
    ) -> Entering:
        """What enters backward's loop, whose gradients of the gates are ``dgates`` [T, B, (G+A)*H],
        and those of h after the projection ``dproj`` [T, B, R], for these gradients of the states
        after each step and after the last one."""
        self.take_gradients(dgates, dproj)
        through_w = torch.zeros_like(self.prev[0].value)
        if self.w_hh is not None:
            through_w = self.masked(needed(product(self.dgh, self.w_hh.value)))
        of_gx, of_gh, to_prev, of_params = self._changes(self._dnext(through_w, of_states, of_last))
        if self.w_hh is not None:
            by_w = total(product(of_gh, self.w_hh.value), product(self.dgh, self.w_hh.tangent))
            to_prev[0] = total(to_prev[0], None if by_w is None else self.masked(by_w))
        pairs = [self.steps.leaving(t) for t in to_prev]
        every, first = [every for every, _ in pairs], [first for _, first in pairs]
        return Entering(of_gx, of_gh, every, first, of_params)

    def _changes(self, dnext: Sequence[Dual]) -> tuple[Tensor, Tensor, list[Maybe], list[Maybe]]:
        """The tangents of the gradients of both parts of the gates [T, B, G*H], of the states
        before each step and of the cell's own parameters [H], by the change of what the cell
        multiplies with; in torch's forward mode.

        Some steps at a time: then what the cell's many operations hand on is found in a cache.
        """
        cell, sizes = self.cell, self.dgx.shape
        of_gx = self.dgx.new_empty(sizes)
        of_gh = self.dgx.new_empty(sizes) if cell.A else of_gx
        T, B, H = (*sizes[:2], self.H)
        of_prev = {
            j: of_gx.new_empty(T, B, H) for j, at in enumerate(self.of_states) if at is not None
        }
        of_params: list[Maybe] = [None] * cell.P
        for at in _blocks(T, B * H):
            prev = self._before(at)
            next, d = (
                [Dual(t.value[at], part(t.tangent, at)) for t in of] for of in (self.next, dnext)
            )
            # All have a tangent: what torch does of one tensor that has and one that has not takes
            # several times as long.
            of_prev_at, of_next, of_dnext = (
                [joined(filled(t)) for t in of] for of in (prev, next, d)
            )
            dgx, dgh, dprev = cell.backward(self._saved(at), of_prev_at, of_next, of_dnext)
            for out, found in ((of_gx, dgx), (of_gh, dgh))[: 1 + (cell.A > 0)]:
                pairs = [apart(t) for t in found]
                torch.cat([or_zero(t, value) for value, t in pairs], -1, out=out[at])
            for j, out in of_prev.items():
                value, t = apart(dprev[j])
                out[at] = or_zero(t, value)
            for j in range(cell.P):
                t = apart(dprev[cell.S + j]).tangent
                added = None if t is None else self.steps.quiet(t, at).sum((0, 1))
                of_params[j] = total(of_params[j], added)
        # A cell may have no derivative at the zeros that stand in the padding.
        of_gx = self.steps.quiet(of_gx)
        of_gh = self.steps.quiet(of_gh) if cell.A else of_gx
        return of_gx, of_gh, [of_prev.get(j) for j in range(cell.S)], of_params

    def _saved(self, at: slice) -> list[Tensor]:
        """What backward takes at some steps, in torch's forward mode."""
        values = [t[at] for t in self.saved]
        gates = (part(self.dgx_in, at), part(self.dgh_in, at))
        before = self._before(at)
        if not values or all(t is None for t in (*gates, *(t.tangent for t in before))):
            return values
        zero = values[0].new_zeros(()).expand(*values[0].shape[:-1], self.dgx.size(-1))
        chunks = [(zero if t is None else t).chunk(self.cell.G, -1) for t in gates]
        prev, next = [t.value for t in before], [t.value[at] for t in self.next]
        moved = [or_zero(t, p) for p, t in before[: self.cell.S + self.cell.P]]
        changes = self.cell.tangents(values, prev, next, chunks[0], chunks[1], moved)
        return [joined(Dual(*pair)) for pair in zip(values, changes, strict=True)]

    def _dnext(
        self, by_hidden: Tensor, of_states: Sequence[Maybe], of_last: Sequence[Maybe]
    ) -> list[Dual]:
        """The gradients of the states after each step, h before its projection, as backward's
        kernel has had them; ``by_hidden`` [T, B, R] is what each step gives to the h before."""
        steps, given = self.steps, None
        if self.w_hr is not None:
            assert self.dproj is not None
            moved = product(self.dproj, self.w_hr.tangent)
            given = Dual(needed(product(self.dproj, self.w_hr.value)), moved)
        carried = [or_zero(t, i.value) for t, i in zip(of_last, self.initial, strict=True)]
        if given is None and steps.still is None and all(t is None for t in self.of_states):
            every, _ = steps.leaving(by_hidden)  # of one state, and nothing goes around W_hh
            assert every is not None
            every[steps.order[-1]] += carried[0]
            return [Dual(every if (given_h := of_states[0]) is None else every + given_h)]
        found: list[list[Tensor]] = [[] for _ in carried]
        for t in reversed(steps.order):
            now = [c if of is None else c + of[t] for c, of in zip(carried, of_states, strict=True)]
            if given is not None:
                now[0] = given.value[t]
            for of, g in zip(found, now, strict=True):
                of.append(g)
            together = torch.stack(now, 1) if len(now) > 1 else now[0][:, None]
            before = [by_hidden[t], *(torch.zeros_like(g) for g in now[1:])]
            for j, at in enumerate(self.of_states):
                if at is not None:
                    around = (at[t] * together).sum(1)
                    before[j] = before[j] + around if j == 0 else around
            if steps.cut is not None:
                before = [b.masked_fill(steps.cut[t], 0) for b in before]
            if steps.still is not None:
                before = [
                    torch.where(steps.still[t], c, b) for c, b in zip(carried, before, strict=True)
                ]
            carried = before
        dnext = [Dual(steps.quiet(self._in_time(of[::-1]))) for of in found]
        if given is not None:
            dnext[0] = given
        return dnext

    def gradients_of_entering(
        self, dgates: Maybe, dproj: Maybe, dunit: Maybe, entered: Entering
    ) -> dict[str, Maybe]:
        """``gradients``, and those of the cell's own parameters, from what the loop has found for
        what entered it: gradients of the gates, and what rows add to the parameters [.., P*H]."""
        dgx, dgh, H = entered.of_gx, entered.of_gh, self.H
        if dgates is not None:  # in place: what has entered has gone its way
            of_gx, of_gh = self.both_parts(dgates)
            dgx += of_gx
            if self.cell.A:
                dgh += of_gh
        found = self.gradients(dgx, dgh, dproj)
        sums = None if dunit is None else dunit.sum(0).to(dgx.dtype)
        for k, name in enumerate(own_names(self.cell)):
            own = part(sums, slice(k * H, (k + 1) * H))
            found[name] = total(own, entered.of_params[k])
        return found
