"""Programs that wait for each other, in Triton's interpreter: all orders of them, faults found.

Run by test_triton.py, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import op_parity
from op_parity import Case
from rnnkernels._backends.triton import launch, sequence
from rnnkernels._core.call import Clip
from triton_interpreted import Forced, Results, laid_out, ops, run, same

GRID = Forced("grid", 16, 4, 4)
SEEDS = range(3)
#: Two blocks of rows, three programs for each; gradients at once, and pending on a norm.
VISITS = [
    Case("lstm", 1, T=3, B=18, H=11),
    Case("gru", 1, T=3, B=18, H=11, clip=Clip("norm", 0.3), flow=True),
]
EXCHANGE = ("_signal", "_wait")


def sites() -> dict[int, str]:
    """Line and name of every signal and wait in the sources of the kernels."""
    tree = ast.parse(Path(sequence.__file__).read_text())
    return {
        node.lineno: node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in EXCHANGE
    }


def faulty(
    name: str, line: int, fault: Callable[..., Any], reached: set[int]
) -> Callable[..., Any]:
    """The function of that name, but with a fault where that line calls it."""
    sound = getattr(sequence, name)

    def call(*arguments: Any) -> Any:
        if sys._getframe(1).f_lineno == line:
            reached.add(line)
            return fault(sound, *arguments)
        return sound(*arguments)

    return call


def left_out(sound: Callable[..., Any], *arguments: Any) -> Any:
    return arguments[-1]  # of a wait: the patience that is left


def one_less(sound: Callable[..., Any], count: Any, steps: Any, *more: Any) -> Any:
    return sound(count, steps - 1 / tl.num_programs(1), *more)


FAULTS = [
    *((line, name, left_out) for line, name in sites().items()),
    *((line, name, one_less) for line, name in sites().items() if name == "_wait"),
]


@pytest.fixture(scope="session")
def sound() -> dict[Case, Results]:
    """What kernels without a fault compute; the fill of fresh memory does not matter to them."""
    return {case: run(case, GRID) for case in VISITS}


@pytest.mark.parametrize("case", VISITS, ids=str)
def test_same_bits_in_any_order(case: Case, sound: dict[Case, Results]) -> None:
    assert max(sound[case].errors()) <= 1e-6
    for seed in SEEDS:
        assert same(run(case, GRID, seed=seed).all, sound[case].all), seed


@pytest.mark.parametrize(
    ("line", "name", "fault"),
    FAULTS,
    ids=lambda v: v if isinstance(v, str) else getattr(v, "__name__", None),
)
def test_every_signal_and_wait_is_needed(
    line: int, name: str, fault: Callable[..., Any], sound: dict[Case, Results],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A fault shows under some order: programs wait forever, or compute something else."""
    reached: set[int] = set()
    monkeypatch.setattr(sequence, name, faulty(name, line, fault, reached))

    def noticed(case: Case, seed: int) -> bool:
        try:
            return not same(run(case, GRID, seed=seed).all, sound[case].all)
        except triton.runtime.errors.InterpreterError as error:
            assert "deadlock" in str(error)
            return True

    assert any(noticed(case, seed) for case in VISITS for seed in SEEDS)
    assert reached


@pytest.mark.parametrize("passes", [1, 2], ids=["forward", "backward"])
def test_waiting_has_a_bound(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program whose others never come ends, and the next call says by name what happened.

    Of two programs the first waits in vain before round 1, and for nothing after that.
    """
    pair = Forced("grid", 16, 8, 8)
    case = VISITS[passes - 1]
    call = op_parity.make(case, torch.float32)
    with laid_out(pair):
        out = op_parity.forward(ops, call)
        grads = op_parity.random_gradients(call, out)
    monkeypatch.setattr(launch, "PATIENCE", 40)
    monkeypatch.setattr(launch, "layout_of", pair.layout_of)
    # Not at once, but one after another: the first waits for the second, which has not begun.
    if passes == 1:
        op_parity.forward(ops, call)
    else:
        op_parity.backward(ops, call, out, grads)
    name = ("sequence_forward", "sequence_backward")[passes - 1]
    said = f"triton::{name}: an earlier call on cpu gave up: at round 1 a program"
    with pytest.raises(RuntimeError, match=said):
        op_parity.forward(ops, call)
    with laid_out(pair):  # which was told; and a launch that nothing hinders is as before
        assert same(op_parity.forward(ops, call), out)
        op_parity.forward(ops, call)


def test_programs_and_memory_orders() -> None:
    """All programs of a launch are there at once; what they signal follows what they stored."""
    call = op_parity.make(Case("lstm", 2, T=2, B=18, H=11), torch.float32)
    with laid_out(GRID) as schedule:
        op_parity.forward(ops, call)
    assert schedule.together == [2 * 3 * 2]  # blocks of rows, parts, directions
    assert schedule.orders == {("look", "ACQUIRE"), ("add", "RELEASE")}
