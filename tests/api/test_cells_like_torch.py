"""Cells beside torch.nn's: sizes of zero, and the words of errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnkernels
from helpers import compare, outputs_and_gradients, require_backend
from rnnkernels import functional
from rnnkernels._core.call import LayerWeights

KINDS = ("RNNCell", "LSTMCell", "GRUCell")
BACKENDS = (None, "cpu", "reference")
I, H, B = 3, 4, 2


def pair(kind: str, inputs: int, hidden: int, backend: str | None, **options: Any) -> Any:
    """torch.nn's cell and ours, with the same parameters."""
    require_backend(backend or "reference")
    theirs = getattr(nn, kind)(inputs, hidden, **options)
    ours = getattr(rnnkernels, kind)(inputs, hidden, backend=backend, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def state(kind: str, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    h, c = (torch.randn(shape).to(dtype).requires_grad_(dtype.is_floating_point) for _ in "hc")
    return (h, c) if kind == "LSTMCell" else h


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(I, 0), (0, H), (0, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
class TestSizesOfZero:
    @pytest.mark.parametrize("given", [False, True], ids=["", "hx"])
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
    @pytest.mark.parametrize("batch", [(B,), (0,), ()], ids=str)
    def test_outputs_and_gradients(
        self, kind: str, sizes: Any, backend: Any, batch: Any, bias: bool, given: bool
    ) -> None:
        inputs, hidden = sizes
        theirs, ours = pair(kind, inputs, hidden, backend, bias=bias)
        x = torch.randn(*batch, inputs).requires_grad_()
        arguments = (x, state(kind, *batch, hidden) if given else None)
        results = [outputs_and_gradients(m, arguments, torch.float32) for m in (ours, theirs)]
        assert all(t is not None for t in results[0].values())
        compare(*results)

    def test_single_bias_and_autocast(self, kind: str, sizes: Any, backend: Any) -> None:
        inputs, hidden = sizes
        require_backend(backend or "reference")
        ours = getattr(rnnkernels, kind)(inputs, hidden, bias_mode="single", backend=backend)
        with torch.autocast("cpu"):
            found = ours(torch.randn(B, inputs))
        for t in found if kind == "LSTMCell" else (found,):
            assert t.shape == (B, hidden)
            assert t.dtype == torch.bfloat16

    def test_function(self, kind: str, sizes: Any, backend: Any) -> None:
        inputs, hidden = sizes
        theirs, ours = pair(kind, inputs, hidden, backend)
        x = torch.randn(B, inputs)
        weights = LayerWeights(*ours.parameters())
        found = functional.cell(kind, ours.cell, x, None, weights, backend=backend)
        torch.testing.assert_close(found, theirs(x))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("kind", KINDS)
def test_no_units_in_a_graph(kind: str, fresh_compiler: None) -> None:
    theirs, ours = pair(kind, I, 0, None)
    x = torch.randn(B, I)
    found = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, theirs(x))


@pytest.mark.parametrize("sizes", [(-1, H), (I, -1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_negative_sizes(kind: str, sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"(input|hidden)_size must not be negative"):
        getattr(rnnkernels, kind)(*sizes)


def x_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def wide_c(kind: str) -> Any:
    """A wrong size in the last of the states."""
    wide = torch.zeros(B, H + 1)
    return (torch.zeros(B, H), wide) if kind == "LSTMCell" else wide


def long_c(kind: str) -> Any:
    long = torch.zeros(B + 1, H)
    return (torch.zeros(B, H), long) if kind == "LSTMCell" else long


WRONG: dict[str, Callable[[str], tuple[Tensor, Any]]] = {
    "features": lambda kind: (x_of(B, I + 1), None),
    "features of one row": lambda kind: (x_of(I + 1), None),
    "rows": lambda kind: (x_of(B, I), state(kind, B + 1, H)),
    "rows of the last": lambda kind: (x_of(B, I), long_c(kind)),
    "units": lambda kind: (x_of(B, I), state(kind, B, H + 1)),
    "units of the last": lambda kind: (x_of(B, I), wide_c(kind)),
    "units of one row": lambda kind: (x_of(I), state(kind, H + 1)),
    "one row of many": lambda kind: (x_of(B, I), state(kind, H)),
    "size before dtype": lambda kind: (x_of(B, I + 1, dtype=torch.int64), None),
    "state before dtype": lambda kind: (x_of(B, I, dtype=torch.int64), state(kind, B, H + 1)),
}
DTYPES = [torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]
for d in DTYPES:
    WRONG |= {
        f"{d}": lambda kind, d=d: (x_of(B, I, dtype=d), None),
        f"{d} of all": lambda kind, d=d: (x_of(B, I, dtype=d), state(kind, B, H, dtype=d)),
        f"{d} beside": lambda kind, d=d: (x_of(B, I, dtype=d), state(kind, B, H)),
    }
    if d.is_floating_point:
        WRONG[f"{d} of hx"] = lambda kind, d=d: (x_of(B, I), state(kind, B, H, dtype=d))


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", KINDS)
def test_errors(kind: str, wrong: str, backend: str | None, autocast: bool) -> None:
    """torch.nn's type and its words; what we add stands in brackets behind them."""
    theirs, ours = pair(kind, I, H, backend)
    arguments = WRONG[wrong](kind)
    with torch.autocast("cpu", enabled=autocast):
        try:
            theirs(*arguments)
        except Exception as error:
            wanted = error
        else:  # autocast casts such an input
            assert autocast
            ours(*arguments)
            return
        with pytest.raises(type(wanted)) as caught:
            ours(*arguments)
    assert type(caught.value) is type(wanted) is RuntimeError
    assert str(caught.value).partition(" (")[0] == str(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_another_dtype(kind: str) -> None:
    """Autocast leaves float64 alone, on either side."""
    theirs, ours = pair(kind, I, H, None, dtype=torch.float64)
    for autocast in (False, True):
        with torch.autocast("cpu", enabled=autocast):
            texts = []
            for cell in (theirs, ours):
                with pytest.raises(RuntimeError) as caught:
                    cell(x_of(B, I))
                texts.append(str(caught.value).partition(" (")[0])
            assert texts[0] == texts[1]
            torch.testing.assert_close(*(cell(x_of(B, I).double()) for cell in (ours, theirs)))
