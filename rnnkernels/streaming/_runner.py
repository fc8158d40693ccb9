"""Streams that are served chunk by chunk: a layer, and the state that each stream is in."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from rnnkernels._core import option_checks
from rnnkernels.streaming._layer import ChunkedLayer, State
from rnnkernels.streaming._slots import Rows, Slot, Slots

K = TypeVar("K", bound=Hashable)

#: No stream's id, since nobody else has it.
_ALL: Final = object()


class StreamLimitError(RuntimeError):
    """One stream more than ``max_streams`` of a :class:`StreamRunner` was to be opened."""


class _Stream:
    """One stream; only the holder of ``lock`` reads or writes the rest, but ``id`` and ``number``,
    which stay."""

    __slots__ = ("closed", "id", "lock", "number", "opened", "slot")

    def __init__(self, stream_id: Hashable, number: int) -> None:
        self.id = stream_id
        self.number = number  # the order in which a batch takes locks
        self.lock = threading.Lock()
        self.slot: Slot | None = None  # of its state; none while that is zero
        self.opened = False  # by a call that succeeded
        self.closed = False


class StreamRunner:
    """Runs a layer over many streams in chunks, and keeps the state of each between its chunks.

    A stream is opened by the first call that names it, and starts from zeros. What comes out of its
    chunks is what the layer gives for all of them at once. No gradients: chunks run as under
    ``torch.no_grad()``. A call that raises leaves every state as it was, and opens nothing.

    T is the time of a chunk, I ``input_size``, H ``hidden_size``, L ``num_layers``, R the size of
    h: ``proj_size`` where it is not zero, else H.

    **Threads.** All methods may be called from any thread. Calls of different streams run at the
    same time; those of one stream, and of a batch that it is in, run one after another, in the
    order in which they get hold of it. ``close``, ``reset`` and ``state`` wait for the call that is
    running; a chunk that comes after ``close``, or waited behind it, opens the stream anew. On a
    GPU, calls of one stream belong on one CUDA stream, or the caller has them wait for each other.

    **Memory.** A slot for the state of each open stream; those of closed ones are used again, and
    nothing grows with the number of chunks. Slots come in segments, each as large as all before it
    and given up once its streams are closed. Streams that nobody closes stay: ``max_streams``
    bounds them.

    Args:
        layer: an RNN, LSTM or GRU of this package or of ``torch.nn``, of one direction, in eval
            mode. It is not copied: new values of its weights hold from the next call on. It stays
            on its device, and of its dtype, while streams are open.
        max_streams: how many streams may be open at once; any number if None.

    Raises:
        TypeError: ``layer`` is no such layer, ``max_streams`` no int.
        ValueError: ``layer`` is bidirectional or in training mode, ``max_streams`` is below 1.

    Example::

        runner = StreamRunner(rnnkernels.LSTM(10, 20).eval(), max_streams=100)
        y = runner("a", torch.randn(5, 10))  # [5, 20]
        y = runner("a", torch.randn(1, 10))  # [1, 20], the sixth step
        ys = runner.batch({"a": torch.randn(3, 10), "b": torch.randn(7, 10)})  # [3, 20], [7, 20]
        h, c = runner.state("b")  # [1, 20] each
        runner.close("a")
    """

    def __init__(self, layer: nn.RNNBase, *, max_streams: int | None = None) -> None:
        self._layer = ChunkedLayer(layer)
        self._limit = (
            None if max_streams is None else option_checks.size("max_streams", max_streams)
        )
        self._slots = Slots(layer.num_layers, self._layer.widths)
        self._streams: dict[Hashable, _Stream] = {}
        self._numbers = itertools.count()
        # For the table alone. Nobody waits for a stream while holding it.
        self._table = threading.Lock()

    def __len__(self) -> int:
        """How many streams are open."""
        return len(self._streams)

    def __contains__(self, stream_id: Hashable) -> bool:
        """Whether this stream is open."""
        return stream_id in self._streams

    def __iter__(self) -> Iterator[Hashable]:
        """The ids of the streams that are open now, oldest first."""
        with self._table:
            return iter(list(self._streams))

    def __call__(self, stream_id: Hashable, chunk: Tensor) -> Tensor:
        """Runs the next chunk of a stream.

        Args:
            stream_id: anything hashable; the stream is opened if it is not.
            chunk: ``[T, I]`` whatever ``batch_first`` says, T >= 0, of the dtype and on the device
                of the layer's weights (any floating dtype under autocast).

        Returns:
            y ``[T, R]``: the output of the last layer at every step.

        Raises:
            TypeError: ``stream_id`` is not hashable, ``chunk`` no tensor.
            ValueError: ``chunk`` has another shape, dtype or device; the layer is in training mode.
            StreamLimitError: this would be one stream more than ``max_streams``.
        """
        _check_id(stream_id)
        lengths = self._layer.lengths([chunk], lambda _: "chunk")
        with self._held([stream_id]) as streams:
            return self._advance(streams, [chunk], lengths)[0]

    def batch(self, chunks: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """Runs the next chunks of several streams in one call of the layer.

        Chunks of unequal lengths are packed: there is no work and no memory for padding. The
        numbers are those of one call per stream, the bits as docs/batch_invariance.md says.

        Args:
            chunks: a chunk ``[T, I]`` for each stream id, each of its own T >= 0, otherwise as in a
                call with one.

        Returns:
            y ``[T, R]`` for each id, in the order of ``chunks``, each in memory of its own.

        Raises:
            TypeError, ValueError, StreamLimitError: as a call with one; then no stream has moved.
        """
        if not isinstance(chunks, Mapping):
            raise TypeError(
                f"chunks: expected a mapping from ids to Tensors, got {type(chunks).__name__}"
            )
        given = dict(chunks)
        ids, values = list(given), list(given.values())
        lengths = self._layer.lengths(values, lambda i: f"chunks[{ids[i]!r}]")
        with self._held(ids) as streams:
            return dict(zip(ids, self._advance(streams, values, lengths), strict=True))

    def state(self, stream_id: Hashable) -> State:
        """A copy of the state after the last chunk, for :meth:`set_state` here or elsewhere.

        Returns:
            h ``[L, R]``; for an LSTM ``(h [L, R], c [L, H])``.

        Raises:
            KeyError: the stream is not open.
        """
        with self._existing(stream_id) as stream, torch.no_grad():
            kept = self._layer.zeros() if stream.slot is None else stream.slot.parts
            copies = [s.squeeze(1).clone() for s in kept]
        return tuple(copies) if self._layer.others else copies[0]

    def set_state(self, stream_id: Hashable, hx: State) -> None:
        """Sets the state that the next chunk starts from; opens the stream if it is not.

        Args:
            stream_id: anything hashable.
            hx: h ``[L, R]``; for an LSTM ``(h [L, R], c [L, H])``. Copied, without its history.

        Raises:
            TypeError: ``hx`` is no tensor, or no pair of tensors for an LSTM.
            ValueError: a tensor has another shape, or not the dtype and device of the weights.
            StreamLimitError: this would be one stream more than ``max_streams``.
        """
        _check_id(stream_id)
        states = self._layer.checked_state(hx)
        with self._held([stream_id]) as (stream,), torch.no_grad():
            self._seat([stream]).write(tuple(s.unsqueeze(1) for s in states))
            stream.opened = True

    def reset(self, stream_id: Hashable = _ALL) -> None:
        """Sets the state of a stream to zeros, or of one after another where none is named.

        Raises:
            KeyError: the stream is not open.
        """
        if stream_id is not _ALL:
            with self._existing(stream_id) as stream:
                self._forget(stream)
            return
        with self._table:
            streams = list(self._streams.values())
        for stream in streams:
            with stream.lock:
                self._forget(stream)

    def close(self, stream_id: Hashable) -> None:
        """Forgets a stream, once the call that is running on it has ended.

        Raises:
            KeyError: the stream is not open.
        """
        with self._existing(stream_id) as stream:
            self._drop(stream)

    def _advance(
        self, streams: Sequence[_Stream], chunks: list[Tensor], lengths: list[int]
    ) -> Sequence[Tensor]:
        """Runs chunks [T, I] from the states of their streams, and moves the states on at the end,
        when nothing can fail any more."""
        if lengths and lengths[0] and lengths.count(lengths[0]) == len(lengths):
            with torch.no_grad():
                ys = self._run(streams, chunks, lengths)
        else:
            ys = self._sorted(streams, chunks, lengths)
        for stream in streams:
            stream.opened = True
        return ys

    def _sorted(
        self, streams: Sequence[_Stream], chunks: list[Tensor], lengths: list[int]
    ) -> list[Tensor]:
        """The same of chunks of any lengths, in their order."""
        running = [i for i, length in enumerate(lengths) if length]
        running.sort(key=lengths.__getitem__, reverse=True)
        ys: dict[int, Tensor] = {}
        with torch.no_grad():
            for i, chunk in enumerate(chunks):
                if not lengths[i]:
                    ys[i] = self._layer.nothing(chunk)
            if running:
                found = self._run(
                    [streams[i] for i in running],
                    [chunks[i] for i in running],
                    [lengths[i] for i in running],
                )
                ys.update(zip(running, found, strict=True))
        return [ys[i] for i in range(len(chunks))]

    def _run(
        self, streams: Sequence[_Stream], chunks: list[Tensor], lengths: list[int]
    ) -> Sequence[Tensor]:
        """The same of chunks none of which is empty, longest first."""
        begun = any([stream.slot is not None for stream in streams])
        rows = self._seat(streams) if begun else None
        ys, finals = self._layer.run(chunks, lengths, rows.read() if rows else ())
        (rows or self._seat(streams, zeros=False)).write(finals)
        return ys

    def _seat(self, streams: Sequence[_Stream], *, zeros: bool = True) -> Rows:
        """The states of these streams, which get slots where they have none."""
        new = [stream for stream in streams if stream.slot is None]
        if new:
            taken = self._slots.take(len(new), self._layer.weight(), zeros=zeros)
            for stream, slot in zip(new, taken, strict=True):
                stream.slot = slot
        return Rows([stream.slot for stream in streams if stream.slot])

    def _forget(self, stream: _Stream) -> None:
        """Sets a state, whose lock the caller holds, to zeros."""
        if stream.slot is not None:
            self._slots.give_back(stream.slot)
            stream.slot = None

    # Who has which stream

    @contextmanager
    def _held(self, ids: Sequence[Hashable]) -> Iterator[list[_Stream]]:
        """The streams of these ids, opened where they are not, locked for the caller."""
        while True:
            streams = self._find_or_open(ids)
            taken: list[_Stream] = []
            try:
                for stream in sorted(streams, key=_number):
                    stream.lock.acquire()
                    taken.append(stream)
                if not any(s.closed for s in streams):  # while we waited for the locks
                    yield streams
                    return
            finally:
                for stream in taken:
                    if not (stream.opened or stream.closed):
                        # Nobody has used it yet. Others who wait for it find it closed, and open it
                        # again.
                        self._drop(stream)
                    stream.lock.release()

    def _find_or_open(self, ids: Sequence[Hashable]) -> list[_Stream]:
        """The streams in the table, after those that are missing have been added; all or none."""
        with self._table:
            new = [i for i in ids if i not in self._streams]
            if self._limit is not None and len(self._streams) + len(new) > self._limit:
                raise StreamLimitError(
                    f"max_streams: expected at most {self._limit} open streams, got "
                    f"{', '.join(map(repr, new))} beside {len(self._streams)}; close some first"
                )
            for i in new:
                self._streams[i] = _Stream(i, next(self._numbers))
            return [self._streams[i] for i in ids]

    @contextmanager
    def _existing(self, stream_id: Hashable) -> Iterator[_Stream]:
        """A stream that is open, locked for the caller."""
        while True:
            with self._table:
                stream = self._streams.get(stream_id)
            if stream is None:
                raise KeyError(f"stream_id: expected an open stream, got {stream_id!r}")
            with stream.lock:
                if not stream.closed:  # while we waited for the lock
                    yield stream
                    return

    def _drop(self, stream: _Stream) -> None:
        """Takes a stream, whose lock the caller holds, out of the table."""
        self._forget(stream)
        with self._table:
            stream.closed = True
            del self._streams[stream.id]


_number = attrgetter("number")


def _check_id(stream_id: object) -> None:
    try:
        hash(stream_id)
    except TypeError:
        raise TypeError(
            f"stream_id: expected something hashable, got {type(stream_id).__name__}"
        ) from None
