"""Runs all programs of a Triton launch at once, in Triton's interpreter.

The interpreter runs one program after another, which would hang where programs wait for each other.
Here each is a greenlet. Another may take over before and after every atomic, and now and then at a
load or a store, in an order that follows from a seed. A launch in which every program waits raises
an error that says "deadlock".
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_int32
from dataclasses import dataclass, field, replace
from math import prod
from random import Random
from typing import Any

import triton
import triton.language as tl
from greenlet import getcurrent, greenlet
from triton.runtime import interpreter

if not triton.knobs.runtime.interpret:
    raise ImportError("set TRITON_INTERPRET=1 before anything imports triton")

_builder = interpreter.interpreter_builder


class _Program(greenlet):
    """One program of a launch."""

    place: tuple[int, int, int]
    #: Address and value of a count that it has looked at and not touched memory since.
    looked_at: tuple[int, int] | None = None
    #: It is about to look again: useless before there is something else to see.
    looks_again: bool = False

    def can_go_on(self) -> bool:
        if not self.looks_again or self.looked_at is None:
            return True
        address, value = self.looked_at
        return _count(address) != value


def _count(address: int) -> int:
    return c_int32.from_address(address).value


@dataclass
class Schedule:
    """The order of programs, and what they did."""

    seed: int = 0
    switches: float = 0.02  # the share of loads and stores at which another program may take over
    #: Numbers of programs that there were at once, and the memory orders of their atomics.
    together: list[int] = field(default_factory=list)
    orders: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)

    def run(self, programs: list[_Program]) -> None:
        self.together.append(len(programs))
        running = list(programs)
        try:
            while running:
                able = [program for program in running if program.can_go_on()]
                if not able:
                    waiting = ", ".join(f"{p.place} at a count of {p.looked_at}" for p in running)
                    raise RuntimeError(f"deadlock: programs that wait forever: {waiting}")
                program = self.random.choice(able)
                _builder.set_grid_idx(*program.place)
                program.switch()
                if program.dead:
                    running.remove(program)
        finally:
            for program in running:
                program.throw()

    def at_memory(self) -> None:
        program = getcurrent()
        if isinstance(program, _Program):
            program.looked_at = None
            if self.random.random() < self.switches:
                program.parent.switch()

    def at_atomic(self, run: Callable[[], Any], address: int, adds: int, order: str) -> Any:
        program = getcurrent()
        if not isinstance(program, _Program):
            return run()
        self.orders.add(("look" if adds == 0 else "add", order))
        looked_at = program.looked_at
        program.looks_again = adds == 0 and looked_at is not None and looked_at[0] == address
        program.parent.switch()
        program.looks_again = False
        found = run()
        program.looked_at = (address, int(found.data.item())) if adds == 0 else None
        program.parent.switch()
        return found


class _Together:
    """Stands for a kernel that the interpreter calls once per program: runs them with the last."""

    def __init__(self, kernel: Callable[..., None], programs: int, schedule: Schedule) -> None:
        self.__name__ = kernel.__name__
        self.__globals__ = kernel.__globals__
        self.__signature__ = inspect.signature(kernel)
        self._kernel, self._programs, self._schedule = kernel, programs, schedule
        self._waiting: list[_Program] = []

    def __call__(self, **arguments: Any) -> None:
        program = _Program(lambda: self._kernel(**arguments))
        program.place = _builder.grid_idx
        self._waiting.append(program)
        if len(self._waiting) == self._programs:
            self._schedule.run(self._waiting)


@contextmanager
def at_once(seed: int = 0) -> Iterator[Schedule]:
    """Within, the programs of every launch run at once, in an order that follows from `seed`."""
    schedule = Schedule(seed)

    class Executor(interpreter.GridExecutor):
        def __init__(self, fn: Callable[..., None], arg_names: list[str], grid: Any, *rest: Any):
            super().__init__(fn, arg_names, grid, *rest)
            self.fn = _Together(fn, prod(grid), schedule)

    def atomic(op: Any, pointer: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        def run() -> Any:
            return type(_builder).create_atomic_rmw(_builder, op, pointer, value, mask, sem, scope)

        return schedule.at_atomic(run, int(pointer.data.item()), int(value.data.item()), sem.name)

    def memory(name: str) -> Callable[..., Any]:
        def access(*arguments: Any) -> Any:
            schedule.at_memory()
            return getattr(type(_builder), name)(_builder, *arguments)

        return access

    replaced = {name: memory(name) for name in ("create_masked_load", "create_masked_store")}
    executor, interpreter.GridExecutor = interpreter.GridExecutor, Executor
    vars(_builder).update(replaced, create_atomic_rmw=atomic)
    try:
        yield schedule
    finally:
        interpreter.GridExecutor = executor
        for name in (*replaced, "create_atomic_rmw"):
            delattr(_builder, name)


def prepare() -> None:
    """For the rest of this process: makes the interpreter two to three times as fast, and has it
    multiply bfloat16, which it holds as bits and multiplies as whole numbers otherwise.

    It looks for integer overflow at every addition, and prepares the language anew at every call of
    a function; once is enough where nothing but the interpreter runs. Its many small objects keep
    the garbage collector busy.
    """
    patch: Callable[[Any], Any] = interpreter._patch_lang
    patched: set[int] = set()

    def patch_once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module not in patched:
            patched.add(module)
            patch(fn)
        return interpreter._LangPatchScope()  # nothing to restore

    def product(a: Any, b: Any, *rest: Any) -> Any:
        return type(_builder).create_dot(_builder, _widened(a), _widened(b), *rest)

    gc.freeze()  # what is there already need not be looked through for garbage
    gc.set_threshold(100_000)
    interpreter._patch_lang = patch_once
    _builder.options = replace(_builder.options, sanitize_overflow=False)
    _builder.create_dot = product


def _widened(block: Any) -> Any:
    if block.dtype.scalar != tl.bfloat16:
        return block
    values = (block.data.astype("uint32") << 16).view("float32")
    return interpreter.TensorHandle(values, tl.float32)
