"""A layer as streams use it: chunks of unequal lengths and their states in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkernels._core import checks
from rnnkernels._core.packing import Places
from rnnkernels.cells import find
from rnnkernels.nn.base import RNNBase

State = Tensor | tuple[Tensor, ...]
#: A stream's state as it is kept: h [L, 1, R] and, of an LSTM, c [L, 1, H]; so are further states.
Kept = tuple[Tensor, ...]

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
        self._batch_dim = 0 if layer.batch_first else 1
        # What gradients alone ask for would take a longer way through the layer.
        longer = ("truncate", "grad_clip", "recompute")
        self._options: dict[str, Any] = dict.fromkeys(longer) if ours else {}

    def run(
        self, chunks: Sequence[Tensor], states: Sequence[Kept | None]
    ) -> tuple[Sequence[Tensor], list[Kept]]:
        """One call of the layer over chunks [T, I], longest first, none empty, each from its state:
        the y of each, and its state at the end.

        What comes out of several chunks is copied, so that who keeps something of one stream does
        not keep the memory of others. States are of the weights' dtype, whatever autocast made."""
        hx = self._join(states)
        dim, lengths = self._batch_dim, [chunk.size(0) for chunk in chunks]
        dtype = self.weight().dtype
        if len(chunks) == 1:
            y, last = self.layer(chunks[0].unsqueeze(dim), hx, **self._options)
            finals = last if self.others else [last]
            return [y.squeeze(dim)], [tuple(s.to(dtype) for s in finals)]
        if lengths[0] == lengths[-1]:
            y, last = self.layer(torch.stack(list(chunks), dim), hx, **self._options)
            ys = _torch.unbind_copy(y, dim)
        else:
            known = torch.tensor(lengths)
            places = Places.of_lengths(known)
            # From chunks one after another to steps one after another, and back.
            rows = (places.t + (known.cumsum(0) - known)[places.b]).to(chunks[0].device)
            data = torch.cat(list(chunks)).index_select(0, rows)
            y, last = self.layer(PackedSequence(data, places.sizes), hx, **self._options)
            ys = _torch.split_with_sizes_copy(
                torch.empty_like(y.data).index_copy_(0, rows, y.data), lengths
            )
        parts = [_torch.split_copy(s.to(dtype), 1, 1) for s in (last if self.others else [last])]
        return ys, list(zip(*parts, strict=True))

    def _join(self, states: Sequence[Kept | None]) -> State | None:
        """The states of several streams as the layer takes them: [L, B, R], [L, B, H]."""
        if all(s is None for s in states):
            return None
        zeros = self.zeros() if None in states else ()
        kept = [zeros if s is None else s for s in states]
        if len(kept) > 1:
            kept = [tuple(torch.cat(parts, 1) for parts in zip(*kept, strict=True))]
        return kept[0] if self.others else kept[0][0]

    def zeros(self) -> Kept:
        """The state that a stream starts from."""
        weight = self.weight()
        widths = (self._R, *[self.layer.hidden_size] * self.others)
        return tuple(weight.new_zeros(self.layer.num_layers, 1, width) for width in widths)

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

    def check_chunks(self, chunks: Iterable[Any], name: Callable[[int], str]) -> None:
        """Every chunk against the layer; ``name`` is what an error calls the one of a number."""
        weight, wanted = self.weight(), self.layer.input_size
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


def _refuse(name: str, what: str, wanted: object, got: object) -> NoReturn:
    raise ValueError(f"{name}: expected {what} {wanted} like the weights, got {got}")
