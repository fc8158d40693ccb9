"""Threads around streams that are served in chunks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import draw
from rnnkernels.streaming import StreamRunner
from rnnkernels.testing import assert_close
from stream_cases import F64, GOOD, I, make, whole


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Threads of Python take turns at every chance, those of the kernels stay away."""
    before = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-6)
    yield
    torch.set_num_threads(before[0])
    sys.setswitchinterval(before[1])


def run_threads(*targets: Callable[[], object]) -> None:
    """Runs all at once; the first error of a thread is raised here."""
    errors: list[BaseException] = []

    def run(target: Callable[[], object]) -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[t], daemon=True) for t in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def test_two_streams_are_in_the_layer_at_once() -> None:
    layer = make()
    runner, both = StreamRunner(layer), threading.Barrier(2)

    def meet(*_: object) -> None:
        both.wait(10)

    layer.register_forward_pre_hook(meet)
    run_threads(
        lambda: runner("a", GOOD),
        lambda: runner.batch({"b": GOOD, "c": GOOD[:1]}),
    )
    assert len(runner) == 3


def test_one_stream_is_in_the_layer_once() -> None:
    """Equal chunks from many threads: the state is that of as many, one after another."""
    layer, x = make(), draw(1, I, seed=3, dtype=F64)
    runner = StreamRunner(layer)
    inside, most = [0], [0]

    def enter(*_: object) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        threading.Event().wait(0)  # lets others go on

    def leave(*_: object) -> None:
        inside[0] -= 1

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave)

    def feed() -> None:
        for n in range(10):
            if n % 2:
                runner("a", x)
            else:
                runner.batch({"a": x})

    run_threads(*[feed] * 4)
    assert most == [1]
    assert_close(runner.state("a"), whole(layer, [x] * 40)[1])


def test_batches_in_opposite_orders() -> None:
    """Threads that want the same streams in every order neither hang nor mix anything up."""
    layer, x = make("GRU"), draw(1, I, seed=3, dtype=F64)
    runner, ids = StreamRunner(layer), list(range(4))
    runner.batch({i: x for i in ids})

    def feed(order: list[int]) -> None:
        for _ in range(40):
            runner.batch({i: x for i in order})

    run_threads(lambda: feed(ids), lambda: feed(ids[::-1]), lambda: feed([2, 0, 3, 1]))
    wanted = whole(layer, [x] * 121)[1]
    for i in ids:
        assert_close(runner.state(i), wanted)


class Told:
    """A lock that tells when somebody is about to wait for it."""

    def __init__(self, lock: Any) -> None:
        self._lock, self.waiting = lock, threading.Semaphore(0)

    def acquire(self) -> bool:
        if self._lock.acquire(blocking=False):
            return True
        self.waiting.release()
        return bool(self._lock.acquire())

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def told(runner: StreamRunner, stream_id: Hashable) -> Told:
    lock = Told(runner._streams[stream_id].lock)
    runner._streams[stream_id].lock = lock  # type: ignore[assignment]
    return lock


def test_closing_waits_for_the_running_call() -> None:
    layer = make("GRU")
    runner = StreamRunner(layer)
    runner("a", GOOD)
    lock = told(runner, "a")
    inside, go = threading.Event(), threading.Event()
    order: list[object] = []

    def stay(*_: object) -> None:
        inside.set()
        assert go.wait(30)
        order.append("ran")

    def close() -> None:
        assert inside.wait(30)
        runner.close("a")
        order.append("closed")

    def let_go() -> None:
        assert lock.waiting.acquire(timeout=10)
        order.append("a" in runner)
        go.set()

    layer.register_forward_hook(stay)
    ys: list[Tensor] = []
    run_threads(lambda: ys.append(runner("a", GOOD)), close, let_go)
    assert order == [True, "ran", "closed"] and "a" not in runner
    assert_close(ys[0], whole(make("GRU"), [GOOD, GOOD])[0][2:])


def close_before(runner: StreamRunner, method: Callable[[], object]) -> None:
    """Closes stream ``a`` while another thread, in ``method``, already waits for it."""
    lock, taken = told(runner, "a"), threading.Event()

    def close() -> None:
        with runner._existing("a") as stream:  # as close() does, once the other one waits
            taken.set()
            assert lock.waiting.acquire(timeout=10)
            runner._drop(stream)

    def wait() -> None:
        assert taken.wait(30)
        method()

    run_threads(close, wait)


def test_chunks_that_waited_while_a_stream_was_closed_begin_it_anew() -> None:
    runner = StreamRunner(make("GRU"))
    first, state = runner("a", GOOD), runner.state("a")
    ys: list[Tensor] = []
    close_before(runner, lambda: ys.append(runner("a", GOOD)))
    assert_close([ys[0], runner.state("a")], [first, state])
    chunks = {"b": GOOD, "a": GOOD, "c": GOOD[:1]}
    close_before(runner, lambda: ys.append(runner.batch(chunks)["a"]))
    assert_close([ys[1], runner.state("a")], [first, state])
    assert set(runner) == {"a", "b", "c"}
    close_before(runner, lambda: runner.set_state("a", state))
    assert_close(runner.state("a"), state, rtol=0.0)


@pytest.mark.parametrize("name", ["close", "reset", "state"])
def test_what_waited_while_a_stream_was_closed_finds_none(name: str) -> None:
    runner = StreamRunner(make("GRU"))
    runner("a", GOOD)

    def nobody() -> None:
        with pytest.raises(KeyError):
            getattr(runner, name)("a")

    close_before(runner, nobody)
    assert "a" not in runner


def test_a_failed_opening_leaves_the_stream_to_who_waits() -> None:
    layer = make("GRU")
    runner = StreamRunner(layer, max_streams=1)
    inside, go, calls = threading.Event(), threading.Event(), []

    def fail_first(*_: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            inside.set()
            assert go.wait(30)
            raise RuntimeError("once")

    def fail() -> None:
        with pytest.raises(RuntimeError, match="once"):
            runner("a", GOOD)

    def follow() -> None:
        assert inside.wait(30)
        lock = told(runner, "a")
        run_threads(lambda: runner("a", GOOD), lambda: release(lock))

    def release(lock: Told) -> None:
        assert lock.waiting.acquire(timeout=10)
        go.set()

    layer.register_forward_pre_hook(fail_first)
    run_threads(fail, follow)
    assert list(runner) == ["a"]
    assert_close(runner.state("a"), whole(make("GRU"), [GOOD])[1])
