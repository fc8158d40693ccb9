"""Where the states of streams lie: in slots, side by side as the layer takes those of a batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from heapq import heappop, heappush

import torch
from torch import Tensor

#: States as the layer takes them: h [L, B, R] and, of an LSTM, c [L, B, H]; so are further states.
Kept = tuple[Tensor, ...]

#: Slots of the first segment.
_FIRST = 16


class _Segment:
    """Memory for the states of so many streams, which stays where it is: calls that run read and
    write their own slots of it whatever else is opened and closed."""

    __slots__ = ("free", "size", "states")

    def __init__(self, size: int, like: Tensor, layers: int, widths: Sequence[int]) -> None:
        self.size = size
        self.free = list(range(size))  # a heap: streams opened one after another are neighbours
        # Tensors of inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.states: Kept = tuple(like.new_empty(layers, size, width) for width in widths)


class Slot:
    """The place of one stream's state; only who holds the stream uses it."""

    __slots__ = ("_parts", "number", "segment", "shelf")

    def __init__(self, segment: _Segment, number: int, shelf: list[_Segment]) -> None:
        self.segment = segment
        self.number = number
        self.shelf = shelf  # the segments that this one is among
        self._parts: Kept | None = None

    @property
    def parts(self) -> Kept:
        """The state where it lies: h [L, 1, R] and others [L, 1, H]."""
        if self._parts is None:
            with torch.inference_mode(False), torch.no_grad():
                self._parts = tuple(s.narrow(1, self.number, 1) for s in self.segment.states)
        return self._parts


class Slots:
    """All slots of a runner, from any thread.

    There is memory for as many streams as were open at once: a new segment is as large as those
    that there are, and one whose streams are all gone is given up."""

    def __init__(self, layers: int, widths: Sequence[int]) -> None:
        self._layers, self._widths = layers, widths
        # By dtype and device, and by stream of the GPU: what the last call of a stream that was
        # closed still writes there comes before what the next owner of its slot does.
        self._shelves: dict[object, list[_Segment]] = {}
        self._lock = threading.Lock()

    def take(self, count: int, like: Tensor, *, zeros: bool) -> list[Slot]:
        """Slots for states of the dtype and on the device of ``like``, neighbours where there are
        such; with zeros in them or with anything."""
        queue = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
        with self._lock:
            shelf = self._shelves.setdefault((like.dtype, like.device, queue), [])
            if sum(len(segment.free) for segment in shelf) < count:
                size = max(_FIRST, count, sum(segment.size for segment in shelf))
                shelf.append(_Segment(size, like, self._layers, self._widths))
            whole = next((s for s in shelf if len(s.free) >= count), None)
            slots: list[Slot] = []
            for segment in [whole] if whole else shelf:
                for _ in range(min(count - len(slots), len(segment.free))):
                    slots.append(Slot(segment, heappop(segment.free), shelf))
        if zeros:
            for slot in slots:
                for part in slot.parts:
                    part.zero_()
        return slots

    def give_back(self, slot: Slot) -> None:
        """Leaves a slot to the next stream."""
        with self._lock:
            heappush(slot.segment.free, slot.number)
            if len(slot.segment.free) == slot.segment.size:
                slot.shelf.remove(slot.segment)

    def nbytes(self) -> int:
        """How much memory they have."""
        with self._lock:
            segments = [segment for shelf in self._shelves.values() for segment in shelf]
        return sum(s.nbytes for segment in segments for s in segment.states)


class _Part:
    """Rows of a batch whose slots are in one segment."""

    __slots__ = ("_index", "_states", "_views")

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._states = slots[0].segment.states
        self._index: Tensor | None = None
        self._views: Kept = ()
        numbers = [slot.number for slot in slots]
        first, count = numbers[0], len(numbers)
        if count == 1:
            self._views = slots[0].parts
        elif numbers == list(range(first, first + count)):
            self._views = tuple(s.narrow(1, first, count) for s in self._states)
        else:
            self._index = torch.tensor(numbers).to(self._states[0].device, non_blocking=True)

    def read(self) -> Kept:
        if self._index is None:
            return self._views
        return tuple(s.index_select(1, self._index) for s in self._states)

    def write(self, finals: Kept) -> None:
        if self._index is None:
            for view, final in zip(self._views, finals, strict=True):
                view.copy_(final)
        else:
            for state, final in zip(self._states, finals, strict=True):
                state.index_copy_(1, self._index, final.to(state.dtype))


class Rows:
    """The states of a batch, a row for each of these slots in order."""

    __slots__ = ("_back", "_order", "_parts", "_sizes")

    def __init__(self, slots: Sequence[Slot]) -> None:
        first = slots[0].segment
        self._order: Tensor | None = None  # of rows in parts, where there are several
        if len({id(slot.segment) for slot in slots}) == 1:
            self._parts = [_Part(slots)]
            return
        by_segment: dict[int, list[int]] = {}
        for row, slot in enumerate(slots):
            by_segment.setdefault(id(slot.segment), []).append(row)
        groups = list(by_segment.values())
        self._parts = [_Part([slots[row] for row in rows]) for rows in groups]
        self._sizes = [len(rows) for rows in groups]
        order = torch.tensor([row for rows in groups for row in rows])
        device = first.states[0].device
        self._order = order.to(device, non_blocking=True)
        self._back = order.argsort().to(device, non_blocking=True)

    def read(self) -> Kept:
        """h [L, B, R] and others [L, B, H]; they may be the slots themselves, to be read alone."""
        if self._order is None:
            return self._parts[0].read()
        parts = [part.read() for part in self._parts]
        return tuple(torch.cat(p, 1).index_select(1, self._back) for p in zip(*parts, strict=True))

    def write(self, finals: Kept) -> None:
        """Sets the states, of any floating dtype."""
        if self._order is None:
            return self._parts[0].write(finals)
        order = self._order
        split = [torch.split(s.index_select(1, order), self._sizes, 1) for s in finals]
        for part, own in zip(self._parts, zip(*split, strict=True), strict=True):
            part.write(own)
