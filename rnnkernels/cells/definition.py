"""Cells that users write: from a function of gates and states to all that a cell is."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
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

    def __post_init__(self) -> None:
        for name in ("__module__", "__qualname__", "__doc__"):
            object.__setattr__(self, name, getattr(self.function, name))

    @property
    def title(self) -> str:
        """The name of the function."""
        return self.function.__name__

    def __repr__(self) -> str:
        keywords = ", ".join((*self.states, *self.params))
        return f"<cell {self.title}({', '.join(self.gates)}, *, {keywords}), which is {self.name}>"

    def __reduce__(self) -> str:
        """By the name that it has in its module.

        Raises:
            TypeError: it has none there, so that nobody could find it again.
        """
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
    traced = trace(function)
    before = len(traced.states) + len(traced.params)
    derived = derive(traced.graph, traced.next, len(traced.gates), before)
    name = f"{traced.name.lower()}-{_digest(traced, derived)}"
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
        initial=tuple(traced.params.values()),
        recurrent=traced.recurrent,
        cpp=_cpp(traced, derived, name),
        torch=text,
        triton=triton_text(derived, title),
        reads_own_h=prev_h or derived.reads_h,
    )


def _all(derived: Derived) -> list[Any]:
    groups = (derived.next, derived.dgx, derived.dgh, derived.dprev)
    return [node for group in groups for node in group if node is not None]


def _digest(traced: Traced, derived: Derived) -> str:
    """Of what a cell computes, whatever its functions are called."""
    return sha256(_cpp(traced, derived, "").encode()).hexdigest()[:8]


def _cpp(traced: Traced, derived: Derived, name: str) -> str:
    sizes = len(traced.states), traced.split, traced.recurrent
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
