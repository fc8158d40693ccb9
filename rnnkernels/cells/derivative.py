"""Derivatives of a cell's expressions, in both modes, and what its forward saves for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rnnkernels.cells.cut import smallest_cut
from rnnkernels.cells.graph import CHOICES, POWER, Graph, Node, below, leaves

Maybe = Node | None
#: What a forward is made of.
VALUES = ("gx", "gh", "prev")


class Calculus:
    """The rules. Of a function whose derivative its result tells, it is told by the result: then
    what went into it need not be kept."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def _partials(self, y: Node, d: Node) -> list[tuple[Node, Node]]:
        """What a change ``d`` of each argument is to y, or a gradient ``d`` of y to the argument:
        both are linear in d, by the same factor."""
        make, constant = self.graph.make, self.graph.constant
        x = y.args[0]
        zero = constant(0)
        if y.op in CHOICES:
            a, b, left, right = y.args
            return [(left, make(y.op, a, b, d, zero)), (right, make(y.op, a, b, zero, d))]
        if y.op in ("minimum", "maximum"):
            a, b = y.args
            small, large = (b, a) if y.op == "minimum" else (a, b)
            both = make("equal", a, b, make("mul", d, constant(0.5)), d)
            return [
                (a, make("less", small, large, zero, both)),
                (b, make("less", large, small, zero, both)),
            ]
        if y.op == "add":
            return [(x, d), (y.args[1], d)]
        if y.op == "sub":
            return [(x, d), (y.args[1], make("neg", d))]
        if y.op == "mul":
            return [(x, make("mul", d, y.args[1])), (y.args[1], make("mul", d, x))]
        if y.op == "div":
            by = make("div", d, y.args[1])
            return [(x, by), (y.args[1], make("neg", make("mul", by, y)))]
        one = constant(1)
        if y.op == "neg":
            of_x = make("neg", d)
        elif y.op == "sigmoid":
            of_x = make("mul", make("mul", d, y), make("sub", one, y))
        elif y.op == "tanh":
            of_x = make("mul", d, make("sub", one, make("mul", y, y)))
        elif y.op == "exp":
            of_x = make("mul", d, y)
        elif y.op == "log":
            of_x = make("div", d, x)
        elif y.op == "sqrt":
            of_x = make("div", make("mul", d, constant(0.5)), y)
        elif y.op == "relu":
            of_x = make("at_most", y, zero, zero, d)  # where y is NaN, d goes on
        elif y.op == "abs":
            upwards = make("equal", x, zero, zero, d)
            of_x = make("less", x, zero, make("neg", d), upwards)
        elif y.op == "softplus":
            of_x = make("less", constant(20), x, d, make("mul", d, make("sigmoid", x)))
        else:
            assert y.op == POWER, y.op
            factor = make("mul", constant(y.value), self.graph.power(x, y.value - 1))
            of_x = make("mul", d, factor)
        return [(x, of_x)]

    def gradients(self, seeds: Sequence[tuple[Node, Node]]) -> dict[int, Node]:
        """By the index of each node: the gradient of it, for those of some nodes. What has none is
        not there."""
        terms: dict[int, list[Node]] = {}
        for node, seed in seeds:
            terms.setdefault(node.index, []).append(seed)
        found: dict[int, Node] = {}
        for node in reversed(below(node for node, _ in seeds)):
            total = self.graph.sum(terms.get(node.index, ()))
            if total is None or node.is_constant:
                continue
            found[node.index] = total
            for arg, term in self._partials(node, total) if node.args else ():
                if not arg.is_constant:
                    terms.setdefault(arg.index, []).append(term)
        return found

    def tangents(self, of: Sequence[Node], before: int) -> list[Maybe]:
        """How nodes change with the leaves, whose changes are the leaves ``dgx``, ``dgh`` and
        ``dprev``, of which there are ``before``: noise has none. None is not at all."""
        found: dict[int, Maybe] = {}
        for node in below(of):
            if node.op in VALUES and not (node.op == "prev" and node.value >= before):
                found[node.index] = self.graph.leaf("d" + node.op, int(node.value))
                continue
            terms = []
            for place, arg in enumerate(self._places(node)):
                change = found[arg.index]
                if change is not None:
                    terms.append(self._partials(node, change)[place][1])
            found[node.index] = self.graph.sum(terms)
        return [found[node.index] for node in of]

    def _places(self, y: Node) -> list[Node]:
        """The arguments that a change of y may come from, in the order of :meth:`_partials`."""
        if not y.args:
            return []
        return list(y.args[2:] if y.op in CHOICES else y.args)


