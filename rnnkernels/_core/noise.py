"""What a cell draws for each unit at each step: where the draws of a call come from, and the draws
as the reference takes them. What they are a function of: ``csrc/common/noise.h``.

``draws`` [B, 5] int64 says of each row its seed, its number in the batch as the user has it, the
position of its first step and how far the next one is, and the number of the stream, ``layer * D +
direction``, of the call's first layer in direction 0; each head of a direction counts as one. So
rows keep their draws wherever they run: packed, in a window of their own, backwards, as lanes of
``torch.vmap``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnnkernels._core.philox import philox4x32

_LOW = 0xFFFFFFFF
_FIRST, _STEP, _STREAM = 2, 3, 4


def new_draws(B: int, device: torch.device, rows: Tensor | None = None) -> Tensor:
    """Those of a call of B rows, numbered by ``rows`` [B] or else as they come, with a seed of
    torch's default generator on the CPU."""
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64).to(device)
    row = torch.arange(B, device=device) if rows is None else rows
    nothing = torch.zeros_like(row)
    columns = (nothing + seed, row, nothing, nothing + 1, nothing)
    return torch.stack(columns, 1)


def _changed(draws: Tensor, column: int, values: Tensor) -> Tensor:
    columns = list(draws.unbind(1))
    columns[column] = values
    return torch.stack(columns, 1)


def of_stream(draws: Tensor, more: int) -> Tensor:
    """Those of a later layer, or of a direction as one of its own."""
    return draws if more == 0 else _changed(draws, _STREAM, draws[:, _STREAM] + more)


def of_steps(draws: Tensor, first: int | Tensor, step: int) -> Tensor:
    """Those of rows that begin at another step [B], and go on by ``step``."""
    moved = _changed(draws, _FIRST, draws[:, _FIRST] + draws[:, _STEP] * first)
    return moved if step == 1 else _changed(moved, _STEP, moved[:, _STEP] * step)


def at_step(
    noise: Tensor, draws: Tensor | None, t: int | Tensor, d: int, like: Tensor
) -> list[Tensor]:
    """The numbers [n, H] of the first n rows at position t in direction d, of ``like``'s shape and
    dtype; for positions t [T, 1, 1] and ``like`` [T, n, H] those of several."""
    if draws is None or like.numel() == 0:
        return [p.to(like.dtype).expand_as(like) for p in noise.unbind()]
    n, H = like.shape[-2:]
    seed, row, first, step, stream = draws[:n, :, None].unbind(1)  # [n, 1] each
    counter = [
        torch.arange(H, device=like.device),
        (first + step * t) & _LOW,
        row & _LOW,
        ((stream + d) << 8) & _LOW,
    ]
    key = [seed & _LOW, (seed >> 32) & _LOW]
    found: list[Tensor] = []
    for leaf, p in enumerate(noise.unbind()):
        if leaf % 4 == 0:
            words = philox4x32([*counter[:3], counter[3] | leaf // 4], key)
        threshold = (p * 2.0**32).to(torch.int64)
        found.append((words[leaf % 4] < threshold).to(like.dtype).expand_as(like))
    return found
