"""The hand-off between blocks on weak memory, in every execution of a small model of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import vector_model
from hand_off_model import Program, Protocol, Scope, cluster, explore, upstream
from vector_model import Vectors

#: What can be left out of both, of a stage and the one before it, and of the cluster.
BOTH = {
    "no release": Protocol(release=Scope.NONE),
    "release for the block": Protocol(release=Scope.BLOCK),
    "no acquire": Protocol(acquire=Scope.NONE),
    "acquire for the block": Protocol(acquire=Scope.BLOCK),
    "no wait": Protocol(waits=False),
    "wait for the round before": Protocol(behind=1),
    "no barrier after the read": Protocol(after_read=False),
    "no barrier before the send": Protocol(before_send=False),
}
UPSTREAM = {
    "weak flag": Protocol(flag=Scope.NONE),
    "flag for the block": Protocol(flag=Scope.BLOCK),
    "no barrier after the wait": Protocol(after_wait=False),
    "copies not waited for": Protocol(copies_arrive=False),
}
CLUSTER = {
    "no barrier at the begin": Protocol(barrier_at_begin=False),
    "one buffer": Protocol(buffers=1),
}
PROGRAMS: dict[str, tuple[Callable[[Protocol], Program], dict[str, Protocol]]] = {
    "upstream": (upstream, BOTH | UPSTREAM),
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


#: A vector is used again in the last round, which may be an odd one or an even one: fences end the
#: odd rounds of the kernels, or in their place the even ones.
PHASES = (0, 1)
#: What can be left out of vectors that say by themselves whether they are there.
GRID: dict[str, Vectors] = {
    "no fence": Vectors(fence=Scope.NONE),
    "fence for the block": Vectors(fence=Scope.BLOCK),
    "fences of one thread": Vectors(fences=1),
    "a fence every third round": Vectors(every=3),
    "weak put": Vectors(put=Scope.NONE),
    "put for the block": Vectors(put=Scope.BLOCK),
    "weak look": Vectors(look=Scope.NONE),
    "look for the block": Vectors(look=Scope.BLOCK),
    "never emptied": Vectors(empties=False),
    "emptied a round earlier": Vectors(lag=3),
    "emptied a round later": Vectors(lag=5),
    "seven buffers": Vectors(buffers=7),
    "no barrier after the wait": Vectors(after_wait=False),
    "no barrier before the send": Vectors(before_send=False),
}


@pytest.mark.parametrize("first", PHASES)
def test_vectors_hand_on_what_was_put(first: int) -> None:
    outcome = vector_model.explore(*vector_model.grid(Vectors(first=first)))
    assert outcome.considered >= 1 << 16
    assert outcome.executions == 1
    assert outcome.wrong == 0


@pytest.mark.parametrize("mutant", GRID)
def test_each_part_is_needed_of_vectors(mutant: str) -> None:
    """In one of the phases, at least."""
    mutants = [replace(GRID[mutant], first=first) for first in PHASES]
    assert any(vector_model.explore(*vector_model.grid(each)).wrong for each in mutants)
