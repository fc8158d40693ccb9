"""Truncated BPTT with overlapping windows: BPTT(h; h') of Williams and Peng 1990.

The losses of each block of k1 steps flow back over the last k2 steps that end with the block. The
windows overlap, so one h_t takes part in several gradients. Every window is therefore run again
from the detached state before it, all windows at once as rows of one batch; only the losses of its
own block reach it. The values that a caller sees stay those of the plain forward pass.

A window that does not overlap (``truncate=k``) needs none of this: backends fold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnkernels._core import noise


class Outputs(NamedTuple):
    """What a stack of layers returns."""

    y: Tensor  # [T, B, R]
    states: list[Tensor]  # final h [L, B, R], and c [L, B, C*H] where there is one
    everything: list[list[Tensor]]  # per slot: every state of every layer, [T, B, heads, size] each


class Stack(Protocol):
    """Runs a stack of one direction; ``masks`` are factors between layers, [T, B, R] each, or
    [1, B, R] for all steps, ``h_mask`` [L, B, R] those of h in front of W_hh, ``draws`` what its
    noise is drawn by."""

    def __call__(
        self,
        x: Tensor,
        hx: list[Tensor],
        lengths: Tensor | None,
        reset: Tensor | None,
        return_all_states: bool,
        masks: list[Tensor],
        h_mask: Tensor | None,
        draws: Tensor | None,
    ) -> Outputs: ...


class Windows:
    """W windows of each of B rows: which steps they hold, and the way there and back.

    Window w of row b ends with block w, or with the row if that is earlier.
    """

    def __init__(self, T: int, B: int, lengths: Tensor, k1: int, k2: int) -> None:
        device = lengths.device
        self.T, self.B = T, B
        first = torch.arange(0, T, k1, device=device)[:, None]  # [W, 1]: of each block
        end = torch.minimum(first + k1, lengths)  # [W, B]
        self.start = (end - k2).clamp(min=0)  # [W, B]
        length = (end - self.start).masked_fill(end <= first, 0)
        self.lengths = length.flatten()  # [W*B]
        self.W, self.steps = first.size(0), min(k2, T)

        row = torch.arange(B, device=device)
        inside = torch.arange(self.steps, device=device)[:, None, None]
        position = (self.start + inside).clamp(max=T - 1)  # [steps, W, B]
        self._there = (position * B + row).flatten(1)
        before = (self.start - 1).clamp(min=0)
        self._before = (before * B + row).flatten()  # [W*B]

        t = torch.arange(T, device=device)[:, None]
        block = (t // k1).expand(T, B)
        step = (t - self.start.gather(0, block)).clamp(0, self.steps - 1)  # [T, B]
        self._back = (step * self.W + block) * B + row
        self._last = (lengths - 1).clamp(min=0) // k1 * B + row  # [B]: windows that end their row
        self._padding = (t >= lengths)[..., None]  # [T, B, 1]

    def split(self, values: Tensor) -> Tensor:
        """[T, B, ...] as [steps, W*B, ...]."""
        return _take(values.flatten(0, 1), self._there)

    def repeat(self, rows: Tensor) -> Tensor:
        """[L, B, ...] as [L, W*B, ...]: what every window of a row has of it."""
        return rows.repeat(1, self.W, *[1] * (rows.dim() - 2))

    def draws(self, draws: Tensor) -> Tensor:
        """Those of the windows [W*B, ...] from those of rows [B, ...]."""
        return noise.of_steps(draws.repeat(self.W, 1), self.start.flatten(), 1)

    def entering(self, initial: Tensor, all_states: Sequence[Tensor]) -> Tensor:
        """The states that enter the windows [L, W*B, R], without history but for ``initial``."""
        layers = []
        for layer, states in enumerate(all_states):
            carried = states.detach().flatten(0, 2)[self._before]  # [W*B, R]
            repeated = self.repeat(initial[layer : layer + 1])[0]
            layers.append(torch.where(self.start.view(-1, 1) == 0, repeated, carried))
        return torch.stack(layers)

    def join(self, values: Tensor) -> Tensor:
        """[steps, W*B, ...] as [T, B, ...]: every step from the window of its own block."""
        shape = self.T, self.B, *values.shape[2:]
        joined = _take(values.flatten(0, 1), self._back)
        return joined.flatten(2).masked_fill(self._padding, 0).view(shape)

    def final(self, states: Tensor) -> Tensor:
        """[L, W*B, R] as [L, B, R]: the state at the end of each row."""
        return states[:, self._last]


def overlapping(
    run: Stack,
    x: Tensor,
    hx: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    return_all_states: bool,
    pair: tuple[int, int],
    masks: list[Tensor],
    h_mask: Tensor | None,
    draws: Tensor | None,
) -> Outputs:
    """Runs a stack with gradients truncated by ``pair`` (k1, k2).

    Args:
        x: ``[T, B, I]``; hx: ``[L, B, R]`` and ``[L, B, C*H]``; lengths ``[B]``; reset ``[T, B]``.
        masks, h_mask: what falls out; every window sees the same noise.
        draws: what the noise of cells is drawn by, which is the same as well.
    """
    T, B = x.shape[:2]
    if T == 0 or B == 0:
        return run(x, hx, lengths, reset, return_all_states, masks, h_mask, draws)
    with torch.no_grad():
        plain = run(x, hx, lengths, reset, True, masks, h_mask, draws)
    ends = torch.full((B,), T, device=x.device) if lengths is None else lengths
    windows = Windows(T, B, ends, *pair)
    split_masks = [windows.split(m) if m.size(0) == T else windows.repeat(m) for m in masks]
    entering = [
        windows.entering(first, [of for every in states for of in every.chunk(every.size(2), 2)])
        for first, states in zip(hx, plain.everything, strict=False)  # a cell without c has one
    ]
    again = run(
        windows.split(x),
        entering,
        windows.lengths,
        None if reset is None else windows.split(reset[..., None])[..., 0],
        return_all_states,
        split_masks,
        None if h_mask is None else windows.repeat(h_mask),
        None if draws is None else windows.draws(draws),
    )
    everything: list[list[Tensor]] = [[], []]
    if return_all_states:
        for slot, (values, carriers) in enumerate(
            zip(plain.everything, again.everything, strict=True)
        ):
            everything[slot] = [
                _graft(v, windows.join(c)) for v, c in zip(values, carriers, strict=True)
            ]
    states = [_graft(v, windows.final(c)) for v, c in zip(plain.states, again.states, strict=True)]
    return Outputs(_graft(plain.y, windows.join(again.y)), states, everything)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows [N, ...] at index, with a gradient that sums in a fixed order on every device."""
    if not rows.is_floating_point():
        return rows[index]
    return F.embedding(index, rows.flatten(1)).view(*index.shape, *rows.shape[1:])


class _Graft(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, carrier: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


class _GraftWithTangent(_Graft):
    @staticmethod
    def jvp(ctx: Any, values: Tensor | None, carrier: Tensor) -> Tensor:
        return carrier.clone()


def _graft(values: Tensor, carrier: Tensor) -> Tensor:
    """``values``, with the gradient and the tangent of ``carrier``."""
    # torch.compile takes no function that has a jvp.
    kind = _Graft if torch.compiler.is_compiling() else _GraftWithTangent
    result: Tensor = kind.apply(values, carrier)  # type: ignore[no-untyped-call]
    return result
