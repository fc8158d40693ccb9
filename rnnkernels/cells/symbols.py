"""Symbols that stand for gates and states, and what may be done with them."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from numbers import Real
from types import CodeType
from typing import Any, NoReturn

import torch
from torch.nn import functional as F

from rnnkernels.cells.graph import Graph, Node

_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
KNOWN = (
    "+ - * / ** by a number, torch.exp, log, sigmoid, tanh, relu, abs, sqrt, square, minimum, "
    "maximum, clamp, where of a comparison, and torch.nn.functional.softplus"
)


class Trace:
    """One call of a function with symbols."""

    def __init__(self, name: str, code: CodeType) -> None:
        self.graph, self.name, self.code = Graph(), name, code

    def where(self) -> str:
        """File and line that are being run, of the function or of what it calls."""
        frame: Any = sys._getframe()
        while frame is not None:
            file = os.path.abspath(frame.f_code.co_filename)
            if not file.startswith((_OURS, _TORCH)) and not file.startswith("<frozen"):
                return f"{frame.f_code.co_filename}:{frame.f_lineno}"
            frame = frame.f_back
        return f"{self.code.co_filename}:{self.code.co_firstlineno}"

    def fail(self, text: str, kind: type[Exception] = TypeError) -> NoReturn:
        raise kind(f"{self.where()}: cell {self.name!r}: {text}")

    def at_definition(self, text: str) -> TypeError:
        place = f"{self.code.co_filename}:{self.code.co_firstlineno}"
        return TypeError(f"{place}: cell {self.name!r}: {text}")

    def node(self, value: Any, what: str) -> Node:
        """The expression that an operand stands for."""
        if isinstance(value, Symbol):
            if value._trace is not self:
                self.fail(f"{what}: expected a value of this cell, got one of another cell")
            return value._node()
        if isinstance(value, Condition):
            self.fail(
                f"{what}: expected a value, got the comparison {value._text}. Choose by it: "
                "torch.where(a > b, x, y)"
            )
        if isinstance(value, bool) or not isinstance(value, Real):
            hint = "a tensor's value by float(...)" if isinstance(value, torch.Tensor) else "float"
            self.fail(
                f"{what}: expected a gate, a state, a value made of them or a real number, got "
                f"{type(value).__name__}. Use {hint}"
            )
        number = float(value)
        if number != number or abs(number) == float("inf"):
            self.fail(f"{what}: expected a finite number, got {number}", ValueError)
        return self.graph.constant(number)

    def apply(self, op: str, *args: Any) -> Value:
        nodes = [self.node(a, _SIGNS.get(op, op)) for a in args]
        return self.made(lambda: self.graph.make(op, *nodes))

    def made(self, make: Callable[[], Node]) -> Value:
        try:
            return Value(self, make())
        except (ValueError, ArithmeticError) as error:
            self.fail(f"expected constants that have a value here, got {error}", ValueError)


_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "neg": "-"}


class Symbolic:
    """What both values and comparisons refuse, and functions of torch that take them."""

    _trace: Trace
    __array_ufunc__ = None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [*args, *(kwargs or {}).values()]
        trace = next(a._trace for a in given if isinstance(a, Symbolic))
        found = _FUNCTIONS.get(func)
        name = getattr(func, "__name__", str(func))
        if found is None:
            trace.fail(
                f"torch's {name}: expected an operation on each unit by itself, of those that "
                f"have a derivative here, got {name}. Write it with {KNOWN}"
            )
        try:
            inspect.signature(found).bind(trace, *args, **(kwargs or {}))
        except TypeError as error:
            trace.fail(f"torch.{name}: {error}; other arguments are not taken here")
        return found(trace, *args, **(kwargs or {}))

    def _no(self, what: str, advice: str) -> NoReturn:
        self._trace.fail(
            f"{what}: expected arithmetic that is the same for every value, got "
            f"{what} of {self!r}. {advice}"
        )

    def __bool__(self) -> bool:
        self._no("a branch", "Choose by torch.where(a > b, x, y): values differ from unit to unit")

    def __len__(self) -> int:
        self._no("len()", "A value here is one number, of one unit at one step")

    def __iter__(self) -> Any:
        self._no("iteration", "A value here is one number, of one unit at one step")

    def __getitem__(self, index: Any) -> Any:
        self._no("indexing", "A value here is one number, of one unit at one step")

    def __float__(self) -> float:
        self._no("a number", "Use torch's functions, as torch.exp in place of math.exp")

    __int__ = __index__ = __complex__ = __float__

    def __matmul__(self, other: Any) -> Any:
        self._no("@", "Products with weights are the layer's: gates come with them done")

    __rmatmul__ = __matmul__

    def __mod__(self, other: Any) -> Any:
        self._no("% or //", f"Write it with {KNOWN}")

    __rmod__ = __floordiv__ = __rfloordiv__ = __mod__

    def __and__(self, other: Any) -> Any:
        self._no("& or | or ~", "Use torch.where inside of torch.where")

    __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __and__

    def __invert__(self) -> Any:
        self._no("& or | or ~", "Use torch.where inside of torch.where")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        gates = " Gates have .x and .h." if isinstance(self, Value) else ""
        raise AttributeError(
            f"{self._trace.where()}: cell {self._trace.name!r}: .{name}: expected arithmetic, got "
            f"an attribute or method of {self!r}.{gates} Write it with {KNOWN}"
        )


class Condition(Symbolic):
    """A comparison of two values, for torch.where."""

    def __init__(self, trace: Trace, op: str, a: Node, b: Node, holds: bool, text: str) -> None:
        self._trace, self._op, self._pair = trace, op, (a, b)
        self._holds, self._text = holds, text

    def _choose(self, x: Node, y: Node) -> Value:
        chosen = (x, y) if self._holds else (y, x)
        return self._trace.made(lambda: self._trace.graph.make(self._op, *self._pair, *chosen))

    def __repr__(self) -> str:
        return f"the comparison {self._text}"


class Symbol(Symbolic):
    """A value of each unit at each step."""

    __hash__ = object.__hash__

    def _node(self) -> Node:
        raise NotImplementedError

    def __add__(self, other: Any) -> Value:
        return self._trace.apply("add", self, other)

    __radd__ = __add__

    def __mul__(self, other: Any) -> Value:
        return self._trace.apply("mul", self, other)

    __rmul__ = __mul__

    def __sub__(self, other: Any) -> Value:
        return self._trace.apply("sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return self._trace.apply("sub", other, self)

    def __truediv__(self, other: Any) -> Value:
        return self._trace.apply("div", self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return self._trace.apply("div", other, self)

    def __neg__(self) -> Value:
        return self._trace.apply("neg", self)

    def __pos__(self) -> Symbol:
        return self

    def __abs__(self) -> Value:
        return self._trace.apply("abs", self)

    def __pow__(self, exponent: Any) -> Value:
        node = self._trace.node(exponent, "**")
        if not node.is_constant:
            self._trace.fail("**: expected a number as the exponent, got a value. Use torch.exp")
        own = self._node()
        return self._trace.made(lambda: self._trace.graph.power(own, node.value))

    def __rpow__(self, base: Any) -> Value:
        self._trace.fail("**: expected a number as the exponent, got a value. Use torch.exp")

    def _compare(self, other: Any, op: str, swapped: bool, holds: bool, sign: str) -> Condition:
        a, b = self._node(), self._trace.node(other, sign)
        text = f"{a!r} {sign} {b!r}"
        return Condition(self._trace, op, *((b, a) if swapped else (a, b)), holds, text)

    def __lt__(self, other: Any) -> Condition:
        return self._compare(other, "less", False, True, "<")

    def __le__(self, other: Any) -> Condition:
        return self._compare(other, "at_most", False, True, "<=")

    def __gt__(self, other: Any) -> Condition:
        return self._compare(other, "less", True, True, ">")

    def __ge__(self, other: Any) -> Condition:
        return self._compare(other, "at_most", True, True, ">=")

    def __eq__(self, other: Any) -> Condition:  # type: ignore[override]
        return self._compare(other, "equal", False, True, "==")

    def __ne__(self, other: Any) -> Condition:  # type: ignore[override]
        return self._compare(other, "equal", False, False, "!=")

    def __repr__(self) -> str:
        return f"the value {self._node()!r}"


class Value(Symbol):
    def __init__(self, trace: Trace, node: Node) -> None:
        self._trace, self._own = trace, node

    def _node(self) -> Node:
        return self._own


class Gate(Symbol):
    """A gate's pre-activation. ``x`` is its input part, ``W_ih x + b_ih``, ``h`` its hidden part,
    ``W_hh h + b_hh``; as a value it is their sum."""

    def __init__(self, trace: Trace, number: int, name: str) -> None:
        self._trace, self._name = trace, name
        self.x = Value(trace, trace.graph.leaf("gx", number))
        self.h = Value(trace, trace.graph.leaf("gh", number))

    def _node(self) -> Node:
        return self._trace.graph.make("add", self.x._node(), self.h._node())

    def __repr__(self) -> str:
        return f"the gate {self._name}"


def _of_one(op: str) -> Callable[[Trace, Any], Value]:
    return lambda trace, input: trace.apply(op, input)


def _of_two(op: str) -> Callable[[Trace, Any, Any], Value]:
    return lambda trace, input, other: trace.apply(op, input, other)


def _clamp(trace: Trace, input: Any, min: Any = None, max: Any = None) -> Any:
    found = input if min is None else trace.apply("maximum", input, min)
    return found if max is None else trace.apply("minimum", found, max)


def _where(trace: Trace, condition: Any, input: Any, other: Any) -> Value:
    if not isinstance(condition, Condition):
        trace.fail(f"torch.where: expected a comparison first, such as a > b, got {condition!r}")
    return condition._choose(trace.node(input, "torch.where"), trace.node(other, "torch.where"))


def _pow(trace: Trace, input: Any, exponent: Any) -> Value:
    base = Value(trace, trace.node(input, "torch.pow"))
    return base.__pow__(exponent)


def _softplus(trace: Trace, input: Any, beta: float = 1.0, threshold: float = 20.0) -> Value:
    if (beta, threshold) != (1.0, 20.0):
        trace.fail(
            "softplus: expected the default beta and threshold. softplus(beta * x) / beta is that "
            "of another beta"
        )
    return trace.apply("softplus", input)


#: What a function of torch is as an expression.
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{
        getattr(torch, name): _of_one(op)
        for op, names in {
            "sigmoid": ("sigmoid",), "tanh": ("tanh",), "exp": ("exp",), "log": ("log",),
            "relu": ("relu",), "abs": ("abs", "absolute"), "sqrt": ("sqrt",),
            "neg": ("neg", "negative"),
        }.items()
        for name in names
    },
    **{
        getattr(torch, name): _of_two(op)
        for op, names in {
            "add": ("add",), "sub": ("sub", "subtract"), "mul": ("mul", "multiply"),
            "div": ("div", "divide", "true_divide"), "minimum": ("minimum",),
            "maximum": ("maximum",),
        }.items()
        for name in names
    },
    torch.special.expit: _of_one("sigmoid"),
    F.sigmoid: _of_one("sigmoid"),
    F.tanh: _of_one("tanh"),
    F.relu: lambda trace, input, inplace=False: trace.apply("relu", input),
    F.softplus: _softplus,
    torch.square: lambda trace, input: trace.apply("mul", input, input),
    torch.pow: _pow,
    torch.clamp: _clamp,
    torch.where: _where,
}  # fmt: skip
