"""Chunks of many streams as one batch and back: join_chunks, part_steps, chunk_lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rnnkernels import _ops

pytestmark = pytest.mark.skipif(_ops.missing is not None, reason="the compiled part is missing")

CHUNKS = [torch.arange(6.0).view(3, 2), 10 + torch.arange(4.0).view(2, 2), torch.tensor([[8.0, 9]])]
STEPS = torch.tensor([[0, 1], [10, 11], [8, 9], [2, 3], [12, 13], [4.0, 5]])


def test_there_and_back() -> None:
    joined = _ops.join_chunks(CHUNKS)
    assert joined is not None
    data, sizes = joined
    assert torch.equal(data, STEPS) and sizes.tolist() == [3, 2, 1] and sizes.dtype == torch.int64
    parts = _ops.part_steps(STEPS.repeat(1, 2)[:, 1:3].flip(1), [3, 2, 1])
    assert parts is not None and all(map(torch.equal, parts, CHUNKS))
    assert len({p.untyped_storage().data_ptr() for p in parts}) == 3
    assert [list(p.shape) for p in _ops.part_steps(STEPS[:, :0], [4, 2]) or ()] == [[4, 0], [2, 0]]
    assert _ops.chunk_lengths(CHUNKS, 2, STEPS) == [3, 2, 1]


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        CHUNKS[::-1],
        [CHUNKS[0], CHUNKS[1][:0]],
        [CHUNKS[0], CHUNKS[1].double()],
        [CHUNKS[0], CHUNKS[1][:, :1]],
        [CHUNKS[0][0]],
        [CHUNKS[0].t()],
        [CHUNKS[0], None],
        [CHUNKS[0].to("meta")],
        [CHUNKS[0].to_sparse()],
    ],
)
def test_unusual_chunks_are_left_to_torch(chunks: Any) -> None:
    assert _ops.join_chunks(chunks) is None


@pytest.mark.parametrize(
    "lengths", [[], [3, 2], [3, 2, 2], [1, 2, 3], [6, 0], [7, -1], [1 << 62, 1 << 62, 6]]
)
def test_lengths_that_are_not_those_of_the_steps(lengths: list[int]) -> None:
    assert _ops.part_steps(STEPS, lengths) is None


@pytest.mark.parametrize(
    "chunk", [None, STEPS.double(), STEPS[0], STEPS[:, :1], STEPS.to("meta"), STEPS.to_sparse()]
)
def test_chunks_that_the_layer_does_not_take(chunk: Any) -> None:
    assert _ops.chunk_lengths([STEPS, chunk], 2, STEPS) is None


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="chunk_lengths: expected a list of chunks"):
        _ops.chunk_lengths(STEPS, 2, STEPS)
    with pytest.raises(TypeError, match="join_chunks: expected a list of chunks"):
        _ops.join_chunks(tuple(CHUNKS))
    with pytest.raises(TypeError, match="part_steps: expected steps and a list of lengths"):
        _ops.part_steps(STEPS, (3, 2, 1))
    with pytest.raises(TypeError, match="int"):
        _ops.part_steps(STEPS, [3, 2, "1"])
    assert _ops.part_steps(STEPS[0], [2]) is None
