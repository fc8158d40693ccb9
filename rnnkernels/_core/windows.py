"""A sequence in windows that run one after the other, each from the state that the one before it
leaves behind; what :mod:`rnnkernels._backends.recompute` runs.

Steps are padded ``[T, B, ...]`` or packed ``[N, ...]``, as everywhere. A window of packed steps has
the rows that reach it, which are those in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkernels._core import noise
from rnnkernels._core.call import Call, check_listed


class Window(NamedTuple):
    """Steps ``[first, last)`` of the rows that are there."""

    first: int
    last: int
    places: slice  # along the first dimension of padded or packed data
    before: int  # the place of the step before
    rows: int
    states: slice  # of its rows among those that enter all windows, side by side


def how_many(T: int | torch.SymInt, every: int, window: int) -> int | torch.SymInt:
    """How many windows :func:`windows` gives."""
    if not window:
        return -(-T // every)
    return T // window * -(-window // every) - -(T % window) // every


def windows(call: Call, every: int) -> list[Window]:
    """Windows of at most ``every`` steps; none crosses a boundary that no gradient crosses."""
    T, block = call.T, call.window or max(call.T, 1)
    check_listed(how_many(T, every, call.window), "windows of steps")
    borders = [t for b in range(0, T, block) for t in range(b, min(b + block, T), every)] + [T]
    # Packed, the host has to know where steps stand: on a GPU it waits for that once.
    places = range(T + 1) if call.starts is None else call.starts.tolist()
    found, rows = [], 0
    for first, last in pairwise(borders):
        n = call.B if call.starts is None else places[first + 1] - places[first]
        span = slice(places[first], places[last])
        before = places[max(first - 1, 0)]
        found.append(Window(first, last, span, before, n, slice(rows, rows + n)))
        rows += n
    return found


class Direction:
    """One direction of a call, which has one layer where it has two directions.

    The reverse one runs as the other does: in each window every row's steps stand in the order in
    which it takes them, from its own end. A step's reset is then that of the boundary behind it.
    """

    def __init__(self, call: Call, d: int) -> None:
        self.d, self.whole = d, call
        self.reset = call.reset
        if d == 1 and call.reset is not None:
            self.reset = _reset_behind(call, call.reset)
        self._turned: tuple[Window, Tensor] | None = None

    def mine(self, t: Tensor, dim: int) -> Tensor:
        """Of a tensor whose dimension ``dim`` has both directions, side by side."""
        size = t.size(dim) // self.whole.directions
        return t.narrow(dim, self.d * size, size)

    def input(self, t: Tensor) -> Tensor:
        """Of x, or of its gradient, what this direction takes: all of it, but for a cell that is
        handed the gates of each direction."""
        return self.mine(t, -1) if self.whole.cell.normed else t

    def in_turn(self, found: list[Window]) -> list[Window]:
        """The windows of a sequence in the order in which this direction runs through them."""
        return found[::-1] if self.d else found

    @property
    def weights(self) -> slice:
        """Which of the call's weights are those of this direction."""
        size = len(self.whole.weights) // self.whole.directions
        return slice(self.d * size, (self.d + 1) * size)

    def take(self, t: Tensor, w: Window) -> Tensor:
        """The steps of a window."""
        return self.in_place(t[w.places], w)

    def together(self, some: Sequence[Window]) -> Window:
        """Neighbours, in the order in which they run, as one window."""
        first, last = (some[-1], some[0]) if self.d else (some[0], some[-1])
        places = slice(first.places.start, last.places.stop)
        return first._replace(last=last.last, places=places)

    def entering(self, w: Window, around: Window, every: Tensor, initial: Tensor) -> Tensor:
        """The states that enter a window [rows, R], of which those of rows without steps in it
        mean nothing; from all states of a window around it, in their places, and what rows
        begin with there [B, R]."""
        packed, lengths = self.whole.starts is not None, self.whole.lengths
        place = (w.places.stop if self.d else w.before) - around.places.start
        if self.d == 0:
            return every[place : place + w.rows] if packed else every[place]
        if lengths is None:
            return every[place]
        begun = lengths[: w.rows] > w.last
        if not packed:
            return torch.where(begun[:, None], every[place], initial)
        places = place + torch.arange(w.rows, device=every.device)
        there = every[torch.where(begun, places, 0)]
        return torch.where(begun[:, None], there, initial[: w.rows])

    def in_place(self, t: Tensor, w: Window) -> Tensor:
        """Steps of a window in the order in which they run, or from that back to their places."""
        if self.d == 0:
            return t
        lengths, starts = self._lengths(w), self._starts(w)
        if lengths is None:
            return t.flip(0)
        if self._turned is None or self._turned[0] is not w:
            steps = torch.arange(w.last - w.first, device=t.device)
            if starts is None:
                s, b = steps[:, None], torch.arange(w.rows, device=t.device)
                places = torch.where(s < lengths, lengths - 1 - s, s) * w.rows + b
            else:
                s, b = _steps_and_rows(starts)
                places = starts[lengths[b] - 1 - s] + b
            self._turned = w, places.flatten()
        rows = t if starts is not None else t.flatten(0, 1)
        return rows.index_select(0, self._turned[1]).view(t.shape)

    def put(self, t: Tensor, w: Window, values: Tensor, add: bool = False) -> None:
        """The other way round; what is there already stays and is added to, if asked for."""
        place, values = t[w.places], self.in_place(values, w)
        place.add_(values) if add else place.copy_(values)

    def part(self, w: Window, x: Tensor, weights: Sequence[Tensor], states: list[Tensor]) -> Call:
        """The call that runs a window: x of it, and the states that enter it."""
        call = self.whole
        return call._replace(
            directions=1,
            merge_mode="concat",
            window=0,
            x=x,
            weights=weights,
            h0=states[0],
            c0=None if call.c0 is None else states[1],
            masks=None if call.masks is None else [self._mask(m, w) for m in call.masks],
            h_mask=None if call.h_mask is None else self.mine(call.h_mask, 0)[:, : w.rows],
            lengths=self._lengths(w),
            starts=self._starts(w),
            reset=None if self.reset is None else self.take(self.reset, w),
            draws=self._draws(w),
            flow=None,
        )

    def _mask(self, mask: Tensor, w: Window) -> Tensor:
        """Of a window, of a mask of all steps or of one [1, B, ...] for all of them."""
        for_all = mask.dim() == 3 and mask.size(0) == 1
        return mask[:, : w.rows] if for_all else self.take(mask, w)

    def cut(self, w: Window, gradients: list[Tensor]) -> None:
        """Stops the gradients of the states that enter a window [L, B, R] where a boundary of
        truncated BPTT lies before it; rows that end there have their state from elsewhere."""
        call, border = self.whole, w.last if self.d else w.first
        if not call.window or border % call.window or not 0 < border < call.T:
            return
        for gradient in gradients:
            if call.lengths is None:
                gradient.zero_()
            else:
                gradient.masked_fill_((call.lengths > border)[:, None], 0)

    def _draws(self, w: Window) -> Tensor | None:
        """Those of the window's rows, whose steps run in the direction's order."""
        if self.whole.draws is None:
            return None
        draws = noise.of_stream(self.whole.draws[: w.rows], self.d * self.whole.heads)
        if self.d == 0:
            return noise.of_steps(draws, w.first, 1)
        lengths = self._lengths(w)
        return noise.of_steps(
            draws, w.first + (w.last - w.first if lengths is None else lengths) - 1, -1
        )

    def _lengths(self, w: Window) -> Tensor | None:
        lengths = self.whole.lengths
        return None if lengths is None else (lengths[: w.rows] - w.first).clamp(0, w.last - w.first)

    def _starts(self, w: Window) -> Tensor | None:
        starts = self.whole.starts
        return None if starts is None else starts[w.first : w.last + 1] - starts[w.first]


def _steps_and_rows(starts: Tensor) -> tuple[Tensor, Tensor]:
    """Of every place of packed data: step and row [N]."""
    sizes = starts.diff()
    t = torch.arange(len(sizes), device=starts.device).repeat_interleave(sizes)
    return t, torch.arange(len(t), device=starts.device) - starts[t]


def _reset_behind(call: Call, reset: Tensor) -> Tensor:
    """Whether the boundary behind each step of a row is a reset, of the shape of ``reset``; none
    lies behind the row's last step."""
    if call.starts is None:
        behind = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
        if call.lengths is None:
            return behind
        t = torch.arange(call.T, device=reset.device)[:, None]
        return behind & (t + 1 < call.lengths)
    assert call.lengths is not None
    t, b = _steps_and_rows(call.starts)
    inside = t + 1 < call.lengths[b]
    return reset[torch.where(inside, call.starts[t + 1] + b, 0)] & inside
