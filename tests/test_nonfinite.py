"""NaN and infinity spread as in torch.nn: outputs, states and gradients, wherever they come from.

A loss that has become NaN has to show; a number that looks plausible in its place hides it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import op_parity
import pytest
import torch
from helpers import tensors
from nonfinite import INF, NAN, SPECIAL, check, difference, largest
from op_parity import CLIPS, Case
from torch import Tensor, nn

import rnnkernels
from rnnkernels import ops
from rnnkernels.call import Clip
from rnnkernels.cells import CELLS

T, I, H = 12, 3, 5
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tanh": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "proj": ("LSTM", {"proj_size": 4}),
    "relu-bi": ("RNN", {"nonlinearity": "relu", "bidirectional": True, "num_layers": 2}),
    "lstm-bi": ("LSTM", {"bidirectional": True}),
    "gru-2": ("GRU", {"num_layers": 2}),
}
CELL_MODULES = {"tanh": "RNNCell", "relu": "RNNCell", "lstm": "LSTMCell", "gru": "GRUCell"}


def _set(where: str, value: float) -> Any:
    def change(module: nn.Module, x: Tensor, states: list[Tensor]) -> None:
        if where == "input":
            x[(2,) * (x.dim() - 2) + (-1, 0)] = value
        elif where == "bias":
            next(p for n, p in module.named_parameters() if "bias_hh" in n)[1] = value
        elif where == "weight":
            next(p for n, p in module.named_parameters() if "weight_hh" in n)[1, 2] = value
        else:
            states[where == "c"][..., -1, 1] = value

    return change


def _huge(module: nn.Module, x: Tensor, states: list[Tensor]) -> None:
    """Products that overflow, all to one side: of both, it depends on fused additions what is left."""
    for name, p in module.named_parameters():
        if "weight" in name:
            p.copy_(p.abs() * largest(p) ** 0.8)
    x.copy_(x.abs() * largest(x) ** 0.5)


def _doubling(module: nn.Module, x: Tensor, states: list[Tensor]) -> None:
    for name, p in module.named_parameters():
        if "weight_hh" in name:
            rows, R = p.shape
            p.copy_(torch.eye(R).repeat(-(-rows // R), 1)[:rows] * largest(p) ** 0.2)


def _closed(module: nn.Module, x: Tensor, states: list[Tensor]) -> None:
    """Gates that are shut in front of a huge state: its share is 0, not a number in between."""
    for name, p in module.named_parameters():
        if "bias" in name:
            p.fill_(-200)
    states[-1].fill_(largest(x) ** 0.95)


NUMBERS = {"nan": NAN, "inf": INF, "-inf": -INF}
PLACES = ("input", "h", "c", "weight", "bias")
SPECIALS = {
    **{f"{word} {where}": _set(where, value) for where in PLACES for word, value in NUMBERS.items()},
    "huge": _huge,
    "doubling": _doubling,
    "closed": _closed,
}
BACKENDS = ["cpu", "reference", "torch"]


@pytest.fixture(autouse=True)
def _without_onednn() -> Iterator[None]:
    """oneDNN's LSTM, which torch.nn takes in float32, makes plausible numbers of some NaN."""
    before = torch.backends.mkldnn.enabled
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(before)


def has_c(kind: str) -> bool:
    return kind.startswith(("lstm", "proj"))


def build(
    kind: str, title: str, rows: int, dtype: torch.dtype, cell: bool
) -> tuple[list[Any], Tensor, list[Tensor]]:
    """The layer of torch.nn and ours of the same numbers, an input and states."""
    torch.manual_seed(0)
    name, options = LAYERS[kind]
    name = f"{name}Cell" if cell else name
    theirs = getattr(nn, name)(I, H, **options)
    x = torch.randn(rows, I) if cell else torch.randn(T, rows, I)
    R = options.get("proj_size", H)
    D = 2 if options.get("bidirectional") else 1
    first = () if cell else (D * options.get("num_layers", 1),)
    states = [torch.rand(*first, rows, width) for width in (R, H)[: 1 + has_c(kind)]]
    theirs, x, states = theirs.to(dtype), x.to(dtype), [s.to(dtype) for s in states]
    with torch.no_grad():
        SPECIALS[title](theirs, x, states)
    ours = getattr(rnnkernels, name)(I, H, **options).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return [theirs, ours], x, states


def run(module: Any, x: Tensor, states: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs, and the gradients of a loss of all outputs."""
    leaves = [t.clone().requires_grad_() for t in (x, *states)]
    hx = tuple(leaves[1:]) if len(states) > 1 else leaves[1]
    outs = tensors(module(leaves[0], hx, **options))
    names = [*(["x", "h", "c"][: len(leaves)]), *(n for n, _ in module.named_parameters())]
    grads = torch.autograd.grad(sum(o.sum() for o in outs), [*leaves, *module.parameters()])
    return {
        **{f"output {n}": o.detach() for n, o in enumerate(outs)},
        **{f"gradient of {n}": g for n, g in zip(names, grads, strict=True)},
    }


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    wrong = {name: difference(got[name], want[name]) for name in want}
    assert not any(wrong.values()), {name: text for name, text in wrong.items() if text}


def skipped(kind: str, title: str) -> bool:
    return title.endswith(" c") and not has_c(kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("title", SPECIALS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind: str, title: str, dtype: torch.dtype) -> None:
    if skipped(kind, title):
        pytest.skip("has no c")
    for rows in (1, 3):
        (theirs, ours), x, states = build(kind, title, rows, dtype, cell=False)
        want = run(theirs, x, states)
        for backend in BACKENDS:
            with rnnkernels.use_backend(backend):
                assert_same(run(ours, x, states), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("title", SPECIALS)
@pytest.mark.parametrize("kind", CELL_MODULES)
def test_cells(kind: str, title: str, dtype: torch.dtype) -> None:
    if skipped(kind, title):
        pytest.skip("has no c")
    for rows in (1, 3):
        (theirs, ours), x, states = build(kind, title, rows, dtype, cell=True)
        want = run(theirs, x, states)
        for backend in BACKENDS:
            with rnnkernels.use_backend(backend):
                assert_same(run(ours, x, states), want)
