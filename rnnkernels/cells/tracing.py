"""What a user's function of gates and states computes: it is called once, with symbols."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from rnnkernels.cells.graph import Graph, Node, below, leaves
from rnnkernels.cells.noise import Bernoulli
from rnnkernels.cells.parameters import TAKEN, PerUnit, per_unit
from rnnkernels.cells.symbols import Gate, Symbol, Symbolic, Trace, Value

#: Of gates the kernels have room for so many (``kMaxColumns`` in csrc/cpu/panels.h); the values of
#: all states are in registers.
MOST_GATES, MOST_STATES = 8, 8


@dataclass(frozen=True)
class Traced:
    """What a function computes: the next states, in terms of gates and states."""

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    params: dict[str, PerUnit]
    noise: dict[str, float]
    next: list[Node]
    graph: Graph
    split: int  # A: gates from the first one on whose parts are used apart
    recurrent: bool  # whether any hidden part is used


def trace(function: Callable[..., Any]) -> Traced:
    """Calls a function of gates and states once, with symbols.

    Raises:
        TypeError, ValueError: it cannot be a cell; with file and line, and what to do.
    """
    if not isinstance(function, FunctionType) or function.__name__ == "<lambda>":
        raise TypeError(
            "rnnkernels.cell: expected a function that is defined with def, got "
            f"{function!r}. Write def mgu(f, n, *, h): ..."
        )
    run = Trace(function.__name__, function.__code__)
    gates, states, params, noise = _signature(function, run)
    symbols = [Gate(run, i, name) for i, name in enumerate(gates)]
    before = (*states, *params, *noise)
    prev = {name: Value(run, run.graph.leaf("prev", i)) for i, name in enumerate(before)}
    try:
        result = function(*symbols, **prev)
    except Exception as error:
        error.add_note(f"rnnkernels.cell called {run.name} once, with symbols in place of numbers")
        raise
    next = _results(run, result, states)
    nodes = below(next)
    used = {(leaf.op, int(leaf.value)) for leaf in leaves(nodes, "gx", "gh", "prev")}
    for i, name in enumerate(gates):
        if not {("gx", i), ("gh", i)} & used:
            raise run.at_definition(
                f"gate {name}: expected every gate to be used, got one that no next state depends "
                "on. Leave it out of the signature"
            )
    for i, name in enumerate(states[1:], 1):
        if ("prev", i) not in used:
            raise run.at_definition(
                f"state {name}: expected every state but the first, which the hidden parts of "
                f"gates are made of, to be used, got one that nothing depends on. Leave it out"
            )
    for i, name in enumerate((*params, *noise), len(states)):
        if ("prev", i) not in used:
            what = "parameter" if name in params else "noise"
            raise run.at_definition(
                f"{what} {name}: expected every {what} to be used, got one that nothing depends "
                "on. Leave it out"
            )
    recurrent = any(op == "gh" for op, _ in used)
    split = _split(run.graph, nodes, next, gates) if recurrent else 0
    return Traced(run.name, gates, states, params, noise, next, run.graph, split, recurrent)


def _signature(
    function: FunctionType, run: Trace
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, PerUnit], dict[str, float]]:
    wanted = "gates by position and states by keyword, as in def mgu(f, n, *, h)"
    gates: list[str] = []
    states: list[str] = []
    params: dict[str, PerUnit] = {}
    noise: dict[str, float] = {}
    for p in inspect.signature(function).parameters.values():
        default = PerUnit() if p.default is per_unit else p.default
        if p.kind is p.KEYWORD_ONLY and isinstance(default, Bernoulli):
            noise[p.name] = default.p
            continue
        if p.kind is p.KEYWORD_ONLY and isinstance(default, PerUnit):
            if p.name in TAKEN:
                raise run.at_definition(
                    f"parameter {p.name}: expected another name than those of a layer's weights, "
                    f"got weight_{p.name}. Rename it"
                )
            params[p.name] = default
            continue
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.default is not p.empty:
            raise run.at_definition(
                f"parameter {p}: expected {wanted}, without defaults, *args and **kwargs. A "
                "parameter of each unit is a keyword with rnnkernels.per_unit as its default, "
                "noise one with rnnkernels.bernoulli(p)"
            )
        if params:
            raise run.at_definition(
                f"state {p.name}: expected states in front of parameters, got one behind "
                f"{next(reversed(params))}. Move it to the front"
            )
        (states if p.kind is p.KEYWORD_ONLY else gates).append(p.name)
    if not 1 <= len(gates) <= MOST_GATES:
        raise run.at_definition(
            f"expected {wanted}, 1 to {MOST_GATES} gates, got {len(gates)}: the kernels have room "
            f"for at most {MOST_GATES} gates of a unit"
        )
    if not 1 <= len(states) <= MOST_STATES:
        raise run.at_definition(
            f"expected {wanted}, 1 to {MOST_STATES} states, got {len(states)}: h, which W_hh is "
            "multiplied by and which is the output, and beside it others, as the c of an LSTM"
        )
    return tuple(gates), tuple(states), params, noise


def _results(run: Trace, result: Any, states: tuple[str, ...]) -> list[Node]:
    found = list(result) if isinstance(result, (tuple, list)) else [result]
    wanted = ", ".join(f"the next {name}" for name in states)
    if len(found) != len(states):
        raise run.at_definition(
            f"return: expected {len(states)} values, {wanted}, in the order of the signature, got "
            f"{len(found)}"
        )
    nodes = []
    for name, value in zip(states, found, strict=True):
        if not isinstance(value, Symbol):
            got = repr(value) if isinstance(value, Symbolic) else type(value).__name__
            raise run.at_definition(
                f"return: expected {wanted}, made of gates and states, got {got} as {name}"
            )
        node = run.node(value, "return")
        if node.is_constant:
            raise run.at_definition(
                f"return: expected {wanted}, made of gates and states, got the constant "
                f"{node.value} as {name}"
            )
        nodes.append(node)
    return nodes


def _split(graph: Graph, nodes: list[Node], next: list[Node], gates: tuple[str, ...]) -> int:
    """How many of the last gates have parts that are used apart, or follow one that has."""
    sums = {graph.make("add", graph.leaf("gx", i), graph.leaf("gh", i)).index: i
            for i in range(len(gates))}  # fmt: skip
    apart = {int(n.value) for n in next if n.op in ("gx", "gh")}
    for node in nodes:
        if node.index not in sums:
            apart |= {int(a.value) for a in node.args if a.op in ("gx", "gh")}
    return len(gates) - min(apart) if apart else 0
