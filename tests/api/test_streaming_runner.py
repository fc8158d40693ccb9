"""Streams served in chunks, against the same layer over each whole stream."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnkernels as rk
from helpers import draw, require_backend, tensors
from rnnkernels.streaming import StreamLimitError, StreamRunner
from rnnkernels.testing import assert_close
from stream_cases import F64, GOOD, LAYERS, LENGTHS, H, I, L, make, streams, whole

pytestmark = pytest.mark.usefixtures("one_thread")


# Numbers


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_chunks_are_the_whole_stream(name: str, batch_first: bool) -> None:
    layer = make(name, batch_first=batch_first)
    runner = StreamRunner(layer)
    for i, chunks in streams().items():
        ys = [runner(i, chunk) for chunk in chunks]
        assert [len(y) for y in ys] == LENGTHS[i]
        assert_close([torch.cat(ys), runner.state(i)], whole(layer, chunks))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_batches_are_single_streams(name: str, batch_first: bool) -> None:
    """Of unequal lengths, of none, of equal ones; of streams that have begun and that have not."""
    layer = make(name, batch_first=batch_first)
    runner, everything = StreamRunner(layer), streams()
    ys: dict[Hashable, list[Tensor]] = {i: [] for i in everything}
    ys["a"].append(runner("a", everything["a"][0]))
    rounds = [{i: c[n] for i, c in everything.items() if n or i != "a"} for n in range(4)]
    rounds.insert(2, {i: c[:0] for i, c in rounds[0].items()})
    for chunks in rounds:
        found = runner.batch(chunks)
        assert list(found) == list(chunks)
        assert {i: len(y) for i, y in found.items()} == {i: len(c) for i, c in chunks.items()}
        for i, y in found.items():
            ys[i].append(y)
    for i, chunks in everything.items():
        assert_close([torch.cat(ys[i]), runner.state(i)], whole(layer, chunks))
    assert runner.batch({}) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "LSTM projected"])
def test_same_bits_in_any_batch(name: str, dtype: torch.dtype) -> None:
    require_backend("cpu")
    layer = make(name, dtype)
    together, alone = StreamRunner(layer), StreamRunner(layer)
    everything = streams(dtype)
    with rk.batch_invariant():
        for n in range(4):
            chunks = {i: c[n] for i, c in everything.items()}
            for i, y in together.batch(chunks).items():
                assert torch.equal(y, alone(i, chunks[i]))
                states = map(tensors, (together.state(i), alone.state(i)))
                assert all(map(torch.equal, *states))
        for i, c in everything.items():
            assert torch.equal(StreamRunner(layer)(i, torch.cat(c)), whole(layer, c)[0])


@pytest.mark.parametrize("name", ["LSTM", "LSTM truncated", "nn.GRU"])
def test_one_call_of_the_layer_without_padding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("rnnkernels.functional._stack.pad_packed_sequence")
    layer = make(name)
    calls: list[Any] = []
    layer.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    runner = StreamRunner(layer)
    runner.batch({i: torch.zeros(T, I, dtype=F64) for i, T in enumerate([1, 9, 0, 3])})
    runner.batch({i: torch.zeros(2, I, dtype=F64) for i in range(3)})
    runner.batch({i: torch.zeros(0, I, dtype=F64) for i in range(3)})
    packed, equal = calls
    assert packed.data.shape == (13, I) and packed.batch_sizes.tolist() == [3, 2, 2, *[1] * 6]
    assert equal.shape == (2, 3, I)


def test_new_weights_hold_from_the_next_call() -> None:
    layer, (first, *rest) = make(), streams()["b"][1:]
    runner = StreamRunner(layer)
    runner("b", first)
    hx = whole(layer, [first])[1]
    layer.load_state_dict({k: -v for k, v in layer.state_dict().items()})
    assert_close(torch.cat([runner("b", c) for c in rest]), whole(layer, rest, hx)[0])


def test_autocast_leaves_states_in_the_dtype_of_weights() -> None:
    layer, chunks = make(dtype=torch.float32), streams(torch.float32)
    runner = StreamRunner(layer)
    for n in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=n != 2):
            ys = runner.batch({i: c[n] for i, c in chunks.items()})
            ys["one"] = runner("one", chunks["a"][n])
        wanted = torch.float32 if n == 2 else torch.bfloat16
        assert {y.dtype for y in ys.values()} == {wanted}
        assert {s.dtype for i in runner for s in tensors(runner.state(i))} == {torch.float32}


# Gradients and memory


def test_nothing_has_a_gradient() -> None:
    layer = make()
    runner = StreamRunner(layer)
    x = draw(3, I, seed=1, dtype=F64).requires_grad_()
    ys = [runner("a", x), *runner.batch({"a": x, "b": x[:1]}).values(), runner("c", x[:0])]
    h, c = whole(layer, [x])[1]
    runner.set_state("d", (h.requires_grad_() * 2, c))
    states = [s for i in runner for s in tensors(runner.state(i))]
    assert not any(t.requires_grad or t.grad_fn for t in [*ys, *states])
    weight = torch.ones(H, requires_grad=True, dtype=F64)
    for y in ys[:3]:  # no tensors of inference mode, which autograd refuses
        (y * weight).sum().backward()
        y += weight.detach()


def test_in_and_out_of_inference_mode() -> None:
    layer, chunks = make(), streams()["a"]
    runner = StreamRunner(layer)
    ys = []
    for n, chunk in enumerate(chunks):
        with torch.inference_mode(n % 2 == 0):
            ys += [runner("a", chunk)]
            runner.batch({"a": chunk[:0], "b": chunk, "c": torch.cat([chunk, chunk])})
    assert_close(torch.cat(ys), whole(layer, chunks)[0])
    assert not any(s.is_inference() for s in tensors(runner.state("a")))


class Own(Tensor):
    """A subclass that changes nothing."""


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows apart": lambda x: x.repeat(1, 3)[:, I : 2 * I],
    "transposed": lambda x: x.t().contiguous().t(),
    "backwards": lambda x: x.flip(0).contiguous().flip(0),
    "one row": lambda x: x[:1].expand(len(x), I),
    "negated later": lambda x: torch._neg_view(-x),
    "a parameter": nn.Parameter,
    "a subclass": lambda x: x.as_subclass(Own),
}


@pytest.mark.parametrize("lengths", [(2, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("view", VIEWS)
def test_chunks_may_lie_anyhow(view: str, lengths: tuple[int, ...]) -> None:
    runner, plain = StreamRunner(make()), StreamRunner(make())
    chunks = {i: VIEWS[view](draw(T, I, seed=i, dtype=F64)) for i, T in enumerate(lengths)}
    ys = runner.batch(chunks)
    for i, chunk in chunks.items():
        copy = torch.tensor(chunk.tolist(), dtype=F64)
        assert_close(ys[i].as_subclass(Tensor), plain(i, copy))


# Opening, closing, moving


def test_streams_open_and_close() -> None:
    layer, x = make("GRU"), draw(2, I, seed=1, dtype=F64)
    runner = StreamRunner(layer)
    assert len(runner) == 0 and "a" not in runner
    first = runner("a", x)
    runner.batch({"b": x[:0], None: x})
    assert list(runner) == ["a", "b", None] and None in runner and len(runner) == 3
    assert not torch.equal(runner("a", x), first)
    runner.reset("a")
    assert torch.equal(runner("a", x), first)
    assert runner.state(None).any() and not runner.state("b").any()
    runner.reset(None)
    assert not runner.state(None).any() and runner.state("a").any()
    runner.reset()
    assert not runner.state("a").any() and len(runner) == 3
    runner("a", x)
    runner.close("a")
    assert "a" not in runner and len(runner) == 2
    assert torch.equal(runner("a", x), first)
    for method in (runner.close, runner.reset, runner.state):
        with pytest.raises(KeyError, match=r"stream_id: expected an open stream, got 'nobody'"):
            method("nobody")


def test_max_streams() -> None:
    x = torch.ones(1, I, dtype=F64)
    runner = StreamRunner(make(), max_streams=2)
    runner("a", x)
    state = runner.state("a")
    message = r"max_streams: expected at most 2 open streams, got 'b', 'c' beside 1; close some"
    with pytest.raises(StreamLimitError, match=message):
        runner.batch({"a": x, "b": x, "c": x})
    assert list(runner) == ["a"]
    assert_close(runner.state("a"), state, rtol=0.0)
    runner.set_state("b", state)
    for open_one in (lambda: runner("c", x), lambda: runner.set_state("c", state)):
        with pytest.raises(StreamLimitError, match=r"got 'c' beside 2"):
            open_one()
    runner.batch({"a": x, "b": x})
    runner.close("b")
    runner("c", x)
    assert list(runner) == ["a", "c"]


@pytest.mark.parametrize("name", ["RNN", "LSTM projected"])
def test_a_stream_moves_to_another_process(name: str) -> None:
    layer, chunks = make(name), streams()["a"]
    here, there = StreamRunner(layer), StreamRunner(layer)
    ys = [here("a", c) for c in chunks[:3]]
    there.set_state("moved", pickle.loads(pickle.dumps(here.state("a"))))
    ys.append(there("moved", chunks[3]))
    assert_close(torch.cat(ys), whole(layer, chunks)[0])
    there.set_state("moved", here.state("a"))
    assert torch.equal(there("moved", chunks[3]), ys[3])


# Errors

BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "type": ([1.0], TypeError, "{}: expected a Tensor, got list"),
    "one dimension": (GOOD[0], ValueError, r"{}: expected shape \[T, 4\], got \[4\]"),
    "a batch": (GOOD[None], ValueError, r"{}: expected shape \[T, 4\], got \[1, 2, 4\]"),
    "features": (GOOD[:, :3], ValueError, r"{}: expected shape \[T, 4\], got \[2, 3\]"),
    "empty": (GOOD[:0, :3], ValueError, r"{}: expected shape \[T, 4\], got \[0, 3\]"),
    "dtype": (GOOD.float(), ValueError, "{}: expected dtype torch.float64 like .*float32"),
    "device": (GOOD.to("meta"), ValueError, "{}: expected device cpu like the weights, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_chunks_change_nothing(case: str) -> None:
    chunk, error, message = BAD[case]
    runner = StreamRunner(make())
    runner.batch({"a": GOOD, "b": GOOD[:1]})
    before = [runner.state(i) for i in runner]
    for i in ("a", "new"):
        with pytest.raises(error, match="^" + message.format("chunk")):
            runner(i, chunk)
        with pytest.raises(error, match="^" + message.format(rf"chunks\['{i}'\]")):
            runner.batch({"b": GOOD, i: chunk, "other": GOOD})
    assert list(runner) == ["a", "b"]
    assert_close([runner.state(i) for i in runner], before, rtol=0.0)


def test_a_call_that_fails_inside_changes_nothing() -> None:
    layer = make()
    runner = StreamRunner(layer)
    runner.batch({"a": GOOD, "b": GOOD[:1]})
    before = [runner.state(i) for i in runner]

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory, say")

    hook = layer.register_forward_hook(fail)
    for chunks in ({"a": GOOD, "new": GOOD}, {"a": GOOD, "b": GOOD[:1], "new": GOOD[:0]}):
        with pytest.raises(RuntimeError, match="out of memory"):
            runner.batch(chunks)
    for i in ("a", "new"):
        with pytest.raises(RuntimeError, match="out of memory"):
            runner(i, GOOD)
    assert list(runner) == ["a", "b"]
    hook.remove()
    assert_close([runner.state(i) for i in runner], before, rtol=0.0)
    runner.batch({"a": GOOD, "b": GOOD, "new": GOOD})  # no lock is left behind


@pytest.mark.parametrize(
    ("name", "hx", "error", "message"),
    [
        ("LSTM", torch.zeros(L, H), TypeError, r"hx: expected a tuple of two tensors .* got Tens"),
        ("LSTM", [torch.zeros(L, H)], TypeError, r"hx: expected a tuple of two .* got 1 values"),
        ("GRU", None, TypeError, r"hx: expected a Tensor, got NoneType"),
        ("GRU", torch.zeros(L, 1, H), ValueError, r"hx: expected shape \[2, 6\], got \[2, 1, 6\]"),
        (
            "LSTM projected",
            (torch.zeros(L, 3, dtype=F64), torch.zeros(L, 3, dtype=F64)),
            ValueError,
            r"hx\[1\]: expected shape \[2, 6\], got \[2, 3\]",
        ),
        ("GRU", torch.zeros(L, H), ValueError, "hx: expected dtype torch.float64 .*float32"),
        ("GRU", torch.zeros(L, H, dtype=F64, device="meta"), ValueError, "hx: .* cpu .* meta"),
    ],
)
def test_bad_states_change_nothing(
    name: str, hx: Any, error: type[Exception], message: str
) -> None:
    runner = StreamRunner(make(name))
    runner("a", GOOD)
    before = runner.state("a")
    for i in ("a", "new"):
        with pytest.raises(error, match=message):
            runner.set_state(i, hx)
    assert list(runner) == ["a"]
    assert_close(runner.state("a"), before, rtol=0.0)


def test_bad_ids_and_mappings() -> None:
    runner = StreamRunner(make())
    message = "stream_id: expected something hashable, got list"
    with pytest.raises(TypeError, match=message):
        runner([], GOOD)
    with pytest.raises(TypeError, match=message):
        runner.set_state([], runner)
    with pytest.raises(TypeError, match="chunks: expected a mapping from ids to Tensors, got Tens"):
        runner.batch(GOOD)
    assert len(runner) == 0


@pytest.mark.parametrize(
    ("layer", "options", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, TypeError, "layer: expected an RNN, LSTM or GRU .* Linear"),
        (lambda: rk.LSTMCell(2, 2), {}, TypeError, "layer: .* LSTMCell"),
        (lambda: rk.GRU(2, 2), {}, ValueError, "layer: expected eval mode, got training mode"),
        (
            lambda: nn.GRU(2, 2, bidirectional=True).eval(),
            {},
            ValueError,
            "layer: expected one direction, got bidirectional=True: .* end of a stream",
        ),
        (make, {"max_streams": 0}, ValueError, "max_streams must be greater than zero"),
        (make, {"max_streams": 1.5}, TypeError, "max_streams should be of type int"),
    ],
)
def test_bad_runners_are_refused(
    layer: Callable[[], Any], options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        StreamRunner(layer(), **options)


def test_training_mode_is_refused_later_too() -> None:
    layer = make(dropout=0.5)
    runner = StreamRunner(layer)
    runner("a", GOOD)
    before = runner.state("a")
    layer.train()
    for run in (lambda: runner("a", GOOD), lambda: runner.batch({"a": GOOD, "b": GOOD})):
        with pytest.raises(ValueError, match="layer: expected eval mode"):
            run()
    layer.eval()
    assert list(runner) == ["a"]
    assert_close(runner.state("a"), before, rtol=0.0)
