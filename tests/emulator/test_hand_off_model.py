"""The hand-off between blocks on weak memory, in every execution of a small model of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hand_off_model import Program, Protocol, Scope, cluster, explore, grid

#: What can be left out of both, of the grid, and of the cluster.
BOTH = {
    "no release": Protocol(release=Scope.NONE),
    "release for the block": Protocol(release=Scope.BLOCK),
    "no acquire": Protocol(acquire=Scope.NONE),
    "acquire for the block": Protocol(acquire=Scope.BLOCK),
    "no wait": Protocol(waits=False),
    "wait for the round before": Protocol(behind=1),
    "one buffer": Protocol(buffers=1),
    "no barrier after the read": Protocol(after_read=False),
    "no barrier before the send": Protocol(before_send=False),
}
GRID = {
    "weak flag": Protocol(flag=Scope.NONE),
    "flag for the block": Protocol(flag=Scope.BLOCK),
    "no barrier after the wait": Protocol(after_wait=False),
    "copies not waited for": Protocol(copies_arrive=False),
}
CLUSTER = {"no barrier at the begin": Protocol(barrier_at_begin=False)}
PROGRAMS: dict[str, tuple[Callable[[Protocol], Program], dict[str, Protocol]]] = {
    "grid": (grid, BOTH | GRID),
    "cluster": (cluster, BOTH | CLUSTER),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_execution_hands_on_what_was_sent(name: str) -> None:
    outcome = explore(PROGRAMS[name][0](Protocol()))
    assert outcome.executions > 0
    assert outcome.wrong == 0


@pytest.mark.parametrize(
    ("name", "mutant"), [(name, mutant) for name in PROGRAMS for mutant in PROGRAMS[name][1]]
)
def test_each_part_is_needed(name: str, mutant: str) -> None:
    make, mutants = PROGRAMS[name]
    assert explore(make(mutants[mutant])).wrong > 0
