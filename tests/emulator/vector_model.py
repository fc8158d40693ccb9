"""All executions of how blocks hand on the state through global memory in vectors that say by
themselves whether they are there (csrc/cuda/exchange.cuh), on the memory model of
hand_off_model.py.

A thread looks at a vector until something is there; which write a look returns at last, is one that
puts something there, of any round. Looks put nothing in order by themselves: of what stands before
a fence, whoever puts a vector after it tells whoever passes a fence after finding it.

That leaves many choices, few of which can be. For every look there is a set of writes that it might
return, all at first. What holds whichever of its set each look returns, makes an order; that order
leaves fewer writes in the sets; and so on. Where every look has one write left, that is all
executions. Where not, those are looked for in which one look returns another write.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

from hand_off_model import (
    BLOCKS,
    THREADS,
    Outcome,
    Program,
    Scope,
    before,
    morally_strong,
    threads_of,
)


@dataclass(frozen=True)
class Vectors:
    """What puts this hand-off in order; a mutant lacks one thing."""

    buffers: int = 8
    every: int = 2  # rounds, of which the last ends with a fence
    first: int = 1  # that does
    lag: int = 4  # rounds after which a vector is emptied
    empties: bool = True
    fence: Scope = Scope.DEVICE
    fences: int = len(THREADS)  # threads that pass them
    put: Scope = Scope.DEVICE
    look: Scope = Scope.DEVICE
    #: Barriers of the block: before what was found is multiplied, and before it sends.
    after_wait: bool = True
    before_send: bool = True

    @property
    def rounds(self) -> int:
        """Received: the last uses a vector again."""
        return self.buffers + 1


@dataclass
class Looks:
    """Of a program, what fences have to do with its vectors."""

    fence_before: dict[int, int] = field(default_factory=dict)  # of what is put
    fence_after: dict[int, int] = field(default_factory=dict)  # of a look
    scope: Scope = Scope.DEVICE


def grid(p: Vectors) -> tuple[Program, Looks]:
    program, looks = Program(), Looks(scope=p.fence)
    settled: dict[tuple[int, int], int] = {}
    unsettled: dict[tuple[int, int], list[int]] = {}

    def vector(number: int, block: int, word: int) -> tuple[object, ...]:
        return ("vector", number % p.buffers, block, word)

    for block, number in itertools.product(BLOCKS, range(p.rounds + 1)):
        members = threads_of(block)
        if number > 0:
            for thread, source in itertools.product(members, BLOCKS):
                word = thread[1]
                place = vector(number, source, word)
                look = program.add(thread, reads=place, wanted=number, scope=p.look)
                unsettled.setdefault(thread, []).append(look)
                program.add(thread, writes=("landing", block, source, word), value=number)
            if p.after_wait:
                program.barrier(members)
            for thread, *place in itertools.product(members, BLOCKS, THREADS):
                program.add(thread, reads=("landing", block, *place), wanted=number)
        if number == p.rounds:
            continue
        for thread in members:
            program.add(thread, writes=("staging", *thread), value=number + 1)
        if p.before_send:
            program.barrier(members)
        for thread in members:
            word = 1 - thread[1]
            program.add(thread, reads=("staging", block, word), wanted=number + 1)
            to = vector(number + 1, block, word)
            sent = program.add(thread, writes=to, value=number + 1, scope=p.put)
            if thread in settled:
                looks.fence_before[sent] = settled[thread]
            if p.empties:
                program.add(thread, writes=vector(number - p.lag, block, word), scope=p.put)
        if number % p.every == p.first % p.every:
            for thread in members[: p.fences]:
                settled[thread] = program.add(thread)
                for look in unsettled.pop(thread, []):
                    looks.fence_after[look] = settled[thread]
    return program, looks


def order(program: Program, looks: Looks, found: Mapping[int, Iterable[int]]) -> list[int] | None:
    """What precedes each event, as bits, whichever of these writes each look returns; None where
    events precede themselves."""
    events, edges = program.events, list(program.edges)
    for look, writes in found.items():
        if look not in looks.fence_after:
            continue
        told = set()
        for write in writes:
            one, other = events[write], events[look]
            strong = all(
                morally_strong(scope, one, other) for scope in (one.scope, other.scope, looks.scope)
            )
            told.add(looks.fence_before.get(write, -1) if strong else -1)
        # Fences of one thread: who knows of a later one knows of those before.
        if told and (earliest := min(told)) >= 0:
            edges.append((earliest, looks.fence_after[look]))
    return before(len(events), edges)


def explore(program: Program, looks: Looks) -> Outcome:
    events, outcome = program.events, Outcome()
    writes: dict[object, list[int]] = {}
    for w, event in enumerate(events):
        if event.writes:
            writes.setdefault(event.writes, []).append(w)
    all_reads = [r for r, event in enumerate(events) if event.reads]
    of_vectors = [r for r in all_reads if events[r].reads[0] == "vector"]

    def possible(precede: list[int], r: int, w: int) -> bool:
        return not precede[w] >> r & 1 and not any(
            precede[r] >> later & 1 and precede[later] >> w & 1 for later in writes[events[r].reads]
        )

    def right(r: int) -> int:
        return next(w for w in writes[events[r].reads] if events[w].value == events[r].wanted)

    def kept(precede: list[int], r: int) -> bool:
        """Nothing takes the place of what is looked for before it is found."""
        wanted = right(r)
        return all(
            precede[x] >> r & 1 or precede[wanted] >> x & 1
            for x in writes[events[r].reads]
            if x != wanted
        )

    sets = {r: [w for w in writes[events[r].reads] if events[w].value] for r in of_vectors}
    outcome.considered = prod(map(len, sets.values()))
    while True:
        precede = order(program, looks, sets)
        assert precede is not None
        fewer = {r: [w for w in sets[r] if possible(precede, r, w)] for r in of_vectors}
        if fewer == sets:
            break
        sets = fewer
    wanted = {r: right(r) for r in of_vectors}
    executions = [wanted]
    executions += [wanted | {r: w} for r in of_vectors for w in sets[r] if w != wanted[r]]
    for found in executions:
        precede = order(program, looks, {r: [w] for r, w in found.items()})
        if precede is None or not all(possible(precede, r, w) for r, w in found.items()):
            continue
        all_of, right_of = [], []
        for r in all_reads:
            if r in found:
                continue
            seen = [w for w in writes[events[r].reads] if possible(precede, r, w)]
            at_first = not any(precede[r] >> w & 1 for w in writes[events[r].reads])
            all_of.append(len(seen) + at_first)
            right_of.append(sum(events[w].value == events[r].wanted for w in seen))
        outcome.executions += prod(all_of)
        as_wanted = found == wanted and all(kept(precede, r) for r in of_vectors)
        outcome.wrong += prod(all_of) - (prod(right_of) if as_wanted else 0)
    return outcome
