"""What the modules of a model hold beside registered modules: lists, closures, hooks, objects.

A bound method or a function keeps running the class that it was taken from, whatever becomes of
the module; and a layer in a plain list is no part of the model for ``model.modules()``.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

#: Where the walk goes no further: these hold no module, or what is everybody's.
_OPAQUE = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, range, slice),
    *(type, types.ModuleType, types.BuiltinFunctionType, types.CodeType, types.FrameType),
    *(Tensor, torch.dtype, torch.device, torch.Generator),
)

#: A place as it is told to users, and what stands there.
Edge = tuple[str, Any]


def walk(model: nn.Module) -> Iterator[Edge]:
    """Every place inside a model, with what stands there, in a fixed order.

    Goes through the attributes of modules and plain objects, containers, partials, closures and
    defaults of functions, bound methods and weak references. A place is yielded however often
    what stands there has been seen; what is behind it is walked once. TorchScript is closed.
    """
    seen = {id(model)}
    alive: list[Any] = [model]  # an object made on the way must not hand its id to another
    stack = [] if isinstance(model, torch.jit.ScriptModule) else [_behind("", model)]
    while stack:
        edge = next(stack[-1], None)
        if edge is None:
            stack.pop()
            continue
        path, value = edge
        kind = type(value)  # not what isinstance says, which asks the object, a proxy say
        if issubclass(kind, _OPAQUE):
            continue
        yield edge
        if id(value) not in seen and not issubclass(kind, torch.jit.ScriptModule):
            seen.add(id(value))
            alive.append(value)
            stack.append(_behind(path, value))


def _behind(path: str, value: Any) -> Iterator[Edge]:
    """The places directly behind a value."""
    kind = type(value)
    if issubclass(kind, nn.Module):
        dot = f"{path}." if path else ""
        for name, child in list(value.__dict__["_modules"].items()):
            yield dot + name, child
        for name, attribute in list(value.__dict__.items()):
            own = name == "forward" and not replaces_forward(value)
            if not own and name not in ("_modules", "_parameters", "_buffers"):
                yield dot + name, attribute
        return
    if issubclass(kind, types.FunctionType):
        yield from _behind_function(path, value)
    elif issubclass(kind, types.MethodType):
        yield f"{path}.__self__", value.__self__
        if isinstance(value.__func__, types.FunctionType):
            yield from _behind_function(path, value.__func__)
    elif issubclass(kind, functools.partial):
        yield f"{path}, function of a partial", value.func
        for i, argument in enumerate(value.args):
            yield f"{path}, argument {i} of a partial", argument
        for name, argument in value.keywords.items():
            yield f"{path}, argument {name!r} of a partial", argument
    elif issubclass(kind, weakref.ref):
        yield path, value()
    elif issubclass(kind, dict):
        for key, item in list(value.items()):
            plain = isinstance(key, (str, int, float))
            yield f"{path}[{key!r}]" if plain else f"{path}[{type(key).__name__}]", item
            yield f"{path}, a key", key
    elif issubclass(kind, (list, tuple, deque, set, frozenset)):
        for i, item in enumerate(list(value)):
            yield f"{path}[{i}]", item
    yield from _attributes(path, value)


def _behind_function(path: str, function: types.FunctionType) -> Iterator[Edge]:
    where = describe(function)
    empty = types.CellType()
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if cell != empty:  # equal only to another cell without contents
            yield f"{path}, variable {name!r} of {where}", cell.cell_contents
    for i, default in enumerate(function.__defaults__ or ()):
        yield f"{path}, default {i} of {where}", default
    for name, default in (function.__kwdefaults__ or {}).items():
        yield f"{path}, default {name!r} of {where}", default


def _attributes(path: str, value: Any) -> Iterator[Edge]:
    """What an object's own dictionary and slots hold, without running any of its code."""
    kinds = type(value).__mro__
    if any("__dict__" in vars(kind) for kind in kinds):
        for name, attribute in list(object.__getattribute__(value, "__dict__").items()):
            yield f"{path}.{name}", attribute
    for kind in kinds:
        if "__slots__" not in vars(kind):
            continue
        for name, slot in list(vars(kind).items()):
            if isinstance(slot, types.MemberDescriptorType) and hasattr(value, name):
                yield f"{path}.{name}", slot.__get__(value, kind)


def replaces_forward(module: nn.Module) -> bool:
    """Whether another forward than that of its class stands on the module itself."""
    return "forward" in module.__dict__ and bound_forward(module.__dict__["forward"]) is not module


def bound_forward(value: Any) -> nn.Module | None:
    """The module whose class's forward a value would run, as a bound method or a partial."""
    kind = type(value)
    if issubclass(kind, types.MethodType):
        function, module = value.__func__, value.__self__
    elif issubclass(kind, functools.partial) and value.args:
        function, module = value.func, value.args[0]
    else:
        return None
    if not issubclass(type(module), nn.Module):
        return None
    return module if function is inspect.getattr_static(type(module), "forward") else None


def describe(function: Any) -> str:
    """A function with the place of its text, or the type of what is none."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, types.MethodType):
        function = function.__func__
    if isinstance(function, types.FunctionType):
        code = function.__code__
        return f"{function.__qualname__} ({code.co_filename}:{code.co_firstlineno})"
    return f"a {type(function).__module__}.{type(function).__qualname__}"
