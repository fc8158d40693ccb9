"""Where a runner keeps the states of its streams: in slots, side by side, in memory that is used
again, and that nobody else holds."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from helpers import draw, tensors
from rnnkernels.streaming import StreamRunner
from rnnkernels.testing import assert_close
from stream_cases import F64, GOOD, H, I, L, make, streams, whole

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("layers", [1, L])
@pytest.mark.parametrize("name", ["LSTM", "nn.GRU"])
def test_outputs_and_states_share_no_memory(name: str, layers: int) -> None:
    """What a caller does with results, or keeps of them, reaches no other stream and no state."""
    layer = make(name, layers=layers)
    runner, untouched = StreamRunner(layer), StreamRunner(layer)
    for n in range(4):
        chunks = {i: c[n] for i, c in streams().items()}
        ys = runner.batch(chunks)
        for y in [*ys.values(), *(s for i in runner for s in tensors(runner.state(i)))]:
            assert y.untyped_storage().nbytes() == y.numel() * y.element_size()
            y.fill_(9)
        one = runner("one", torch.ones(1, I, dtype=F64)).fill_(9)
        wanted = untouched.batch(chunks)
        untouched("one", torch.ones(1, I, dtype=F64))
    hx = runner.state("a")
    runner.set_state("copy", hx)
    for s in tensors(hx):
        s.fill_(9)
    assert one.shape == (1, H) and list(wanted) == list(ys)
    for i in untouched:
        assert_close(runner.state(i), untouched.state(i), rtol=0.0)
    assert_close(runner.state("copy"), untouched.state("a"), rtol=0.0)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTM projected", "nn.LSTM projected"])
def test_memory_does_not_grow(name: str) -> None:
    """Neither what states take nor the number of tensors that are alive, however many chunks."""
    runner, everything = StreamRunner(make(name)), streams()

    def alive() -> int:
        gc.collect()
        return sum(type(o) is Tensor for o in gc.get_objects())

    def rounds(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            for n in range(4):
                runner.batch({i: c[n] for i, c in everything.items()})
                runner("a", everything["a"][n])
                runner("gone", everything["a"][n])
            runner.close("gone")
        return runner._slots.nbytes(), alive()

    first = rounds(1)
    R = 3 if "projected" in name else H
    assert first[0] == 16 * L * (R + (H if "LSTM" in name else 0)) * 8  # slots of one segment
    assert rounds(10) == first


def test_slots_are_used_again_and_given_up() -> None:
    runner = StreamRunner(make("GRU"))
    slot = L * H * 8
    for i in range(100):
        runner(i, GOOD)
        runner.close(i)
        assert runner._slots.nbytes() == 0
    for i in range(40):
        runner(i, GOOD)
    assert runner._slots.nbytes() == (16 + 16 + 32) * slot
    runner.batch({i: GOOD for i in range(40, 140)})
    assert runner._slots.nbytes() == (16 + 16 + 32 + 100) * slot
    for i in range(16, 140):
        runner.reset(i) if i % 2 else runner.close(i)
    assert runner._slots.nbytes() == 16 * slot
    runner.batch({i: GOOD for i in range(140, 155)})
    assert runner._slots.nbytes() == 32 * slot


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "nn.GRU"])
def test_batches_over_slots_of_others(name: str, batch_first: bool) -> None:
    """Neighbours or not, of several segments, new ones beside those that have begun, in slots that
    others have left: every stream is as it is alone."""
    layer = make(name, layers=1, batch_first=batch_first)
    runner, given = StreamRunner(layer), dict[int, list[Tensor]]()
    ys: dict[int, list[Tensor]] = {}

    def run(ids: Iterable[int], longest: int) -> None:
        lengths = {i: 1 + i % longest for i in ids}
        chunks = {i: draw(T, I, seed=len(given.get(i, ())), dtype=F64) for i, T in lengths.items()}
        for i, y in runner.batch(chunks).items():
            given.setdefault(i, []).append(chunks[i])
            ys.setdefault(i, []).append(y)

    def close(ids: Iterable[int]) -> None:
        for i in ids:
            runner.close(i)
            del given[i], ys[i]

    for ids, longest in ((range(16), 1), (range(16, 30), 3), (range(60), 2)):
        run(ids, longest)
    run(range(3, 9), 1)
    run([50, 2, 17, 16, 3], 1)
    close(range(1, 60, 3))
    run([5, 1, 20, 34, 40, 70, 71], 2)
    run(range(100, 110), 1)
    close([70, 1])
    run([0, 200, 2], 1)
    for i, chunks in given.items():
        assert_close([torch.cat(ys[i]), runner.state(i)], whole(layer, chunks))


def test_streams_opened_inside_a_call_leave_its_slots_alone() -> None:
    layer, (first, *rest) = make(), streams()["b"][1:]
    runner = StreamRunner(layer)
    runner("b", first)
    grows = iter([True])

    def grow(*_: object) -> None:
        if next(grows, False):
            runner.batch({i: GOOD for i in range(100)})

    layer.register_forward_pre_hook(grow)
    ys = [runner("b", chunk) for chunk in rest]
    layer._forward_pre_hooks.clear()
    assert len(runner) == 101
    assert_close(torch.cat(ys), whole(layer, [first, *rest])[0][len(first) :])


def test_the_dtype_may_change_where_states_are_zero() -> None:
    layer = make("GRU")
    runner = StreamRunner(layer)
    runner.batch({"a": GOOD, "stays": GOOD})
    runner.reset("a")
    layer.float()
    assert_close(runner("a", GOOD.float()), whole(layer, [GOOD.float()])[0])
    assert tensors(runner.state("a"))[0].dtype == torch.float32
