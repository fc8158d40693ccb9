"""The helpers for training loops over chunks, against the same layer over the whole sequence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnkernels as rk
from helpers import compare, draw, tensors
from rnnkernels import AllStates, streaming

F64 = torch.float64
T, B, I, H = 11, 3, 4, 5
LAYERS = (rk.RNN, rk.LSTM, rk.GRU)


pytestmark = pytest.mark.usefixtures("one_thread")


def make(layer: type[nn.Module], *batch: int, **options: Any) -> tuple[nn.Module, Tensor, Any]:
    """A layer of two, an input [T, *batch, I] and a state, all leaves."""
    module = layer(I, H, num_layers=2, dtype=F64, **options)
    shape = (*batch, T) if options.get("batch_first") and batch else (T, *batch)
    x = draw(*shape, I, seed=1, dtype=F64).requires_grad_()
    states = [draw(2, *batch, H, seed=2 + i, dtype=F64).requires_grad_() for i in range(2)]
    return module, x, tuple(states) if layer is rk.LSTM else states[0]


def results(
    module: nn.Module, x: Tensor, hx: Any, run: Callable[..., tuple[Tensor, Any]]
) -> dict[str, Tensor | None]:
    """y, the last state and all gradients of ``run(module, x, hx)``, which runs backward too."""
    leaves = [x, *tensors(hx), *module.parameters()]
    for t in leaves:
        t.grad = None
    y, last = run(module, x, hx)
    found = {f"output {i}": t.detach() for i, t in enumerate((y, *tensors(last)))}
    return found | {f"gradient {i}": t.grad for i, t in enumerate(leaves)}


def by_chunks(size: int, batch_first: bool = False) -> Callable[..., tuple[Tensor, Any]]:
    """The loop that this module is for, with the gradients of all chunks added up."""

    def run(module: nn.Module, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        dim = int(batch_first)
        dy = draw(*x.shape[:-1], H, seed=9, dtype=F64)
        ys = []
        for part, d in streaming.chunks((x, dy), size, batch_first=batch_first):
            y, hx = module(part, hx)
            y.backward(d)
            ys.append(y)
            hx = streaming.detach(hx)
        return torch.cat(ys, dim), hx

    return run


def at_once(size: int) -> Callable[..., tuple[Tensor, Any]]:
    def run(module: nn.Module, x: Tensor, hx: Any) -> tuple[Tensor, Any]:
        y, last = module(x, hx, truncate=size)
        y.backward(draw(*y.shape, seed=9, dtype=F64))
        return y, last

    return run


# Chunks and detached states together


@pytest.mark.parametrize("size", [1, 4, T, T + 1])  # 4 leaves 3 steps over
@pytest.mark.parametrize("layer", LAYERS)
def test_the_loop_is_truncation(layer: type[nn.Module], size: int) -> None:
    case = make(layer, B)
    compare(results(*case, by_chunks(size)), results(*case, at_once(size)))


@pytest.mark.parametrize(("batch", "batch_first"), [((B,), True), ((), False)])
def test_the_loop_in_other_layouts(batch: tuple[int, ...], batch_first: bool) -> None:
    case = make(rk.LSTM, *batch, batch_first=batch_first)
    compare(results(*case, by_chunks(4, batch_first)), results(*case, at_once(4)))


def test_one_step_at_the_end_learns_the_same() -> None:
    case = make(rk.GRU, B)
    weights = []
    for run in (by_chunks(4), at_once(4)):
        module = copy.deepcopy(case[0])
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        run(module, *case[1:])
        optimizer.step()
        weights.append(nn.utils.parameters_to_vector(module.parameters()))
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-13)
    before = nn.utils.parameters_to_vector(case[0].parameters())
    assert not torch.allclose(weights[0], before)


def test_documents_in_streams_are_documents_alone() -> None:
    """Two streams of documents of lengths that chunks of 4 cut anywhere, two borders included."""
    lengths = [[3, 1, 4, 3], [8, 3]]
    ids = torch.tensor([[d for d, n in enumerate(row) for _ in range(n)] for row in lengths]).t()
    module, x, _ = make(rk.LSTM, 2)
    ys = []
    hx = None
    for part, reset in streaming.chunks((x, streaming.starts(ids)), 4):
        y, hx = module(part, hx, reset=reset)
        ys.append(y)
        hx = streaming.detach(hx)
    joined = torch.cat(ys)
    for b, row in enumerate(lengths):
        alone = [module(piece)[0] for piece in x[:, b].split(row)]
        torch.testing.assert_close(joined[:, b], torch.cat(alone), rtol=1e-12, atol=1e-13)


# Chunks


def test_chunks_of_several_tensors() -> None:
    x, y = torch.randn(7, 2, 3), torch.arange(14).view(7, 2)
    parts = list(streaming.chunks((x, y), 3))
    assert [(len(a), len(b)) for a, b in parts] == [(3, 3), (3, 3), (1, 1)]
    assert torch.equal(torch.cat([a for a, _ in parts]), x)
    assert torch.equal(torch.cat([b for _, b in parts]), y)
    assert parts[1][0].data_ptr() == x[3].data_ptr()  # no copies


def test_chunks_of_one_tensor() -> None:
    x = torch.arange(10).view(2, 5)
    parts = list(streaming.chunks(x, 2, batch_first=True))
    assert [p.tolist() for p in parts] == [[[0, 1], [5, 6]], [[2, 3], [7, 8]], [[4], [9]]]


def test_an_empty_sequence_has_no_chunks() -> None:
    assert list(streaming.chunks(torch.zeros(0, 2, 3), 4)) == []
    empty = torch.zeros(2, 0, 3), torch.zeros(2, 0)
    assert list(streaming.chunks(empty, 4, batch_first=True)) == []


@pytest.mark.parametrize(
    ("input", "size", "options", "error", "message"),
    [
        (3, 2, {}, TypeError, r"input: expected a Tensor or a tuple of Tensors, got int"),
        ((), 2, {}, TypeError, r"input: .* got nothing in it"),
        ([torch.zeros(2), None], 2, {}, TypeError, r"input\[1\]: .* got NoneType"),
        (torch.zeros(2), 0, {}, ValueError, r"size must be greater than zero"),
        (torch.zeros(2), 2.0, {}, TypeError, r"size should be of type int, got: float"),
        (torch.zeros(2), 2, {"batch_first": 1}, TypeError, r"batch_first should be of type bool"),
        (torch.zeros(2), 2, {"batch_first": True}, ValueError, r"input\[0\]: .* 2 dim.* \[2\]"),
        (torch.tensor(1.0), 2, {}, ValueError, r"input\[0\]: expected at least 1 dimensions"),
        ((torch.zeros(5, 2), torch.zeros(4, 2)), 2, {}, ValueError, r"input\[1\]: expected 5 .* 4"),
    ],
)
def test_bad_chunks_are_refused_at_once(
    input: Any, size: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        streaming.chunks(input, size, **options)  # not only when it is iterated over


# States


def test_detach_keeps_form_and_values() -> None:
    h, c = torch.randn(2, 3, requires_grad=True) * 2, torch.randn(2, 3)
    state = {"tensor": h, "pair": (h, c), "stack": [(h, c), None, h], "none": None}
    for hx in state.values():
        got = streaming.detach(hx)
        assert type(got) is type(hx)
        assert not any(t.requires_grad for t in tensors(got))
        assert all(map(torch.equal, tensors(got), tensors(hx)))
    named = streaming.detach(AllStates((h,), (c,)))
    assert isinstance(named, AllStates) and not named.h[0].requires_grad
    assert len(streaming.detach([(h, c), None, h])) == 3
    with pytest.raises(TypeError, match="hx: expected Tensors in tuples or lists, got dict"):
        streaming.detach((h, {"c": c}))


# Documents


def test_starts_of_documents() -> None:
    ids = torch.tensor([[1, 4], [1, 5], [2, 5], [1, 5]])
    expected = [[True, True], [False, True], [True, False], [True, False]]
    assert streaming.starts(ids).tolist() == expected
    rows = streaming.starts(ids.t(), batch_first=True)
    assert rows.t().tolist() == expected and rows.dtype == torch.bool
    assert streaming.starts(ids[:, 0]).tolist() == [row[0] for row in expected]
    later = streaming.starts(torch.cat([ids[1:2], ids[2:]]))[1:]
    assert later.tolist() == expected[2:]


def test_starts_after_end_tokens() -> None:
    tokens = torch.tensor([[0, 7], [5, 0], [0, 0], [5, 8]])
    expected = [[True, True], [True, False], [False, True], [True, True]]
    assert streaming.starts(tokens, end=0).tolist() == expected
    assert streaming.starts(tokens.t(), end=0, batch_first=True).t().tolist() == expected


def test_starts_of_nothing() -> None:
    assert streaming.starts(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)
    empty = torch.zeros(3, 0, dtype=torch.int64)
    assert streaming.starts(empty, batch_first=True).shape == (3, 0)


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        ([1, 2], {}, TypeError, "ids: expected a Tensor, got list"),
        (torch.zeros(3), {}, TypeError, "ids: expected an integer dtype, got torch.float32"),
        (torch.tensor(3), {}, ValueError, r"ids: expected 1 to 2 dimensions, got shape \[\]"),
        (torch.ones(3, 2, 1).int(), {}, ValueError, r"ids: .* \[3, 2, 1\]"),
        (torch.ones(3).int(), {"batch_first": True}, ValueError, r"ids: expected 2 to 2 .* \[3\]"),
        (torch.ones(3).int(), {"batch_first": None}, TypeError, "batch_first should be of type"),
    ],
)
def test_bad_ids_are_refused(ids: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        streaming.starts(ids, **options)


# Streams


def test_batchify() -> None:
    tokens = torch.arange(7)
    columns = streaming.batchify(tokens, 2)
    assert columns.tolist() == [[0, 3], [1, 4], [2, 5]] and columns.is_contiguous()
    assert streaming.batchify(tokens, 2, batch_first=True).tolist() == [[0, 1, 2], [3, 4, 5]]
    features = torch.randn(7, 2, 3)
    assert torch.equal(streaming.batchify(features, 3)[1, 2], features[5])
    assert streaming.batchify(tokens[::2], 4).tolist() == [[0, 2, 4, 6]]


@pytest.mark.parametrize(
    ("tokens", "streams", "error", "message"),
    [
        ("text", 2, TypeError, "tokens: expected a Tensor, got str"),
        (torch.tensor(5), 2, ValueError, "tokens: expected at least 1 dimensions"),
        (torch.arange(3), 4, ValueError, "streams: expected at most 3, the steps of tokens, got 4"),
        (torch.arange(3), 0, ValueError, "streams must be greater than zero"),
        (torch.arange(3), True, TypeError, "streams should be of type int, got: bool"),
    ],
)
def test_bad_streams_are_refused(
    tokens: Any, streams: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        streaming.batchify(tokens, streams)
