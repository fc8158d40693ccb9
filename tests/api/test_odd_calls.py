"""Calls that random inputs found to go wrong: they are right now, or refused by a clear error."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkernels as rk
from helpers import draw
from rnnkernels.functional import lstm
from rnnkernels.nn.base import ADDED, RNNBase
from rnnkernels.nn.options import Options

KINDS = ("RNN", "LSTM", "GRU")
X = torch.zeros(4, 2, 3)


def results(layer: Any, x: Tensor, **call: Any) -> list[Tensor]:
    y, h_n = layer(x, **call)
    states = h_n if isinstance(h_n, tuple) else (h_n,)
    loss = torch.stack([t.square().sum() for t in (y, *states)]).sum()
    return [y, *states, *torch.autograd.grad(loss, list(layer.parameters()), allow_unused=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_input_that_is_negated_lazily(kind: str) -> None:
    """As ``z.conj().imag`` is; the products of backward read memory themselves."""
    layer, x = getattr(rk, kind)(3, 4, num_layers=2), draw(5, 2, 3, seed=1, dtype=torch.float32)
    for got, want in zip(results(layer, torch._neg_view(x)), results(layer, -x), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_without_a_batch_and_without_rows(kind: str) -> None:
    layer, x = (
        getattr(rk, kind)(3, 4, heads=2, bidirectional=True),
        draw(5, 1, 3, seed=1, dtype=torch.float32),
    )
    for got, want in zip(results(layer, x[:, 0])[:2], results(layer, x)[:2], strict=True):
        assert torch.equal(got, want.squeeze(1))
    states = torch.zeros(2, 0, 4)
    hx = (states, states) if kind == "LSTM" else states
    y, _, every = layer(torch.zeros(5, 0, 3), hx, return_all_states=True)
    assert y.shape == (5, 0, 8) and every.h[0].shape == (5, 0, 2, 4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("GRU", {"layer_norm": True}), ("LSTM", {"layer_norm": True}), ("PeepholeLSTM", {})],
)
def test_no_steps_in_windows(kind: str, options: dict[str, Any]) -> None:
    """Parameters of a cell, whose gradients are gathered window by window: of none at all."""
    layer = getattr(rk, kind)(3, 4, bidirectional=True, truncate=2, **options)
    for gradient in results(layer, torch.zeros(0, 2, 3))[3:]:
        assert gradient is None or not gradient.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [np.asarray, np.ndarray.tolist, torch.as_tensor])
def test_reset_and_lengths_of_other_kinds(kind: str, make: Callable[[Any], Any]) -> None:
    layer, x = getattr(rk, kind)(3, 4), draw(4, 2, 3, seed=1, dtype=torch.float32)
    marks, lengths = np.array([[0, 1], [1, 0], [0, 0], [1, 1]], bool), np.array([4, 2])
    call = {"reset": torch.as_tensor(marks), "lengths": [4, 2]}
    got, want = layer(x, reset=make(marks), lengths=make(lengths))[0], layer(x, **call)[0]
    assert torch.equal(got, want)
    alone = layer(x[:, 0], reset=make(marks[:, 0]))[0]
    assert torch.equal(alone, layer(x[:, :1], reset=call["reset"][:, :1])[0][:, 0])


PACKED = pack_padded_sequence(X, torch.tensor([2, 4]), enforce_sorted=False)


def with_parts(**parts: Any) -> PackedSequence:
    return tuple.__new__(PackedSequence, PACKED._replace(**parts))


def layer() -> Any:
    return rk.LSTM(3, 4)


REFUSED: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (ValueError, "input: expected a dense tensor", lambda: layer()(X.to_sparse())),
    (ValueError, "hx: expected a dense", lambda: rk.GRU(3, 4)(X, torch.zeros(1, 2, 4).to_sparse())),
    (ValueError, "input: expected a dense", lambda: rk.GRUCell(3, 4)(X[0].to_sparse())),
    (TypeError, "weights: expected a list of tensors.*int", lambda: lstm(X, None, 3)),  # type: ignore[arg-type]
    (TypeError, "weights: expected a list.*int in it", lambda: lstm(X, None, [3])),  # type: ignore[list-item]
    (ValueError, r"backend: expected one of .* got \[\]", lambda: rk.LSTM(3, 4, backend=[])),  # type: ignore[arg-type]
    (TypeError, "hidden_size should be of type int, got: Tensor", lambda: rk.LSTM(3, X)),  # type: ignore[arg-type]
    (TypeError, "truncate: expected a number of steps.* Tensor", lambda: layer()(X, truncate=X)),
    (TypeError, "return_all_states should be.*bool", lambda: layer()(X, return_all_states=X)),
    (TypeError, "reset: expected a Tensor, an array or lists", lambda: layer()(X, reset="x")),
    (TypeError, "reset: expected .* equal lengths", lambda: layer()(X, reset=[[True], []])),
    (TypeError, "input: expected a PackedSequence of a Tensor",
     lambda: layer()(with_parts(data=3))),
    (ValueError, "batch_sizes: expected at most 6 steps",
     lambda: layer()(with_parts(batch_sizes=torch.ones((), dtype=torch.int64).expand(2**44)))),
    (ValueError, "input: expected fewer than 2147483648 steps",
     lambda: layer()(with_parts(data=X[:1, :1].expand(2**59, 1, 3)[:, 0],
                                batch_sizes=torch.ones((), dtype=torch.int64).expand(2**59)))),
    (ValueError, "input: expected a dense tensor",
     lambda: layer()(with_parts(data=PACKED.data.to_sparse()))),
    (TypeError, "sorted_indices: expected an int64",
     lambda: layer()(with_parts(sorted_indices="x"))),
    (ValueError, "unsorted_indices: expected rows from 0 to 1",
     lambda: layer()(with_parts(unsorted_indices=torch.tensor([0, 7])))),
    (RuntimeError, "sorted_indices: expected device cpu",
     lambda: layer()(with_parts(sorted_indices=torch.zeros(2, dtype=torch.int64, device="meta")))),
    (TypeError, r"LSTM.__init__\(\) got an .*'hiden_size'. Did you mean 'hidden_size'",
     lambda: rk.LSTM(3, 4, hiden_size=4)),  # type: ignore[call-arg]
    (TypeError, r"MGU.__init__\(\) got an .*'merge'", lambda: rk.MGU(3, 4, merge="sum")),  # type: ignore[call-arg]
]  # fmt: skip


@pytest.mark.parametrize(("error", "text", "call"), REFUSED, ids=[t[:28] for _, t, _ in REFUSED])
def test_refused(error: type[Exception], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=text) as caught:
        call()
    assert type(caught.value) is error


def test_every_option_stands_in_signatures() -> None:
    """Of layers, for ``help`` and completion; and in the type that checkers read."""
    base = inspect.signature(RNNBase.__init__).parameters
    named = {name for name, p in base.items() if p.kind is p.KEYWORD_ONLY}
    assert named == set(ADDED) == set(Options.__annotations__)
    for cls in (rk.RNN, rk.LSTM, rk.GRU, rk.MGU):
        found = inspect.signature(cls).parameters
        assert named <= set(found) and "options" not in found
        assert {name: found[name].default for name in named} == ADDED


def test_slstm_whose_n_is_met_by_as_much() -> None:
    """A first n below zero, as no SLSTM leaves it, of which f n + i leaves a ten-thousandth.

    c / n is as exact as that difference. The kernels are no further from float64 than the reference
    is when it computes in float32 as well, and both are further than random calls may be.
    """
    layer, x = rk.SLSTM(3, 8), draw(1, 4, 3, seed=1, dtype=torch.float32)
    zero = torch.zeros(1, 4, 8)
    # n' = f n + i, by two of n
    once, twice = (layer(x, (zero + 0.5, zero, zero + n, zero))[1][2] for n in (1, 2))
    f = (twice - once).detach()
    n = -(once.detach() - f) / f * (1 + 1e-4)
    hx = (zero + 0.5, zero + 1, n, zero)
    exact = rk.SLSTM(3, 8, dtype=torch.float64, backend="reference")
    exact.load_state_dict(layer.state_dict())
    want = results(exact, x.double(), hx=tuple(s.double() for s in hx))[5:]
    kernels = results(layer, x, hx=hx)[5:]
    layer.backend = "reference"
    reference = results(layer, x, hx=hx)[5:]
    for a, b, c in zip(kernels, reference, want, strict=True):
        off, own = (float((t - c).abs().max() / c.abs().max()) for t in (a, b))
        assert own > 2e-4 and off < 8 * own, (off, own)
