"""Cells that users write: from a function of gates and states to all that a cell is."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from hashlib import sha256
from types import ModuleType
from typing import Any

from rnnkernels.cells.contract import Cell
from rnnkernels.cells.derivative import Derived, derive
from rnnkernels.cells.graph import below
from rnnkernels.cells.parameters import PerUnit
from rnnkernels.cells.text import cpp_text, torch_text, triton_text
from rnnkernels.cells.tracing import Traced, trace


@dataclass(frozen=True, eq=False)
class DefinedCell(Cell):
    """A cell that a user wrote, by :func:`rnnkernels.cell`.

    Attributes:
        function: what it was written as.
        states: the names of the states.
        initial: how each of ``params`` begins.
        probabilities: of ``noise``, each that of a 1.
        traced: what the function computes.
        base, zoned: the cell that this one is with zoneout of some states, and of which; else None
            and nothing.
        cpp: the struct of the kernels, as those of ``csrc/common/cells.h``.
        torch: its functions of torch operations.
        triton: its functions for Triton.
        reads_own_h: whether anything needs the h of this unit itself, which a cell with a
            projection does not have.
    """

    function: Callable[..., Any] = field(repr=False)
    states: tuple[str, ...]
    initial: tuple[PerUnit, ...]
    cpp: str = field(repr=False)
    torch: str = field(repr=False)
    triton: str = field(repr=False)
    reads_own_h: bool
    traced: Traced = field(repr=False)
    probabilities: tuple[float, ...] = ()
    base: DefinedCell | None = None
    zoned: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        for name in ("__module__", "__qualname__", "__doc__"):
            object.__setattr__(self, name, getattr(self.function, name))

    @property
    def title(self) -> str:
        """The name of the function."""
        return self.function.__name__

    def __repr__(self) -> str:
        keywords = ", ".join((*self.states, *self.params, *self.noise))
        return f"<cell {self.title}({', '.join(self.gates)}, *, {keywords}), which is {self.name}>"

    def __reduce__(self) -> Any:
        """By the name that it has in its module, or of the cell that zoneout was added to.

        Raises:
            TypeError: it has none there, so that nobody could find it again.
        """
        if self.base is not None:
            return zoned_out, (self.base, self.zoned)
        module, name = self.function.__module__, self.function.__qualname__
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not self:
            raise TypeError(
                f"cell {self.title!r}: expected {module}.{name} to be this cell, as it is found "
                f"again when it is loaded, got {type(found).__name__}. Define it at the top of a "
                "module, with @rnnkernels.cell above it; a state_dict can be saved in any case"
            )
        return name

    def __copy__(self) -> DefinedCell:
        return self

    def __deepcopy__(self, memo: Any) -> DefinedCell:
        return self


def define(function: Callable[..., Any]) -> DefinedCell:
    """The cell that a function of gates and states is: see :func:`rnnkernels.cell`."""
    return _made(function, trace(function))


@cache
def zoned_out(cell: DefinedCell, zoned: tuple[bool, ...]) -> DefinedCell:
    """A cell with zoneout (Krueger et al. 2017) of some of its states.

    What comes next is ``d * state + (1 - d) * next``, with d noise that stands behind the cell's
    own. All of ``next`` are those of the cell: an h that is made of c is made of the c before
    zoneout. The probabilities of d are those of a call; here they are zeros.
    """
    # In a graph of its own: the text, and so the name, follows the order in which nodes were made,
    # and may not depend on which others a process has zoned out before.
    traced = replace(
        cell.traced,
        next=list(cell.traced.next),
        noise=dict(cell.traced.noise),
        graph=cell.traced.graph.copy(),
    )
    make, leaf = traced.graph.make, traced.graph.leaf
    for i, state in enumerate(traced.states):
        if zoned[i]:
            d = leaf("prev", len(traced.states) + len(traced.params) + len(traced.noise))
            traced.noise[f"zoneout_{state}"] = 0.0
            # Not next + d * (state - next), which rounds where d is 1.
            stays, goes = d, make("sub", traced.graph.constant(1), d)
            traced.next[i] = make(
                "add", make("mul", stays, leaf("prev", i)), make("mul", goes, traced.next[i])
            )
    return _made(cell.function, traced, cell, zoned)


def _made(
    function: Callable[..., Any],
    traced: Traced,
    base: DefinedCell | None = None,
    zoned: tuple[bool, ...] = (),
) -> DefinedCell:
    noise = traced.noise
    before = len(traced.states) + len(traced.params)
    derived = derive(traced.graph, traced.next, len(traced.gates), before)
    text_of = partial(_cpp, traced, derived, len(noise))
    kind = traced.name.lower() + ("_zoneout" if base else "")
    # Of what a cell computes, whatever its functions are called.
    name = f"{kind}-{sha256(text_of('').encode()).hexdigest()[:8]}"
    title = f"Written by rnnkernels.cell: {name}."
    text = torch_text(derived, title)
    functions = compiled(text, name, "torch")
    prev_h = any(n.op == "prev" and n.value == 0 for n in below(_all(derived)))
    return DefinedCell(
        name,
        traced.gates,
        S=len(traced.states),
        K=len(derived.saved),
        A=traced.split,
        reads_h=derived.reads_h,
        forward=functions["forward"],
        backward=functions["backward"],
        tangents=functions["tangents"],
        function=function,
        states=traced.states,
        params=tuple(traced.params),
        noise=tuple(noise),
        initial=tuple(traced.params.values()),
        recurrent=traced.recurrent,
        cpp=text_of(name),
        torch=text,
        triton=triton_text(derived, title),
        reads_own_h=prev_h or derived.reads_h,
        traced=traced,
        probabilities=tuple(noise.values()),
        base=base,
        zoned=zoned,
    )


def _all(derived: Derived) -> list[Any]:
    groups = (derived.next, derived.dgx, derived.dgh, derived.dprev)
    return [node for group in groups for node in group if node is not None]


def _cpp(traced: Traced, derived: Derived, noise: int, name: str) -> str:
    sizes = len(traced.states), traced.split, traced.recurrent, noise
    return cpp_text(derived, name, traced.gates, tuple(traced.params), *sizes)


def compiled(text: str, name: str, language: str) -> dict[str, Any]:
    """What the text of a cell in a language defines, as a module: tracebacks, and whoever asks for
    sources or follows a function into its module, find it."""
    file = f"<{name} in {language}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    title = f"rnnkernels.cells.{name.replace('-', '_')}_in_{language}"
    module = sys.modules[title] = ModuleType(title)
    module.__file__ = file
    exec(compile(text, file, "exec"), module.__dict__)
    return module.__dict__
