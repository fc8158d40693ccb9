"""Sequences without their padding: [N] steps in place of [T, B].

The rows stand longest first and none is empty; of each step only the rows that reach it are there,
side by side, as in the data of a PackedSequence. ``starts[t]`` is the place of step t's first row.
Layers take such data as they take padded one, and memory and work go with the steps that exist.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkernels._core.call import is_batch


class Packed(NamedTuple):
    """Which steps packed data has, as the kernels take it."""

    lengths: Tensor  # [B] int64, descending, above zero
    starts: Tensor  # [T + 1] int64

    @classmethod
    def of_batch_sizes(cls, batch_sizes: Tensor, B: int, device: torch.device) -> Packed:
        """Of the batch sizes [T] of a PackedSequence of B rows, which descend and are on the
        CPU."""
        rows = torch.arange(B)
        # Row b has as many steps as there are batch sizes above b.
        lengths = len(batch_sizes) - torch.searchsorted(batch_sizes.flip(0), rows, right=True)
        starts = torch.nn.functional.pad(batch_sizes.cumsum(0), (1, 0))
        return cls(lengths.to(device), starts.to(device))

    def pad(self, t: Tensor) -> Tensor:
        """[N, ...] as [T, B, ...], with zeros for padding."""
        T, B = self.starts.size(0) - 1, self.lengths.size(0)
        whole = t.new_zeros(T, B, *t.shape[1:])
        whole[torch.arange(T, device=t.device)[:, None] < self.lengths] = t
        return whole


class Places(NamedTuple):
    """What stands where in packed data, by the lengths of its rows."""

    sizes: Tensor  # [T] rows that reach each step
    starts: Tensor  # [T + 1]
    t: Tensor  # [N] the step at each place
    b: Tensor  # [N] the row at each place

    @classmethod
    def of_lengths(cls, lengths: Tensor) -> Places:
        """Of lengths [B] on the CPU, descending and above zero."""
        B = lengths.size(0)
        steps = torch.arange(int(lengths[0]))
        sizes = B - torch.searchsorted(lengths.flip(0), steps, right=True)
        starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        t = steps.repeat_interleave(sizes)
        return cls(sizes, starts, t, torch.arange(len(t)) - starts[:-1].repeat_interleave(sizes))


class _Ordered:
    """Rows of unequal lengths, longest first. Those without a step are left out; their final state
    is the initial one."""

    def __init__(self, lengths: Tensor, device: torch.device) -> None:
        """``lengths`` [B] are on the CPU, not all of them 0."""
        ordered, order = lengths.sort(descending=True, stable=True)
        some = int((lengths > 0).sum())
        ordered, order = ordered[:some], order[:some]
        _, starts, self.t, row = Places.of_lengths(ordered)  # at each place of packed steps
        self.b = order[row]
        self.packed = Packed(ordered.to(device), starts.to(device))
        self.order = order.to(device)  # [B]: the number of each row in the user's batch

    def enter(self, state: Tensor) -> Tensor:
        """An initial state [L, B, R] in the order of packed rows."""
        return state.index_select(1, self.order)

    def leave(self, initial: Tensor, final: Tensor) -> Tensor:
        """The final state of all rows [L, B, R] from that of the packed ones."""
        return initial.index_copy(1, self.order, final)


class Rows(_Ordered):
    """Rows of padded data [T, B] of unequal lengths: the way to packed data and back."""

    def __init__(self, lengths: Tensor, T: int, device: torch.device) -> None:
        """``lengths`` [B] are on the CPU, from 0 to T, not all of them 0."""
        super().__init__(lengths, device)
        self.T, self.B = T, lengths.size(0)
        t, b, B = self.t, self.b, self.B
        self._places = (t * B + b).to(device)  # in [T, B]
        self._transposed = (b * T + t).to(device)  # in [B, T]

    def pack(self, t: Tensor) -> Tensor:
        """[T, B, ...] as [N, ...]."""
        if t.transpose(0, 1).is_contiguous():  # batch_first: no copy of all of it comes before
            return _pick(t.transpose(0, 1).flatten(0, 1), self._transposed)
        return _pick(t.flatten(0, 1), self._places)

    def unpack(self, t: Tensor) -> Tensor:
        """[N, ...] as [T, B, ...], with zeros for padding."""
        whole = _place(t, self._places, self.T * self.B)
        return whole.view(self.T, self.B, *t.shape[1:])

    padded = unpack


class Jagged(_Ordered):
    """Rows of jagged data [N], one after the other: the way to packed data and back."""

    def __init__(self, lengths: Tensor, device: torch.device) -> None:
        """``lengths`` [B] are on the CPU, not all of them 0."""
        super().__init__(lengths, device)
        self.B, self.T, self.N = lengths.size(0), int(lengths.max()), int(lengths.sum())
        begins = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        self._places = (begins[self.b] + self.t).to(device)  # in [N]
        row = torch.arange(self.B).repeat_interleave(lengths)
        self._padded = ((torch.arange(self.N) - begins[row]) * self.B + row).to(device)

    def pack(self, t: Tensor) -> Tensor:
        """[N, ...] of row after row as [N, ...] of step after step."""
        return _pick(t, self._places)

    def unpack(self, t: Tensor) -> Tensor:
        """The way back."""
        return _place(t, self._places, self.N)

    def pad(self, t: Tensor) -> Tensor:
        """[N, ...] of row after row as [T, B, ...], with zeros for padding."""
        whole = _place(t, self._padded, self.T * self.B)
        return whole.view(self.T, self.B, *t.shape[1:])

    def padded(self, t: Tensor) -> Tensor:
        """[N, ...] of step after step, the same."""
        return self.pad(self.unpack(t))

    def leave_padding(self, t: Tensor) -> Tensor:
        """The way back."""
        return _pick(t.flatten(0, 1), self._padded)


def known(lengths: Tensor) -> bool:
    """Whether the values are there to be looked at: no device is to be waited for, and no tracer
    or transform would take them for those of every call."""
    if torch.compiler.is_compiling():  # alone: compilers follow what else is asked here
        return False
    return (
        type(lengths) is Tensor
        and lengths.device.type == "cpu"
        and not is_batch(lengths)
        and not torch._C._get_tracing_state()
    )


class _Pick(torch.autograd.Function):
    """Rows of a tensor at places that all differ, whose gradient no two of them share."""

    @staticmethod
    def forward(rows: Tensor, places: Tensor) -> Tensor:
        return rows.index_select(0, places)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        rows, ctx.places = inputs
        ctx.count = rows.size(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _place(grad, ctx.places, ctx.count), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _pick(tangent, ctx.places)

    @staticmethod
    def vmap(info: Any, in_dims: Any, rows: Tensor, places: Tensor) -> tuple[Tensor, int]:
        return _pick(rows.movedim(in_dims[0], 1), places), 1


class _Place(torch.autograd.Function):
    """The other way round: zeros but for these rows."""

    @staticmethod
    def forward(values: Tensor, places: Tensor, count: int) -> Tensor:
        return values.new_zeros(count, *values.shape[1:]).index_copy_(0, places, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.places, ctx.count = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _pick(grad, ctx.places), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _place(tangent, ctx.places, ctx.count)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, values: Tensor, places: Tensor, count: int
    ) -> tuple[Tensor, int]:
        return _place(values.movedim(in_dims[0], 1), places, count), 1


def _pick(rows: Tensor, places: Tensor) -> Tensor:
    """rows [M, ...] at places [N]."""
    result: Tensor = _Pick.apply(rows, places)  # type: ignore[no-untyped-call]
    return result


def _place(values: Tensor, places: Tensor, count: int) -> Tensor:
    """values [N, ...] at places [N] of [count, ...]."""
    result: Tensor = _Place.apply(values, places, count)  # type: ignore[no-untyped-call]
    return result
