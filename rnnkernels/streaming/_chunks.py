"""Long sequences cut into chunks and laid out as parallel streams, for training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from rnnkernels._core import option_checks

S = TypeVar("S")
Tensors = tuple[Tensor, ...] | list[Tensor]


@overload
def chunks(input: Tensor, size: int, *, batch_first: bool = False) -> Iterator[Tensor]: ...
@overload
def chunks(
    input: Tensors, size: int, *, batch_first: bool = False
) -> Iterator[tuple[Tensor, ...]]: ...
def chunks(input: Any, size: int, *, batch_first: bool = False) -> Iterator[Any]:
    """Cuts one or several tensors along time into chunks of ``size`` steps, without copies.

    Args:
        input: ``[T, ...]`` (``[B, T, ...]`` with batch_first), or a tuple or list of several.
        size: steps per chunk; the last chunk has what is left.
        batch_first: whether time is the second dimension.

    Returns:
        An iterator over chunks, each a tensor or a tuple like ``input``; over none where T is 0.

    Raises:
        TypeError: ``input`` holds no tensors, ``size`` is no int.
        ValueError: ``size`` is below 1, a tensor has no dimension of time or another T.

    Example::

        for x, y in streaming.chunks((inputs, targets), 32, batch_first=True):
            ...  # x [B, 32, I], y [B, 32]
    """
    size, dim = (
        option_checks.size("size", size),
        int(option_checks.flag("batch_first", batch_first)),
    )
    if isinstance(input, Tensor):
        return (chunk for (chunk,) in chunks((input,), size, batch_first=batch_first))
    if not isinstance(input, (tuple, list)) or not input:
        got = "nothing in it" if isinstance(input, (tuple, list)) else type(input).__name__
        raise TypeError(f"input: expected a Tensor or a tuple of Tensors, got {got}")
    for i, t in enumerate(input):
        _check_tensor(f"input[{i}]", t, dim + 1)
        if t.size(dim) != input[0].size(dim):
            raise ValueError(
                f"input[{i}]: expected {input[0].size(dim)} steps like input[0], "
                f"got {t.size(dim)} in shape {list(t.shape)}"
            )
    if input[0].size(dim) == 0:
        return iter(())
    # One split per tensor: where x has a gradient, it is joined once, not added up per chunk.
    return zip(*(t.split(size, dim) for t in input), strict=True)


def detach(hx: S) -> S:
    """Returns a state without its history: the same values, but no gradient flows back from them.

    Args:
        hx: a tensor, None, or a tuple or list of such, however deep: the state of one layer or
            of several.

    Raises:
        TypeError: ``hx`` holds something else.
    """
    state: Any = hx
    if isinstance(state, Tensor):
        return state.detach()  # type: ignore[return-value]
    if state is None:
        return hx
    if not isinstance(state, (tuple, list)):
        raise TypeError(f"hx: expected Tensors in tuples or lists, got {type(state).__name__}")
    make: Any = getattr(state, "_make", type(state))  # a named tuple takes its parts one by one
    return make([detach(part) for part in state])  # type: ignore[no-any-return]


def starts(ids: Tensor, *, end: int | None = None, batch_first: bool = False) -> Tensor:
    """Marks the first step of every document, as the ``reset`` that layers take.

    Make it for the whole sequence and cut it along with it. The very first step counts as a start;
    to continue another sequence, put its last step in front and drop the first step of the result.

    Args:
        ids: integers ``[T]`` or ``[T, B]`` (``[B, T]`` with batch_first): the document that each
            step belongs to; or tokens, if ``end`` is given.
        end: the token that ends a document: the step after it starts the next.
        batch_first: whether time is the second dimension.

    Returns:
        bool, in the shape of ``ids``.

    Raises:
        TypeError: ``ids`` is no tensor of integers.
        ValueError: ``ids`` has a wrong number of dimensions.

    Example::

        streaming.starts(torch.tensor([5, 5, 8, 8, 8]))  # [True, False, True, False, False]
        streaming.starts(torch.tensor([4, 0, 7, 7, 6]), end=0)  # [True, False, True, False, False]
    """
    dim = int(option_checks.flag("batch_first", batch_first))
    _check_tensor("ids", ids, dim + 1, most=2)
    if ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"ids: expected an integer dtype, got {ids.dtype}")
    steps = ids.movedim(dim, 0)
    changes = steps[1:] != steps[:-1] if end is None else steps[:-1] == end
    first = torch.ones_like(steps[:1], dtype=torch.bool)
    return torch.cat([first, changes]).movedim(0, dim)


def batchify(tokens: Tensor, streams: int, *, batch_first: bool = False) -> Tensor:
    """Lays one long sequence out as parallel ones: row b reads on where row b - 1 ends.

    Args:
        tokens: ``[N, ...]``.
        streams: B, from 1 to N.
        batch_first: whether time is the second dimension of the result.

    Returns:
        ``[T, B, ...]`` (``[B, T, ...]`` with batch_first), contiguous; ``T = N // B``, and the
        ``N % B`` steps at the end are left out.

    Raises:
        TypeError: ``tokens`` is no tensor, ``streams`` no int.
        ValueError: ``streams`` is below 1 or above N.

    Example::

        streaming.batchify(torch.arange(7), 2)  # [[0, 3], [1, 4], [2, 5]]
    """
    streams, batch_first = (
        option_checks.size("streams", streams),
        option_checks.flag("batch_first", batch_first),
    )
    _check_tensor("tokens", tokens, 1)
    T = tokens.size(0) // streams
    if T == 0:
        raise ValueError(
            f"streams: expected at most {tokens.size(0)}, the steps of tokens, got {streams}"
        )
    rows = tokens[: T * streams].view(streams, T, *tokens.shape[1:])
    return (rows if batch_first else rows.transpose(0, 1)).contiguous()


def _check_tensor(name: str, t: Any, least: int, most: int | None = None) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    if t.dim() < least or (most is not None and t.dim() > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected {wanted} dimensions, got shape {list(t.shape)}")
