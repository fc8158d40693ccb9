"""What follows from a function of gates and states: its derivatives against torch's autograd, for
functions that are drawn at random; the few values that are saved; the errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import written_cells
from drawn_cells import ONE, TWO, Plan, cell_of
from helpers import draw
from rnnkernels._ops.tangent_steps import Dual, apart, joined
from rnnkernels.cells import DefinedCell, define

F64 = torch.float64
N = 40  # values at a time

plans = st.lists(
    st.tuples(st.sampled_from([*ONE, *TWO]), st.integers(0, 1000), st.integers(0, 1000)),
    min_size=1,
    max_size=12,
)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def check(cell: DefinedCell) -> None:
    """Forward is differentiated by autograd; backward and tangents must say the same."""
    G, S, before = cell.G, cell.S, cell.S + cell.P
    gx, gh = ([draw(N, seed=20 * p + i, dtype=F64) for i in range(G)] for p in range(2))
    prev = [draw(N, seed=60 + i, dtype=F64) for i in range(before)]
    dnext = [draw(N, seed=65 + i, dtype=F64) for i in range(S)]
    changes = [draw(N, seed=80 + i, dtype=F64) for i in range(2 * G + before)]
    inputs = [t.requires_grad_() for t in (*gx, *gh, *prev)]
    next, saved = cell.forward(gx, gh, prev)
    assert len(next) == S and len(saved) == cell.K <= G + cell.A
    want = torch.autograd.grad(list(next), inputs, dnext, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        # What is not asked for holds NaN, so that nobody can have taken it.
        known = [n.detach() for n in next]
        if not cell.reads_h:
            known[0] = torch.full_like(known[0], float("nan"))
        handed = [s.detach() for s in saved]
        dgx, dgh, dprev = cell.backward(handed, prev, known, dnext)
    got = [*dgx, *dgh, *dprev]
    for g, w in zip(got, want, strict=True):
        close(g, w)
    for i in range(G - cell.A if cell.recurrent else 0):
        close(dgx[i], dgh[i])
    with forward_ad.dual_level():  # type: ignore[no-untyped-call]
        duals = [joined(Dual(t.detach(), d)) for t, d in zip(inputs, changes, strict=True)]
        _, moved = cell.forward(duals[:G], duals[G : 2 * G], duals[2 * G :])
        right = [apart(t).tangent for t in moved]
    with torch.no_grad():
        found = cell.tangents(
            handed, prev, known, changes[:G], changes[G : 2 * G], changes[2 * G :]
        )
    for s, g, w in zip(handed, found, right, strict=True):
        close(g, torch.zeros_like(s) if w is None else w)


@settings(max_examples=150, deadline=None)
@given(plans, st.integers(1, 8), st.integers(1, 4), st.booleans())
def test_derivatives_of_random_functions(plan: Plan, gates: int, states: int, split: bool) -> None:
    check(cell_of(plan, gates, states, split))


@pytest.mark.parametrize(
    "cell", [c for c in vars(written_cells).values() if isinstance(c, DefinedCell)],
    ids=lambda c: c.title,
)  # fmt: skip
def test_derivatives(cell: DefinedCell) -> None:
    check(cell)


def test_the_same_text_gives_the_same_name() -> None:
    def gru(r: Any, z: Any, n: Any, *, h: Any) -> Any:
        reset, update = torch.sigmoid(r), torch.sigmoid(z)
        return torch.tanh(n.x + reset * n.h) * (1 - update) + update * h

    def other(r: Any, z: Any, n: Any, *, h: Any) -> Any:
        reset, update = torch.sigmoid(r), torch.sigmoid(z)
        return torch.tanh(n.x + reset * n.h) * (1.5 - update) + update * h

    names = [define(f).name for f in (gru, gru, other)]
    assert names[0] == names[1] and names[0].split("-")[1] != names[2].split("-")[1]


def test_gates_behind_one_that_is_split_are_split() -> None:
    def cell(a: Any, n: Any, b: Any, *, h: Any) -> Any:
        return torch.tanh(n.x + torch.sigmoid(a) * n.h) + torch.sigmoid(b) * h

    found = define(cell)
    assert found.A == 2
    check(found)


def test_a_value_that_only_a_choice_asks_for() -> None:
    """It is saved for that alone, and how it changes has to follow from what is saved."""

    def cell(a: Any, b: Any, *, h: Any) -> Any:
        return torch.where(torch.sigmoid(a) * torch.tanh(b) > 0.1, h, -0.5 * h)

    found = define(cell)
    assert found.K == 2
    check(found)


def test_h_is_asked_for_only_where_that_saves_a_value() -> None:
    def product(a: Any, b: Any, *, h: Any) -> Any:
        return torch.exp(torch.sigmoid(a) * torch.tanh(b))

    def alone(a: Any, *, h: Any) -> Any:
        return torch.exp(a)

    numbers = [(define(f).K, define(f).reads_h) for f in (product, alone)]
    assert numbers == [(2, False), (0, True)]


def bad_branch(a: Any, *, h: Any) -> Any:
    return a if a > 0 else h


def bad_product(a: Any, *, h: Any) -> Any:
    return a @ h


def bad_function(a: Any, *, h: Any) -> Any:
    return torch.cumsum(a, 0)


def bad_length(a: Any, *, h: Any) -> Any:
    return a * len(h)


def bad_loop(a: Any, *, h: Any) -> Any:
    return sum(x for x in a)


def bad_math(a: Any, *, h: Any) -> Any:
    import math

    return math.exp(a)


def bad_method(a: Any, *, h: Any) -> Any:
    return a.sigmoid()


def bad_tensor(a: Any, *, h: Any) -> Any:
    return a * torch.ones(3)


def bad_text(a: Any, *, h: Any) -> Any:
    return a * "2"


def bad_complex(a: Any, *, h: Any) -> Any:
    return a * 1j


def bad_infinity(a: Any, *, h: Any) -> Any:
    return a * float("inf")


def bad_constant(a: Any, *, h: Any) -> Any:
    return 1.0


def bad_count(a: Any, *, h: Any) -> Any:
    return a, h


def bad_unused_gate(a: Any, b: Any, *, h: Any) -> Any:
    return torch.tanh(a)


def bad_unused_state(a: Any, *, h: Any, c: Any) -> Any:
    return torch.tanh(a), torch.tanh(a)


def bad_gates(
    a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, i: Any, j: Any, *, h: Any
) -> Any:
    return a + b + c + d + e + f + g + i + j


def bad_states(
    a: Any, *, h: Any, c: Any, d: Any, e: Any, f: Any, g: Any, i: Any, j: Any, k: Any
) -> Any:
    return a, c, d, e, f, g, i, j, k


def bad_no_state(a: Any) -> Any:
    return a


def bad_default(a: Any, *, h: Any = 0) -> Any:
    return a


def bad_comparison(a: Any, *, h: Any) -> Any:
    return a * (h > 0)


def bad_where(a: Any, *, h: Any) -> Any:
    return torch.where(h, a, h)


def bad_exponent(a: Any, *, h: Any) -> Any:
    return h**a


def bad_keyword(a: Any, *, h: Any) -> Any:
    return torch.add(a, h, alpha=2)


def bad_division(a: Any, *, h: Any) -> Any:
    return a / 0 if False else torch.log(h * 0 + a) + torch.where(h > 0, 1.0, 2.0) / (0 * 1)


ERRORS: dict[Callable[..., Any], str] = {
    bad_branch: "a branch: .*torch.where",
    bad_product: "@: expected .* got @ of the gate a.*Products with weights are the layer's",
    bad_function: "torch's cumsum: expected an operation on each unit by itself",
    bad_length: r"len\(\)",
    bad_loop: "iteration",
    bad_math: "Use torch's functions, as torch.exp in place of math.exp",
    bad_method: r"\.sigmoid: expected arithmetic",
    bad_tensor: "expected a gate, .* got Tensor",
    bad_text: "expected a gate, .* got str",
    bad_complex: "expected a gate, .* got complex",
    bad_infinity: "expected a finite number, got inf",
    bad_constant: "return: expected the next h, .* got float",
    bad_count: "return: expected 1 values, the next h, .* got 2",
    bad_unused_gate: "gate b: expected every gate to be used",
    bad_unused_state: "state c: expected every state but the first",
    bad_gates: "1 to 8 gates, got 9",
    bad_states: "1 to 8 states, got 9",
    bad_no_state: "1 to 8 states, got 0",
    bad_default: "parameter h: .*without defaults",
    bad_comparison: "expected a value, got the comparison",
    bad_where: "torch.where: expected a comparison first",
    bad_exponent: "expected a number as the exponent",
    bad_keyword: "torch.add: .*alpha",
}


@pytest.mark.parametrize(
    ("function", "message"), ERRORS.items(), ids=lambda v: getattr(v, "__name__", "")
)
def test_errors(function: Callable[..., Any], message: str) -> None:
    """Each names file and line of the function."""
    with pytest.raises((TypeError, ValueError, AttributeError), match=message) as caught:
        define(function)
    first = function.__code__.co_firstlineno
    place, line = str(caught.value).split(": ")[0].rsplit(":", 1)
    assert place == __file__ and first <= int(line) <= first + 4
    assert f"cell {function.__name__!r}" in str(caught.value)


def test_what_is_no_function() -> None:
    for wrong in (lambda a, *, h: a, torch.tanh, 3):
        with pytest.raises(TypeError, match="expected a function that is defined with def"):
            define(wrong)  # type: ignore[arg-type]
