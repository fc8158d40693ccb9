"""When calls on the CPU give up their threads: the rule alone, on times that are made up here."""

from __future__ import annotations

from typing import NamedTuple

import pytest

_C = pytest.importorskip("rnnkernels._C", reason="needs the compiled extension")

MS = 1_000_000  # nanoseconds


class Contention(NamedTuple):
    gained: int = 0
    pause: int = 0
    until: int = 0

    def after(self, took: float, waited: float, now: float, threads: int = 2) -> Contention:
        """The state after a call; times in milliseconds."""
        times = int(took * MS), int(waited * MS)
        return Contention(*_C.contention_after(tuple(self), *times, threads, int(now * MS)))

    def after_loss(self, now: float) -> Contention:
        """One thread would have taken 0.2 ms."""
        return self.after(1, 0.9, now)


@pytest.mark.parametrize(
    ("wanted", "at_work", "cores", "granted"),
    [
        (4, 0, 8, 4),
        (8, 0, 2, 8),  # alone, a call takes what it was told to
        (4, 5, 8, 3),
        (4, 2, 8, 4),
        (4, 8, 8, 1),  # never none
        (4, 20, 8, 1),
        (1, 3, 8, 1),
    ],
)
def test_threads_granted(wanted: int, at_work: int, cores: int, granted: int) -> None:
    assert _C.threads_granted(wanted, at_work, cores) == granted


def test_gains_are_added_up_to_a_bound() -> None:
    state = Contention().after(1, 0.25, now=100)  # in one thread 1.5 ms
    assert state == Contention(gained=MS // 2)
    assert state.after(1, 0, now=102, threads=4) == Contention(gained=MS // 2 + 3 * MS)
    for now in range(100):
        state = state.after(2, 0.5, now=110 + now)
    assert state == Contention(gained=20 * MS)


def test_losses_are_taken_from_what_was_gained() -> None:
    state = Contention(gained=MS)
    state = state.after_loss(now=100)
    assert state == Contention(gained=MS // 5)
    assert state.after_loss(now=101) == Contention(0, 20 * MS, 121 * MS)


def test_pauses_double_while_threads_keep_losing() -> None:
    state, now = Contention(), 1000.0
    for pause in (20, 40, 80, 160, 160, 160):
        state = state.after_loss(now)
        assert state == Contention(0, pause * MS, int((now + pause) * MS))
        now += pause + 1


@pytest.mark.parametrize(("later", "pause"), [(79, 160), (80, 20)])
def test_soon_is_as_long_as_the_last_pause(later: float, pause: int) -> None:
    state = Contention(0, 80 * MS, 500 * MS).after_loss(500 + later)
    assert state.pause == pause * MS


def test_a_call_that_ends_in_a_pause_says_nothing() -> None:
    state = Contention(3 * MS, 40 * MS, 500 * MS)
    assert state.after_loss(499) == state
    assert state.after(1, 0, 499) == state
    assert state.after_loss(500) != state


def test_long_calls_say_nothing() -> None:
    """They last many time slices, of which several threads get more than one does."""
    assert Contention().after(60, 54.9, now=100) == Contention()
    assert Contention().after(60, 55, now=100).pause == 20 * MS