@dataclass(frozen=True)
class Derived:
    """A cell's functions as expressions. None is zero.

    ``next`` and ``saved`` are made of ``gx``, ``gh`` and ``prev``; of the others ``known`` names
    the nodes that are handed to them, as leaves: ``prev``, ``next``, ``saved``.
    """

    next: list[Node]
    saved: list[Node]
    dgx: list[Maybe]
    dgh: list[Maybe]
    dprev: list[Maybe]
    dsaved: list[Maybe]
    known: dict[int, Node]
    reads_h: bool


def derive(graph: Graph, next: Sequence[Node], gates: int, before: int) -> Derived:
    """The derivatives of a cell, and the fewest values to save for them. ``before`` counts states
    and parameters, behind which ``prev`` has noise."""
    rules = Calculus(graph)
    found = rules.gradients([(n, graph.leaf("dnext", s)) for s, n in enumerate(next)])

    def of(name: str, count: int) -> list[Maybe]:
        return [found.get(graph.leaf(name, i).index) for i in range(count)]

    dgx, dgh, dprev = of("gx", gates), of("gh", gates), of("prev", before)
    back = [node for node in (*dgx, *dgh, *dprev) if node is not None]
    # Which of several cells of as many saved values is taken: one that asks for h least.
    with_h, without_h = (_saved(rules, next, back, own, before) for own in (next, next[1:]))
    reads_h = len(with_h) < len(without_h)
    saved = with_h if reads_h else without_h
    known = {
        n.index: graph.leaf("next", s)
        for s, n in enumerate(next)
        if n.op != "prev" and (s > 0 or reads_h)
    }
    known |= {n.index: graph.leaf("saved", k) for k, n in enumerate(saved)}
    own_h = graph.leaf("next", 0)
    reads_h = any(known.get(n.index) is own_h for n in _handed(back, known))
    return Derived(
        list(next), saved, dgx, dgh, dprev, rules.tangents(saved, before), known, reads_h
    )  # fmt: skip


def _is_value(node: Node, memo: dict[int, bool]) -> bool:
    """Whether it is made of nothing but what forward has."""
    for each in below([node], lambda n: n.index in memo):
        if each.index not in memo:
            own = each.op in VALUES or each.is_constant if not each.args else True
            memo[each.index] = own and all(memo[a.index] for a in each.args)
    return memo[node.index]


def _asked_for(expressions: Iterable[Node]) -> list[Node]:
    """The values of forward that derivatives are made of, as large as they come."""
    memo: dict[int, bool] = {}
    nodes = below(expressions, lambda n: _is_value(n, memo))
    return [n for n in nodes if _is_value(n, memo) and not n.is_constant]


def _follows(node: Node, reached: set[int]) -> bool:
    """Whether a value is made of those that are reached, without the gates themselves."""
    nodes = below([node], lambda n: n.index in reached)
    return all(leaf.index in reached for leaf in leaves(nodes, "gx", "gh"))


def _handed(expressions: Iterable[Node], known: dict[int, Node]) -> list[Node]:
    """The known nodes that expressions are made of."""
    nodes = below(expressions, lambda n: n.index in known)
    return [n for n in nodes if n.index in known]


def _saved(
    rules: Calculus,
    next: Sequence[Node],
    back: Sequence[Node],
    own: Sequence[Node],
    before: int,
) -> list[Node]:
    """The fewest values from which, with the states before and ``own`` of those after a step, all
    derivatives follow; of several such choices, the last ones that forward computes."""
    asked = _asked_for(back)
    computed = {n.index for n in below(next)}
    given = {n.index for n in own}
    while True:
        saved = smallest_cut(asked, computed, given)
        # Their own tangents have to follow from them as well.
        changes = [t for t in rules.tangents(saved, before) if t is not None]
        reached = {n.index for n in saved} | given
        missing = [node for node in _asked_for(changes) if not _follows(node, reached)]
        if not missing:
            return saved
        asked = [*asked, *missing]
