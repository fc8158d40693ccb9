"""What truncated BPTT means: plain loops over pieces of the sequence that detach the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Truncate = int | tuple[int, int]


@dataclass
class Run:
    """A layer's arguments for one row or several rows of the same length."""

    x: Tensor  # [T, B, I]
    hx: list[Tensor]  # [L*D, B, size] each
    reset: Tensor | None  # [T, B]

    def piece(self, start: int, end: int, hx: list[Tensor]) -> Run:
        return Run(self.x[start:end], hx, None if self.reset is None else self.reset[start:end])

    def row(self, b: int, length: int) -> Run:
        states = [s[:, b : b + 1] for s in self.hx]
        reset = None if self.reset is None else self.reset[:length, b : b + 1]
        return Run(self.x[:length, b : b + 1], states, reset)


def call(module: nn.Module, run: Run) -> tuple[Tensor, list[Tensor]]:
    """y [T, B, R] and the final states."""
    hx: Any = run.hx[0] if len(run.hx) == 1 else tuple(run.hx)
    y, states = module(run.x, hx, reset=run.reset)
    return y, [states] if isinstance(states, Tensor) else list(states)


def chunk_and_detach(module: nn.Module, run: Run, k: int) -> tuple[Tensor, list[Tensor]]:
    """The loop that everybody writes: k steps, detach, k steps, ..."""
    ys, states = [run.x.new_zeros(0)], run.hx
    for start in range(0, run.x.size(0), k):
        if start:
            states = [s.detach() for s in states]
        y, states = call(module, run.piece(start, start + k, states))
        ys.append(y)
    return torch.cat(ys[1:]) if len(ys) > 1 else call(module, run)[0], states


def rerun_blocks(module: nn.Module, run: Run, k1: int, k2: int) -> tuple[Tensor, list[Tensor]]:
    """For each block of k1 steps, the last k2 steps up to its end from a detached state."""
    T = run.x.size(0)
    ys, states = [], run.hx
    for first in range(0, T, k1):
        end = min(first + k1, T)
        start = max(end - k2, 0)
        states = run.hx
        if start:
            with torch.no_grad():
                _, states = call(module, run.piece(0, start, run.hx))
        y, states = call(module, run.piece(start, end, states))
        ys.append(y[first - start :])
    return torch.cat(ys) if ys else call(module, run)[0], states


def oracle(
    module: nn.Module, run: Run, truncate: Truncate, lengths: Sequence[int] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Outputs and final states with truncated gradients; with ``lengths``, row by row."""

    def one(run: Run) -> tuple[Tensor, list[Tensor]]:
        if isinstance(truncate, tuple):
            return rerun_blocks(module, run, *truncate)
        return chunk_and_detach(module, run, truncate)

    if lengths is None:
        return one(run)
    parts = [one(run.row(b, length)) for b, length in enumerate(lengths)]
    T = run.x.size(0)
    ys = [nn.functional.pad(y, (0, 0, 0, 0, 0, T - y.size(0))) for y, _ in parts]
    states = [torch.cat([s[slot] for _, s in parts], 1) for slot in range(len(run.hx))]
    return torch.cat(ys, 1), states


def gradients(
    run: Callable[[], tuple[Tensor, list[Tensor]]], inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and the gradients of ``inputs`` for a fixed random loss on all of them."""
    y, states = run()
    outs = [y, *states]
    generator = torch.Generator().manual_seed(7)
    douts = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs]
    kept = [(o, g) for o, g in zip(outs, douts, strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in kept], inputs, [g for _, g in kept], materialize_grads=True
    )
    return outs, list(grads)
