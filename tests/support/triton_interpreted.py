"""What the tests of Triton kernels in its interpreter share: layouts that are forced, runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import pytest
import torch
import triton
from torch import Tensor

import op_parity
import triton_programs
from op_parity import Case
from rnnkernels._backends.triton import launch
from rnnkernels._backends.triton.plan import Layout
from rnnkernels.cells import Cell

triton_programs.prepare()

ops = torch.ops.rnnkernels_triton
KINDS = ("resident", "grid", "step")


@dataclass(frozen=True)
class Forced:
    """A layout whatever the sizes. A resident program holds the weights of all units, and has no
    norms."""

    kind: str
    block_b: int = 16
    block_h: int = 8
    block_k: int = 8
    held: bool = True
    launches: int = 1  # at least: blocks of rows are dealt out evenly

    def __str__(self) -> str:
        held = "held" if self.held else "read"
        blocks = f"b{self.block_b}h{self.block_h}k{self.block_k}"
        return f"{self.kind}-{blocks}-{held}-l{self.launches}"

    def layout_of(self, w_hh: Tensor, rows: int, norm: bool, cell: Cell, masked: bool) -> Layout:
        kind = "grid" if norm and self.kind == "resident" else self.kind
        H, resident = w_hh.shape[2], kind == "resident"
        block_h = triton.next_power_of_2(H) if resident else self.block_h
        row_blocks = -(-rows // self.block_b)
        return Layout(
            kind=kind,
            block_b=self.block_b,
            block_h=block_h,
            block_k=block_h if resident else self.block_k,
            parts=-(-H // block_h),
            held=self.held or resident,
            warps=1,
            row_blocks=-(-row_blocks // self.launches),
        )


@dataclass
class Results:
    """Of both ops on a case, with what they were given."""

    call: Any
    out: list[Tensor]
    grads: list[Tensor | None]
    back: list[Tensor] = field(default_factory=list)

    @property
    def all(self) -> list[Tensor]:
        return [*self.out, *self.back]

    def padding_is_zero(self) -> bool:
        back = self.back
        return op_parity.padding_is_zero(
            self.call, [self.out[0], *self.out[3:], back[0], *back[3:5]]
        )

    def errors(self) -> tuple[float, float]:
        """Of forward and backward, against the reference in float64."""
        return (
            op_parity.forward_error(self.call, self.out),
            op_parity.backward_error(self.call, self.out, self.back, self.grads),
        )


@contextmanager
def laid_out(forced: Forced, seed: int = 0) -> Iterator[triton_programs.Schedule]:
    """Within, every pass has this layout, and programs run at once in an order from `seed`."""
    with pytest.MonkeyPatch.context() as patch, triton_programs.at_once(seed) as schedule:
        patch.setattr(launch, "layout_of", forced.layout_of)
        yield schedule


def run(
    case: Case,
    forced: Forced,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    change: Callable[[Any], Any] = lambda call: call,
    change_gradients: Callable[[Any, list[Tensor | None]], None] = lambda call, grads: None,
    given: str = "all",
    backward: Callable[..., list[Tensor]] = op_parity.backward,
) -> Results:
    """Both ops on a case. `change` makes another call of its call, `change_gradients` writes into
    the gradients that are given to backward, of which `given` names the only one."""
    call = change(op_parity.make(case, dtype))
    with laid_out(forced, seed):
        out = op_parity.forward(ops, call)
        grads = op_parity.random_gradients(call, out, given)
        change_gradients(call, grads)
        return Results(call, out, grads, backward(ops, call, out, grads))


def number_of(case: Case) -> int:
    """The same from run to run; for choices that differ from case to case."""
    return crc32(str(case).encode())


def same(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def chosen(case: Case, kind: str) -> Forced:
    """One block of units, or two that wait for each other; the rest differs from case to case."""
    number = number_of(case)
    block_h = 16 if case.H > 16 else 4 if kind == "grid" and number & 1 else 8
    return Forced(kind, 16, block_h, 16 if number & 2 else 4, held=number & 4 > 0)
