"""A layer as streams use it: chunks of unequal lengths and their states in and out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkernels import _ops
from rnnkernels._core import checks
from rnnkernels._core.packing import Places
from rnnkernels.cells import find
from rnnkernels.nn.base import RNNBase
from rnnkernels.streaming._slots import Kept

State = Tensor | tuple[Tensor, ...]

#: Whose annotations say that functions which return copies of parts return nothing.
_torch: Any = torch


class ChunkedLayer:
    """A layer of one direction in eval mode, and the checks of what it is given."""

    def __init__(self, layer: nn.RNNBase) -> None:
        if not isinstance(layer, (RNNBase, nn.RNN, nn.LSTM, nn.GRU)):
            raise TypeError(
                "layer: expected an RNN, LSTM or GRU of rnnkernels or torch.nn, "
                f"got {type(layer).__name__}"
            )
        if layer.bidirectional:
            raise ValueError(
                "layer: expected one direction, got bidirectional=True: a reverse direction starts "
                "at the end of a stream, which is not there while its chunks still come"
            )
        self.layer = layer
        self.weight()  # its check
        ours = isinstance(layer, RNNBase)
        #: States beside h, of the size of the layer.
        self.others = find(str(layer.cell)).C if ours else int(layer.mode == "LSTM")
        self._R = layer.proj_size or layer.hidden_size
        #: Sizes of h and of the other states.
        self.widths = (self._R, *[layer.hidden_size] * self.others)
        self._batch_dim = 0 if layer.batch_first else 1
        # What gradients alone ask for would take a longer way through the layer.
        longer = ("truncate", "grad_clip", "recompute")
        self._options: dict[str, Any] = dict.fromkeys(longer) if ours else {}

    def run(
        self, chunks: list[Tensor], lengths: list[int], states: Kept
    ) -> tuple[Sequence[Tensor], Kept]:
        """One call of the layer over chunks [T, I] of these lengths, longest first, none empty,
        from the states of all, or from zeros where there are none: the y of each, and the states at
        the end, of any dtype.

        What comes out of several chunks is copied, so that who keeps something of one stream does
        not keep the memory of others."""
        hx = (states if self.others else states[0]) if states else None
        dim = self._batch_dim
        input = chunks[0].unsqueeze(dim) if len(chunks) == 1 else self._join(chunks, lengths)
        y, last = self.layer(input, hx, **self._options)
        ys = [y.squeeze(dim)] if len(chunks) == 1 else self._part(y, lengths)
        return ys, tuple(last) if self.others else (last,)

    def _join(self, chunks: list[Tensor], lengths: list[int]) -> Tensor | PackedSequence:
        """Several chunks as the layer takes them."""
        equal = lengths[0] == lengths[-1]
        joined = None if _ops.missing else _ops.join_chunks(chunks)
        if joined is not None:
            data, sizes = joined
            if not equal:
                return PackedSequence(data, sizes)
            steps = data.view(lengths[0], len(lengths), data.size(1))
            return steps if self._batch_dim else steps.transpose(0, 1)
        if equal:
            return torch.stack(chunks, self._batch_dim)
        sizes, rows = _steps(lengths)
        data = torch.cat(chunks)
        return PackedSequence(data.index_select(0, rows.to(data.device)), sizes)

    def _part(self, y: Tensor | PackedSequence, lengths: list[int]) -> Sequence[Tensor]:
        """What came of several chunks, for each in memory of its own."""
        if isinstance(y, Tensor):
            steps = (y if self._batch_dim else y.transpose(0, 1)).flatten(0, 1)
        else:
            steps = y.data
        parts = None if _ops.missing else _ops.part_steps(steps, lengths)
        if parts is not None:
            return parts
        if isinstance(y, Tensor):
            copies: Sequence[Tensor] = _torch.unbind_copy(y, self._batch_dim)
            return copies
        rows = _steps(lengths)[1].to(steps.device)
        whole = torch.empty_like(steps).index_copy_(0, rows, steps)
        copies = _torch.split_with_sizes_copy(whole, lengths)
        return copies

    def zeros(self) -> Kept:
        """The state that a stream starts from."""
        weight = self.weight()
        return tuple(weight.new_zeros(self.layer.num_layers, 1, width) for width in self.widths)

    def nothing(self, chunk: Tensor) -> Tensor:
        """The output [0, R] of an empty chunk; not every layer takes one."""
        casts = checks.autocast(chunk.device) and chunk.dtype != torch.float64
        dtype = torch.get_autocast_dtype(chunk.device.type) if casts else chunk.dtype
        return chunk.new_empty(0, self._R, dtype=dtype)

    def weight(self) -> Tensor:
        """A weight as an example of the layer's dtype and device; refuses training mode."""
        if self.layer.training:
            raise ValueError(
                "layer: expected eval mode, got training mode, which drops outputs between layers; "
                "call layer.eval()"
            )
        weight: Any = self.layer.weight_ih_l0
        return weight  # type: ignore[no-any-return]

    def lengths(self, chunks: list[Any], name: Callable[[int], str]) -> list[int]:
        """How long chunks are, each checked against the layer; ``name`` is what an error calls the
        one of a number."""
        weight, wanted = self.weight(), self.layer.input_size
        found = None if _ops.missing else _ops.chunk_lengths(chunks, wanted, weight)
        if found is not None:
            return found
        dtype, device = weight.dtype, weight.device
        for i, chunk in enumerate(chunks):
            if not isinstance(chunk, Tensor):
                raise TypeError(f"{name(i)}: expected a Tensor, got {type(chunk).__name__}")
            if chunk.dim() != 2 or chunk.size(1) != wanted:
                raise ValueError(
                    f"{name(i)}: expected shape [T, {wanted}], got {list(chunk.shape)}"
                )
            if chunk.dtype != dtype and not (
                chunk.is_floating_point() and checks.autocast(chunk.device)
            ):
                _refuse(name(i), "dtype", dtype, chunk.dtype)
            if chunk.device != device:
                _refuse(name(i), "device", device, chunk.device)
        return [chunk.size(0) for chunk in chunks]

    def checked_state(self, hx: Any) -> list[Tensor]:
        """A state as users give it, as a list: h [L, R] and others [L, H]."""
        names, states = ["hx"], [hx]
        if self.others:
            n = 1 + self.others
            if not isinstance(hx, (tuple, list)) or len(hx) != n:
                got = f"{len(hx)} values" if isinstance(hx, (tuple, list)) else type(hx).__name__
                tensors = "two tensors (h, c)" if n == 2 else f"{n} tensors"
                raise TypeError(f"hx: expected a tuple of {tensors}, got {got}")
            names, states = [f"hx[{i}]" for i in range(n)], list(hx)
        for name, s, zero in zip(names, states, self.zeros(), strict=True):
            if not isinstance(s, Tensor):
                raise TypeError(f"{name}: expected a Tensor, got {type(s).__name__}")
            wanted = [zero.size(0), zero.size(2)]
            if list(s.shape) != wanted:
                raise ValueError(f"{name}: expected shape {wanted}, got {list(s.shape)}")
            if s.dtype != zero.dtype:
                _refuse(name, "dtype", zero.dtype, s.dtype)
            if s.device != zero.device:
                _refuse(name, "device", zero.device, s.device)
        return states


def _steps(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Of chunks of these lengths, longest first: the batch sizes of their steps [T], and from
    chunks one after another to steps one after another, [N]."""
    known = torch.tensor(lengths)
    places = Places.of_lengths(known)
    return places.sizes, places.t + (known.cumsum(0) - known)[places.b]


def _refuse(name: str, what: str, wanted: object, got: object) -> NoReturn:
    raise ValueError(f"{name}: expected {what} {wanted} like the weights, got {got}")
