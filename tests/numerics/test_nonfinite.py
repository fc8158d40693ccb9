"""NaN and infinity spread as in torch.nn: outputs, states and gradients, wherever they come from.

A loss that has become NaN has to show; a number that looks plausible in its place hides it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nonfinite
import rnnkernels
from helpers import tensors
from nonfinite import INF, NAN, difference, largest
from op_parity import Case

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
    """Products that overflow to one side; of two sides, fused additions decide what is left."""
    for name, p in module.named_parameters():
        if "weight" in name:
            p.copy_(p.abs() * largest(p) ** 0.8)
    x.copy_(x.abs() * largest(x) ** 0.5)


def _doubling(module: nn.Module, x: Tensor, states: list[Tensor]) -> None:
    for name, p in module.named_parameters():
        if "weight_hh" in name:
            rows, R = p.shape
            p.copy_(torch.eye(R, dtype=p.dtype).repeat(-(-rows // R), 1)[:rows] * largest(p) ** 0.2)


def _closed(module: nn.Module, x: Tensor, states: list[Tensor]) -> None:
    """Gates that are shut in front of a huge state: its share is 0, not a number in between."""
    for name, p in module.named_parameters():
        if "bias" in name:
            p.fill_(-200)
    states[-1].fill_(largest(x) ** 0.95)


NUMBERS = {"nan": NAN, "inf": INF, "-inf": -INF}
PLACES = ("input", "h", "c", "weight", "bias")
SPECIALS = {
    **{
        f"{word} {where}": _set(where, value) for where in PLACES for word, value in NUMBERS.items()
    },
    "huge": _huge,
    "doubling": _doubling,
    "closed": _closed,
}
BACKENDS = ["cpu", "reference", "torch"]
OTHERS = [torch.float64, torch.bfloat16, torch.float16]


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
        for backend in BACKENDS[:rows]:
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


LENGTHS = [7, 0, T, 3]
#: In a row of every length; one at the first step, one where a row ends.
RESETS = [(0, 0), (2, 0), (5, 2), (0, 2), (3, 3), (2, 3)]


def by_pieces(
    module: nn.Module, x: Tensor, states: list[Tensor], lengths: list[int], reset: Tensor
) -> list[Tensor]:
    """y and final states of torch.nn, which knows no resets: every piece between them alone."""
    rows_y, rows_final = [], []
    split = len(states) > 1
    for b, n in enumerate(lengths):
        starts = [0, *(t for t in range(1, n) if reset[t, b]), n]
        state = [s[:, b : b + 1] for s in states]
        enters = [torch.zeros_like(s) for s in state] if n and reset[0, b] else state
        pieces = []
        for start, end in pairwise(starts):
            if start == end:
                continue
            state = enters if start == 0 else [torch.zeros_like(s) for s in enters]
            piece, state = module(x[start:end, b : b + 1], tuple(state) if split else state[0])
            state = list(state) if split else [state]
            pieces.append(piece)
        width = module(x[:1, :1])[0].size(2)
        rows_y.append(torch.cat([*pieces, x.new_zeros(T - n, 1, width)]))
        rows_final.append(state)
    return [torch.cat(rows_y, 1), *(torch.cat(s, 1) for s in zip(*rows_final, strict=True))]


class Pieces(nn.Module):
    def __init__(self, module: nn.Module, lengths: list[int], reset: Tensor) -> None:
        super().__init__()
        self.module, self.lengths, self.reset = module, lengths, reset

    def forward(self, x: Tensor, hx: Any) -> list[Tensor]:
        states = list(hx) if isinstance(hx, tuple) else [hx]
        return by_pieces(self.module, x, states, self.lengths, self.reset)


@pytest.mark.parametrize("resets", [False, True], ids=["lengths", "resets"])
@pytest.mark.parametrize("title", SPECIALS)
@pytest.mark.parametrize("kind", ["tanh", "relu", "lstm", "gru", "proj"])
def test_rows_end_and_are_cut(kind: str, title: str, resets: bool) -> None:
    """What a row leaves behind at its end, or at a reset, is multiplied by no zero gradient."""
    if skipped(kind, title):
        pytest.skip("has no c")
    (theirs, ours), x, states = build(kind, title, len(LENGTHS), torch.float64, cell=False)
    reset = torch.zeros(T, len(LENGTHS), dtype=torch.bool)
    for t, b in RESETS if resets else ():
        reset[t, b] = True
    if title.endswith("input"):  # the last step of a row, and the last before a cut
        x[LENGTHS[0] - 1, 0] = x[1, 3] = x[-1, -1]
        x[2, -1] = 0.5
    want = run(Pieces(theirs, LENGTHS, reset), x, states)
    want = {name.replace("module.", ""): t for name, t in want.items()}
    for backend in ("cpu", "reference"):
        with rnnkernels.use_backend(backend):
            got = run(ours, x, states, lengths=LENGTHS, reset=reset if resets else None)
        assert_same(got, want)


@pytest.mark.parametrize(
    ("case", "title", "dtype"),
    [
        *((*visit, torch.float32) for visit in nonfinite.TITLES),
        *((*visit, dtype) for dtype in OTHERS for visit in nonfinite.SOME),
    ],
    ids=str,
)
def test_ops(case: Case, title: str, dtype: torch.dtype) -> None:
    """Every option of the kernels in every precision, against the reference."""
    if dtype == torch.float16 and title in ("huge", "doubling"):
        pytest.skip("gradients of the gates overflow in float16 alone")
    nonfinite.check(torch.ops.rnnkernels, case, title, dtype)
