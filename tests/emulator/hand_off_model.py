"""All executions that a weak memory allows of how blocks hand each other the state of a round.

Two blocks of two threads take a few rounds, as csrc/cuda has them, on the memory
consistency model of the PTX ISA (its chapter of that name; formally in Lustig, Sahasrabuddhe and
Giroux, "A Formal Analysis of the NVIDIA PTX Memory Consistency Model", ASPLOS 2019). Of it there is
what the kernels use:

* Program order, barriers and synchronization make causality order. A release pattern (a fence and
  then a strong write, or a release) synchronizes with an acquire whose read observes that write, if
  both are morally strong: the scope of each includes the thread of the other. What is asynchronous
  (cp.async, st.async) comes after what its thread did before, and before what waits for it.
* A read may return any write to its location that it does not precede in causality order, unless a
  later write precedes the read. Nothing else orders weak accesses: a read may even see a write of
  the future.

An execution chooses, for each read, the write that it returns. Reads of flags are enumerated, since
what they observe decides on the order of everything else; reads of data do not, so that their
choices are independent of each other and their numbers multiply. What vectors say of themselves is
in vector_model.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from math import prod
from typing import Any

BLOCKS = THREADS = (0, 1)
ROUNDS = 3  # received; the third overwrites the buffer of the first, where there are two


class Scope(IntEnum):
    NONE = 0  # weak
    BLOCK = 1
    DEVICE = 2


@dataclass(frozen=True)
class Protocol:
    """What puts the hand-off in order; a mutant lacks one thing."""

    release: Scope = Scope.DEVICE  # of the fence before a flag, or of what counts a message
    flag: Scope = Scope.DEVICE  # of the store of a flag
    acquire: Scope = Scope.DEVICE  # of the load that waits
    waits: bool = True  # for messages and flags at all
    buffers: int = 2
    behind: int = 0  # rounds by which a wait is satisfied too early
    #: Barriers of the block: after the wait; after the copies, or the product; before it sends.
    after_wait: bool = True
    after_read: bool = True
    before_send: bool = True
    copies_arrive: bool = True  # is waited for
    barrier_at_begin: bool = True  # of the cluster


@dataclass
class Event:
    thread: tuple[int, int]  # block and thread
    writes: Any = None  # a location
    reads: Any = None
    value: int = 0  # of what is written: the round
    wanted: int = 0  # of what is read; of a flag at least
    scope: Scope = Scope.NONE


@dataclass
class Program:
    """Events and what orders them, whatever flags are observed."""

    events: list[Event] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)
    last: dict[tuple[int, int], int] = field(default_factory=dict)  # of each thread
    releases: dict[int, tuple[int, Scope]] = field(default_factory=dict)  # from where, by a flag
    mistakes: list[tuple[int, int]] = field(default_factory=list)  # the first has to precede

    def add(self, thread: tuple[int, int], *, asynchronous: bool = False, **what: Any) -> int:
        """An event after all that its thread did before; if it is asynchronous, nothing follows."""
        self.events.append(Event(thread, **what))
        event = len(self.events) - 1
        if thread in self.last:
            self.edges.append((self.last[thread], event))
        if not asynchronous:
            self.last[thread] = event
        return event

    def barrier(self, threads: Sequence[tuple[int, int]]) -> None:
        arrivals = [self.add(thread) for thread in threads]
        for thread in threads:
            leaves = self.add(thread)
            self.edges += [(arrival, leaves) for arrival in arrivals]


def threads_of(block: int) -> list[tuple[int, int]]:
    return [(block, thread) for thread in THREADS]


def upstream(p: Protocol) -> Program:
    """What a stage takes of the one before it, through global memory: results of their own place,
    and a flag that counts them (csrc/cuda/upstream.cuh)."""
    program = Program()
    first, second = (threads_of(block) for block in BLOCKS)
    for number in range(1, ROUNDS + 1):
        for thread in first:
            program.add(thread, writes=("results", number, thread[1]), value=number)
        if p.before_send:
            program.barrier(first)
        fence = program.add(first[0])
        store = program.add(first[0], writes=("flag",), value=number, scope=p.flag)
        program.releases[store] = fence, p.release
        if p.waits:
            at_least = max(number - p.behind, 0)
            program.add(second[0], reads=("flag",), wanted=at_least, scope=p.acquire)
        if p.after_wait:
            program.barrier(second)
        copies = []
        for thread in second:
            word = 1 - thread[1]
            place, landing = ("results", number, word), ("landing", word)
            read = program.add(thread, asynchronous=True, reads=place, wanted=number)
            written = program.add(thread, asynchronous=True, writes=landing, value=number)
            program.edges.append((read, written))
            copies.append((thread, written))
        for thread in second if p.copies_arrive else []:
            arrived = program.add(thread)
            program.edges += [(copy, arrived) for of, copy in copies if of == thread]
        if p.after_read:
            program.barrier(second)
        for thread, word in itertools.product(second, THREADS):
            program.add(thread, reads=("landing", word), wanted=number)
    return program


def cluster(p: Protocol) -> Program:
    """Into the shared memory of each other, where messages are counted.

    Which messages a phase counts does not depend on memory: it is over when all have arrived, so
    that who waits for it observes each.
    """
    program = Program()
    opened = {block: program.add((block, 0), writes=("count", block), value=1) for block in BLOCKS}
    if p.barrier_at_begin:
        program.barrier([thread for block in BLOCKS for thread in threads_of(block)])
    arrivals: dict[tuple[int, int], list[int]] = {}  # at a block, of a round
    waits: list[tuple[int, int, int]] = []
    for block in BLOCKS:
        members = threads_of(block)
        for number in range(ROUNDS + 1):
            if number > 0:
                for thread in members if p.waits else []:
                    waits.append((program.add(thread), block, max(number - p.behind, 0)))
                for thread, *word in itertools.product(members, BLOCKS, THREADS):
                    place = ("buffer", block, number % p.buffers, *word)
                    program.add(thread, reads=place, wanted=number)
                if p.after_read:
                    program.barrier(members)
            if number == ROUNDS:
                break
            for thread in members:
                program.add(thread, writes=("staging", *thread), value=number + 1)
            if p.before_send:
                program.barrier(members)
            for thread, to in itertools.product(members, BLOCKS):
                word = (block, 1 - thread[1])
                program.add(thread, reads=("staging", *word), wanted=number + 1)
                place = ("buffer", to, (number + 1) % p.buffers, *word)
                message = program.add(thread, asynchronous=True, writes=place, value=number + 1)
                program.mistakes.append((opened[to], message))
                arrivals.setdefault((to, number + 1), []).append(message)
    for wait, block, number in waits:
        for message in arrivals.get((block, number), []):
            if synchronizes(program, message, p.release, wait, p.acquire):
                program.edges.append((message, wait))
    return program


def morally_strong(scope: Scope, one: Event, other: Event) -> bool:
    return scope == Scope.DEVICE or (scope == Scope.BLOCK and one.thread[0] == other.thread[0])


def synchronizes(program: Program, x: int, release: Scope, y: int, acquire: Scope) -> bool:
    first, last = program.events[x], program.events[y]
    return morally_strong(release, first, last) and morally_strong(acquire, first, last)


def before(count: int, edges: Sequence[tuple[int, int]]) -> list[int] | None:
    """Of each event those that precede it, as bits; None where events precede themselves."""
    into: list[list[int]] = [[] for _ in range(count)]
    out: list[list[int]] = [[] for _ in range(count)]
    for a, b in edges:
        into[b].append(a)
        out[a].append(b)
    missing = [len(each) for each in into]
    ready = [event for event in range(count) if not missing[event]]
    precede = [0] * count
    for event in ready:
        for a in into[event]:
            precede[event] |= precede[a] | 1 << a
        for b in out[event]:
            missing[b] -= 1
            if not missing[b]:
                ready.append(b)
    return precede if len(ready) == count else None


def observed(program: Program) -> Iterator[dict[int, int]]:
    """For each read of a flag the write that it returns: no smaller than what is waited for, and no
    smaller than what its thread has read before."""
    events = program.events
    reads = [r for r, e in enumerate(events) if e.reads and e.reads[0] == "flag" and e.wanted]
    choices = [
        [
            w
            for w, e in enumerate(events)
            if e.writes == events[r].reads and e.value >= events[r].wanted
        ]
        for r in reads
    ]
    for chosen in itertools.product(*choices):
        of_thread: dict[Any, int] = {}
        for r, w in zip(reads, chosen, strict=True):
            if events[w].value < of_thread.get((events[r].thread, events[r].reads), 0):
                break
            of_thread[events[r].thread, events[r].reads] = events[w].value
        else:
            yield dict(zip(reads, chosen, strict=True))


@dataclass
class Outcome:
    considered: int = 0  # choices of what flags return
    executions: int = 0  # that the model allows
    wrong: int = 0  # of these, with a value of another round, or a message to what is not open


def explore(program: Program) -> Outcome:
    events, outcome = program.events, Outcome()
    writes: dict[Any, list[int]] = {}
    for w, event in enumerate(events):
        if event.writes:
            writes.setdefault(event.writes, []).append(w)
    reads = [r for r, event in enumerate(events) if event.reads and event.reads[0] != "flag"]
    for flags in observed(program):
        outcome.considered += 1
        edges = list(program.edges)
        for r, w in flags.items():
            fence, release = program.releases[w]
            strong = morally_strong(events[w].scope, events[w], events[r])
            if strong and synchronizes(program, fence, release, r, events[r].scope):
                edges.append((fence, r))
        precede = before(len(events), edges)
        if precede is None or any(precede[w] >> r & 1 for r, w in flags.items()):
            continue  # nothing reads what it precedes
        all_of, right_of = [], []
        for r in reads:
            seen = [
                w
                for w in writes[events[r].reads]
                if not precede[w] >> r & 1
                and not any(
                    precede[r] >> later & 1 and precede[later] >> w & 1
                    for later in writes[events[r].reads]
                )
            ]
            # Where no write precedes, what was there at first may be read as well.
            at_first = not any(precede[r] >> w & 1 for w in writes[events[r].reads])
            all_of.append(len(seen) + at_first)
            right_of.append(sum(events[w].value == events[r].wanted for w in seen))
        ordered = all(precede[b] >> a & 1 for a, b in program.mistakes)
        outcome.executions += prod(all_of)
        outcome.wrong += prod(all_of) - (prod(right_of) if ordered else 0)
    return outcome
