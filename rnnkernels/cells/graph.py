"""Expressions of a cell: nodes of a graph in which equal expressions are one node.

The leaves are those of :mod:`rnnkernels.cells.contract`: ``gx``, ``gh``, ``prev``, ``next``,
``saved`` and the gradients or tangents of these, each with a number; and constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

#: What is computed of constants while a graph is made.
FOLDED: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "tanh": math.tanh,
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)),
    "softplus": lambda a: a if a > 20 else math.log1p(math.exp(a)),
    "relu": lambda a: max(a, 0.0),
    "abs": abs,
    "minimum": min,
    "maximum": max,
    "less": lambda a, b, x, y: x if a < b else y,
    "at_most": lambda a, b, x, y: x if a <= b else y,
    "equal": lambda a, b, x, y: x if a == b else y,
}
#: ``x if a < b else y`` and so on, of four expressions.
CHOICES = ("less", "at_most", "equal")
COMMUTATIVE = ("add", "mul", "minimum", "maximum")
CONSTANT, POWER = "constant", "power"


@dataclass(frozen=True, eq=False)
class Node:
    """An expression: an operation on others, or a leaf. ``value`` is what a constant is, the
    exponent of a power, the number of a leaf. Those that it is made of have a lower ``index``."""

    op: str
    args: tuple[Node, ...]
    value: float
    index: int

    @property
    def is_constant(self) -> bool:
        return self.op == CONSTANT

    def __repr__(self) -> str:
        if not self.args:
            return repr(self.value) if self.is_constant else f"{self.op}[{int(self.value)}]"
        more = [] if self.op != POWER else [repr(self.value)]
        return f"{self.op}({', '.join([*map(repr, self.args), *more])})"


class Graph:
    """Makes nodes, each expression once; what is plain to see is simplified on the way."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[object, ...], Node] = {}

    def copy(self) -> Graph:
        """Another with the same nodes, to which more may be added."""
        other = Graph()
        other._nodes = dict(self._nodes)
        return other

    def _node(self, op: str, args: Sequence[Node] = (), value: float = 0.0) -> Node:
        key = (op, *(a.index for a in args), value, math.copysign(1.0, value))
        if key not in self._nodes:
            self._nodes[key] = Node(op, tuple(args), value, len(self._nodes))
        return self._nodes[key]

    def leaf(self, name: str, number: int) -> Node:
        return self._node(name, value=float(number))

    def constant(self, value: float) -> Node:
        return self._node(CONSTANT, value=float(value))

    def make(self, op: str, *args: Node) -> Node:
        """An operation of :data:`FOLDED` on expressions.

        Raises:
            ValueError, OverflowError, ZeroDivisionError: it has no value for these constants.
        """
        if all(a.is_constant for a in args):
            value = FOLDED[op](*(a.value for a in args))
            if not math.isfinite(value):
                raise OverflowError(f"{op} of {', '.join(str(a.value) for a in args)} is {value}")
            return self.constant(value)
        if op in CHOICES and args[2] is args[3]:
            return args[2]
        found = self._simpler(op, *args) if len(args) <= 2 else None
        if found is not None:
            return found
        if op in COMMUTATIVE:
            args = tuple(sorted(args, key=lambda a: a.index))
        return self._node(op, args)

    def _simpler(self, op: str, a: Node, b: Node | None = None) -> Node | None:
        """Another expression of the same value, if one is plain to see."""
        if b is None:
            return a.args[0] if op == "neg" and a.op == "neg" else None

        def is_(node: Node, value: float) -> bool:
            return node.is_constant and node.value == value

        if op == "add":
            if is_(a, 0) or is_(b, 0):
                return b if is_(a, 0) else a
            if a.op == "neg" or b.op == "neg":
                return self.make("sub", a, b.args[0]) if b.op == "neg" else self.add_neg(b, a)
        if op == "sub":
            if is_(b, 0):
                return a
            if is_(a, 0):
                return self.make("neg", b)
            if b.op == "neg":
                return self.make("add", a, b.args[0])
        if op == "mul":
            for one, other in ((a, b), (b, a)):
                if is_(one, 1):
                    return other
                if is_(one, -1):
                    return self.make("neg", other)
                if one.op == "neg":
                    return self.make("neg", self.make("mul", one.args[0], other))
        if op == "div" and is_(b, 1):
            return a
        return None

    def add_neg(self, a: Node, negated: Node) -> Node:
        return self.make("sub", a, negated.args[0])

    def power(self, x: Node, exponent: float) -> Node:
        """``x ** exponent``: by products where that is a whole number, and by roots."""
        if x.is_constant:
            return self.constant(x.value**exponent)
        if exponent < 0:
            return self.make("div", self.constant(1), self.power(x, -exponent))
        whole, half = divmod(exponent, 1.0)
        if half not in (0.0, 0.5) or whole > 16:
            return self._node(POWER, (x,), exponent)
        factors = [self.make("sqrt", x)] if half else []
        square, left = x, int(whole)
        while left:
            if left % 2:
                factors.append(square)
            left //= 2
            square = self.make("mul", square, square) if left else square
        return reduce(lambda a, b: self.make("mul", a, b), factors or [self.constant(1)])

    def sum(self, terms: Iterable[Node]) -> Node | None:
        """None is the sum of none."""
        found: Node | None = None
        for term in terms:
            found = term if found is None else self.make("add", found, term)
        return found


def below(roots: Iterable[Node], stop: Callable[[Node], bool] = lambda node: False) -> list[Node]:
    """All nodes that these are made of, these too, in an order in which each follows what it is
    made of; nothing is looked for below a node where ``stop`` says so."""
    found: dict[int, Node] = {}
    left = list(roots)
    while left:
        node = left.pop()
        if node.index not in found:
            found[node.index] = node
            if not stop(node):
                left.extend(node.args)
    return [found[index] for index in sorted(found)]


def leaves(nodes: Iterable[Node], *names: str) -> Iterator[Node]:
    """Those of these names."""
    return (node for node in nodes if not node.args and node.op in names)
