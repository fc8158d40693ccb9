"""The definition of correct: one layer as a readable loop over time in torch operations.

Differentiable any number of times, on any device and in any floating dtype; slow.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnkernels.call import Call, Result


def run(call: Call) -> Result:
    """Runs one layer; see :class:`rnnkernels.call.Call` for shapes and meanings.

    A row of length n takes part in steps 0 to n-1: past its end its output is zero and its state
    stands still; direction 1 starts at its own end. ``reset[t]`` zeroes the state that crosses
    the boundary between t-1 and t, in both directions.
    """
    directions = range(len(call.w_hh))
    parts = [run_direction(call, d) for d in directions]
    y = torch.cat([part[0] for part in parts], dim=2)
    h_n = torch.stack([part[1] for part in parts])
    if call.c0 is None:
        return Result(y, h_n, None, None)
    c = torch.stack([part[3] for part in parts], dim=2) if call.all_c else None
    return Result(y, h_n, torch.stack([part[2] for part in parts]), c)


def run_direction(call: Call, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs direction d: y [T, B, R], h_n [B, R], c_n [B, H] and c [T, B, H] (h's where no c is)."""
    cell, T = call.cell, call.x.size(0)
    b_ih = call.b_ih[d] if call.b_ih else None
    b_hh = call.b_hh[d] if call.b_hh else None
    gx = F.linear(call.x, call.w_ih[d], b_ih)  # [T, B, G*H]
    state = [call.h0[d]] if call.c0 is None else [call.h0[d], call.c0[d]]
    outputs: list[list[Tensor]] = [[] for _ in range(T)]

    def step(gx: Tensor, prev: list[Tensor]) -> list[Tensor]:
        gh = F.linear(prev[0], call.w_hh[d], b_hh)  # [B, G*H]
        values, _ = cell.forward(gx.chunk(cell.G, -1), gh.chunk(cell.G, -1), prev)
        next = list(values)
        if call.w_hr:
            next[0] = F.linear(next[0], call.w_hr[d])
        return next

    if T == 0:  # a step over nothing: empty outputs that depend on every tensor all the same
        empty = step(gx, [s[None][:0] for s in state])
        return empty[0], state[0], state[-1], empty[-1]

    for t in range(T) if d == 0 else reversed(range(T)):
        active = None if call.lengths is None else (t < call.lengths)[:, None]  # [B, 1]
        cut = boundary(call, d, t)
        prev = state if cut is None else [s.masked_fill(cut, 0) for s in state]
        next = step(gx[t], prev)
        if active is None:
            state = next
            outputs[t] = next
        else:
            state = [torch.where(active, n, s) for n, s in zip(next, state, strict=True)]
            outputs[t] = [n.masked_fill(~active, 0) for n in next]

    def stack(slot: int) -> Tensor:
        return torch.stack([out[slot] for out in outputs])

    return stack(0), state[0], state[-1], stack(-1)


def boundary(call: Call, d: int, t: int) -> Tensor | None:
    """Which rows have the state that enters position t zeroed: [B, 1], or None for no row."""
    if call.reset is None:
        return None
    if d == 0:
        return call.reset[t][:, None]
    if t + 1 == call.x.size(0):
        return None
    cut = call.reset[t + 1]
    if call.lengths is not None:
        cut = cut & (t + 1 < call.lengths)  # a reset in the padding is no boundary of the row
    return cut[:, None]
