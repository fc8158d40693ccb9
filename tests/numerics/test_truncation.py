"""truncate= against plain loops that detach, and what it leaves alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rnnkernels as rk
from rnnkernels.testing import assert_close
from truncation_oracle import Run, Truncate, gradients, oracle

RTOL = 1e-12
LAYERS: dict[str, Any] = {
    "tanh": rk.RNN,
    "relu": lambda *args, **kwargs: rk.RNN(*args, nonlinearity="relu", **kwargs),
    "sigmoid": lambda *args, **kwargs: rk.RNN(*args, nonlinearity="sigmoid", **kwargs),
    "gru": rk.GRU,
    "lstm": rk.LSTM,
}
T, B, I, H = 11, 3, 4, 6
#: 11 is a multiple of none but 1 and itself.
KINDS: list[Truncate] = [1, 2, 4, 11, 50, (1, 1), (1, 5), (2, 3), (4, 4), (3, 8), (4, 50), (50, 60)]


def build(name: str, T: int = T, B: int = B, seed: int = 0, **options: Any) -> tuple[Any, Run]:
    torch.manual_seed(seed)
    module = LAYERS[name](I, H, **options).double()
    rows = module.num_layers * (2 if module.bidirectional else 1)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    sizes = [options.get("proj_size") or H] + [H] * (name == "lstm")
    hx = [torch.randn(rows, B, n, dtype=torch.float64).mul_(0.5).requires_grad_() for n in sizes]
    return module, Run(x, hx, None)


def one_call(
    module: Any, run: Run, truncate: Truncate | None, **kwargs: Any
) -> tuple[Tensor, list[Tensor]]:
    hx: Any = run.hx[0] if len(run.hx) == 1 else tuple(run.hx)
    y, states = module(run.x, hx, reset=run.reset, truncate=truncate, **kwargs)
    return y, [states] if isinstance(states, Tensor) else list(states)


def assert_equals_oracle(
    module: Any, run: Run, truncate: Truncate, lengths: list[int] | None = None
) -> None:
    """Outputs bit-identical to the plain ones, every gradient as the loops have it."""
    inputs = [run.x, *run.hx, *module.parameters()]
    expected, expected_grads = gradients(lambda: oracle(module, run, truncate, lengths), inputs)
    outs, grads = gradients(lambda: one_call(module, run, truncate, lengths=lengths), inputs)
    plain, states = one_call(module, run, None, lengths=lengths)
    assert all(map(torch.equal, outs, [plain, *states]))
    assert_close(outs, expected, rtol=RTOL, name="outputs")
    assert_close(grads, expected_grads, rtol=RTOL, name="gradients")


@pytest.mark.parametrize("truncate", KINDS, ids=str)
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_loop(name: str, num_layers: int, truncate: Truncate) -> None:
    assert_equals_oracle(*build(name, num_layers=num_layers), truncate)


@pytest.mark.parametrize("truncate", [3, (2, 5)], ids=str)
@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("name", ["tanh", "gru", "lstm"])
def test_equals_the_loop_with_options(
    name: str, num_layers: int, options: tuple[bool, bool, bool], truncate: Truncate
) -> None:
    lengths, reset, projection = options
    if projection and name != "lstm":
        return
    module, run = build(name, num_layers=num_layers, **({"proj_size": 2} if projection else {}))
    if reset:
        run.reset = torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.25
    assert_equals_oracle(module, run, truncate, [11, 6, 0] if lengths else None)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_loop_on_drawn_cases(data: st.DataObject) -> None:
    steps, rows = data.draw(st.integers(1, 14), "T"), data.draw(st.integers(1, 4), "B")
    k1 = data.draw(st.integers(1, 16), "k1")
    truncate = data.draw(st.sampled_from([k1, (k1, k1 + data.draw(st.integers(0, 9), "more"))]))
    name = data.draw(st.sampled_from(list(LAYERS)), "layer")
    module, run = build(name, steps, rows, num_layers=data.draw(st.integers(1, 2), "L"))
    lengths = data.draw(st.none() | st.lists(st.integers(0, steps), min_size=rows, max_size=rows))
    if data.draw(st.booleans(), "reset"):
        run.reset = torch.rand(steps, rows) < data.draw(st.sampled_from([0.1, 0.5]))
    assert_equals_oracle(module, run, truncate, lengths)


def reversed_loop(module: Any, run: Run, k: int) -> tuple[Tensor, list[Tensor]]:
    """The reverse direction as a layer of its own over flipped input.

    Its windows have the boundaries of the forward ones, so the short one comes first.
    """
    alone = type(module)(I, H).double()
    weights = {name: getattr(module, name + "_reverse") for name, _ in alone.named_parameters()}
    x, states = run.x.flip(0), [s[1:] for s in run.hx]
    first = x.size(0) % k or k
    ys = []
    for start, end in itertools.pairwise([0, *range(first, x.size(0) + 1, k)]):
        if start:
            states = [s.detach() for s in states]
        hx = states[0] if len(states) == 1 else tuple(states)
        y, final = torch.func.functional_call(alone, weights, (x[start:end], hx))
        states = [final] if isinstance(final, Tensor) else list(final)
        ys.append(y)
    return torch.cat(ys).flip(0), states


@pytest.mark.parametrize("k", [1, 3, 4, 11, 20])
@pytest.mark.parametrize("name", ["tanh", "gru", "lstm"])
def test_reverse_direction_has_the_same_boundaries(name: str, k: int) -> None:
    module, run = build(name, bidirectional=True)
    reverse = {n: p for n, p in module.named_parameters() if n.endswith("_reverse")}
    inputs = [run.x, *run.hx, *reverse.values()]

    def ours() -> tuple[Tensor, list[Tensor]]:
        y, states = one_call(module, run, k)
        return y[..., H:], [s[1:] for s in states]

    outs, grads = gradients(ours, inputs)
    expected, expected_grads = gradients(lambda: reversed_loop(module, run, k), inputs)
    assert_close(outs, expected, rtol=RTOL)
    assert_close(grads, expected_grads, rtol=RTOL)
