"""Which values of a graph are the fewest that others follow from: a smallest cut of nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from rnnkernels.cells.graph import Node, below

_SOURCE, _SINK = -1, -2
_MANY = 1 << 30


class _Flow:
    """A network with capacities, and the largest flow through it (Ford and Fulkerson 1956)."""

    def __init__(self) -> None:
        self._left: dict[int, dict[int, int]] = defaultdict(dict)

    def add(self, start: int, end: int, capacity: int) -> None:
        self._left[start][end] = capacity
        self._left[end].setdefault(start, 0)

    def fill(self) -> None:
        while path := self._path():
            for start, end in path:
                self._left[start][end] -= 1
                self._left[end][start] += 1

    def _path(self) -> list[tuple[int, int]]:
        """From the source to the sink, along edges that have room."""
        came: dict[int, int] = {_SOURCE: _SOURCE}
        left = [_SOURCE]
        while left:
            at = left.pop()
            for to, room in self._left[at].items():
                if room > 0 and to not in came:
                    came[to] = at
                    left.append(to)
        if _SINK not in came:
            return []
        path, at = [], _SINK
        while at != _SOURCE:
            path.append((came[at], at))
            at = came[at]
        return path

    def reaches_sink(self) -> set[int]:
        """Who could still send something on to the sink."""
        found, left = {_SINK}, [_SINK]
        while left:
            at = left.pop()
            for other in self._left[at]:
                if other not in found and self._left[other][at] > 0:
                    found.add(other)
                    left.append(other)
        return found


def smallest_cut(
    asked: Sequence[Node], allowed: Collection[int], given: Collection[int]
) -> list[Node]:
    """The fewest nodes, of those ``allowed``, from which those ``asked`` for follow without ``gx``
    and ``gh``; the states before a step are there, and so is what is ``given``.

    Of several smallest cuts it is the one nearest to what is asked for: it leaves least to compute
    again.
    """
    flow = _Flow()
    nodes = below(asked, lambda n: n.index in given)
    for node in nodes:
        enter, leave = 2 * node.index, 2 * node.index + 1
        capacity = 0 if node.index in given else 1 if node.index in allowed else _MANY
        flow.add(enter, leave, capacity)
        if node.op in ("gx", "gh"):
            flow.add(_SOURCE, enter, _MANY)
        elif node.index not in given:
            for arg in node.args:
                flow.add(2 * arg.index + 1, enter, _MANY)
    for node in asked:
        flow.add(2 * node.index + 1, _SINK, _MANY)
    flow.fill()
    near = flow.reaches_sink()
    return [n for n in nodes if 2 * n.index + 1 in near and 2 * n.index not in near
            and n.index in allowed and n.index not in given and _depends(n)]  # fmt: skip


def _depends(node: Node) -> bool:
    """Whether a gate takes part in it; else it follows from the states before the step."""
    return any(n.op in ("gx", "gh") for n in below([node]))
