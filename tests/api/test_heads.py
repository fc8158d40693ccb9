"""Layers of several heads against layers of one whose recurrent weights are zero outside of blocks,
over all options; the shapes of parameters and states; what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkernels
import written_cells
from helpers import draw, same_bits, tensors

F64 = torch.float64
HEADS, T, B, I, H = 2, 6, 4, 3, 6
X = draw(T, B, I, seed=1, dtype=F64)
LENGTHS = torch.tensor([6, 2, 0, 5])
RESET = draw(T, B, seed=2, dtype=F64) > 0.7

SCALED = rnnkernels.layer(written_cells.scaled)  # a split gate, and parameters of its own
LAYERS: dict[str, Any] = {
    "GRU": rnnkernels.GRU,
    "SLSTM": rnnkernels.SLSTM,
    "scaled": SCALED,
}
CELLS: dict[str, Any] = {
    "GRU": rnnkernels.GRUCell,
    "SLSTM": rnnkernels.SLSTMCell,
    "scaled": rnnkernels.cell_class(written_cells.scaled),
    "IndRNN": rnnkernels.IndRNNCell,
}
#: Of a layer, and of its call.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "stack-lengths": ({"num_layers": 2, "bidirectional": True}, {"lengths": LENGTHS}),
    "reset": ({"bidirectional": True, "batch_first": True}, {"reset": RESET.t()}),
    "merged": ({"bidirectional": True, "merge_mode": "mul", "num_layers": 2}, {"reset": RESET}),
    "no-bias": ({"bias": False}, {}),
    "truncate": ({"truncate": 2, "bidirectional": True}, {"lengths": LENGTHS}),
    "overlapping": ({"truncate": (2, 3), "num_layers": 2}, {}),
    "clip-value": ({"grad_clip": 0.05, "bidirectional": True}, {}),
    "recompute": ({"recompute": 2, "num_layers": 2, "bidirectional": True}, {"reset": RESET}),
    "recompute-one-way": ({"recompute": 2, "num_layers": 2}, {"lengths": LENGTHS}),
    "all-states": ({"num_layers": 2, "bidirectional": True}, {"return_all_states": True}),
}


def make(name: str, heads: int = HEADS, **options: Any) -> Any:
    torch.manual_seed(3)
    return LAYERS[name](I, H, dtype=F64, heads=heads, **options)


def gates_first(w: Tensor, heads: int, gates: int) -> Tensor:
    """Rows of a parameter that stand head by head as they stand in a layer of one head."""
    return w.unflatten(0, (heads, gates, -1)).transpose(0, 1).flatten(0, 2)


def in_blocks(w: Tensor, heads: int, gates: int) -> Tensor:
    """Recurrent weights [heads*G*Hh, Hh] as those of one head [G*H, H], zero outside of blocks."""
    each = w.unflatten(0, (heads, gates, -1))  # [heads, G, Hh, Hh]
    return torch.cat([torch.block_diag(*each[:, g]) for g in range(gates)])


def as_of_one(name: str, value: Tensor, heads: int, gates: int) -> Tensor:
    if "weight_hh" in name:
        return in_blocks(value, heads, gates)
    own = "_ih" in name or "_hh" in name
    return gates_first(value, heads, gates) if own else value


def loss(outputs: list[Tensor]) -> Tensor:
    return torch.stack([(o * o).sum() + o.sum() for o in outputs]).sum()


def compared(name: str, options: dict[str, Any], call: dict[str, Any], backend: str) -> None:
    """Outputs, states and all gradients, given states of all heads."""
    module = make(name, backend=backend, **options)
    single, gates = make(name, 1, backend=backend, **options), module.weight_ih_l0.size(0) // H
    parameters = dict(module.named_parameters())
    x = X.transpose(0, 1) if options.get("batch_first") else X
    x = x.detach().requires_grad_()
    rows = module.num_layers * (2 if module.bidirectional else 1)
    n = 4 if name == "SLSTM" else 1
    given = [draw(rows, B, H, seed=20 + k, dtype=F64).requires_grad_() for k in range(n)]
    hx = tuple(given) if n > 1 else given[0]

    got = tensors(module(x, hx, **call))
    changed = {k: as_of_one(k, p, HEADS, gates) for k, p in parameters.items()}
    want = tensors(torch.func.functional_call(single, changed, (x, hx), call))
    asked = [x, *given, *parameters.values()]
    grads = [torch.autograd.grad(loss(outputs), asked) for outputs in (got, want)]
    for a, b in zip([*got, *grads[0]], [*want, *grads[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_equals_one_head_with_blocks(name: str, option: str) -> None:
    compared(name, *OPTIONS[option], "cpu")


@pytest.mark.parametrize("option", ["stack-lengths", "reset", "truncate", "all-states"])
def test_the_reference_has_heads(option: str) -> None:
    compared("scaled", *OPTIONS[option], "reference")


@pytest.mark.parametrize("kind", ["norm", "tanh"])
def test_bounds_are_those_of_each_head(kind: str) -> None:
    """By norm each head has one of its own: the kernels against the reference."""
    found = []
    for backend in ("cpu", "reference"):
        module = make("GRU", grad_clip=(kind, 0.05), bidirectional=True, backend=backend)
        y, _ = module(X, lengths=LENGTHS)
        found.append(torch.autograd.grad(loss([y]), list(module.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_packed_and_any_threads() -> None:
    module = make("SLSTM", bidirectional=True)
    packed = pack_padded_sequence(X, torch.tensor([6, 5, 3, 1]))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs = tensors(module(packed))
            found.append([*outputs, *torch.autograd.grad(loss(outputs), list(module.parameters()))])
    finally:
        torch.set_num_threads(before)
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])
    other = make("SLSTM", bidirectional=True)
    padded = tensors(other(X, lengths=[6, 5, 3, 1]))
    for a, b in zip(found[0][1:5], padded[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_gradcheck() -> None:
    torch.manual_seed(3)
    module = rnnkernels.SLSTM(2, 4, heads=2, bidirectional=True, dtype=F64, bias=False)
    names = [n for n, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    x = draw(2, 2, 2, seed=4, dtype=F64).requires_grad_()

    def run(x: Tensor, *weights: Tensor) -> list[Tensor]:
        named = dict(zip(names, weights, strict=True))
        return tensors(torch.func.functional_call(module, named, (x,), {"reset": RESET[:2, :2]}))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *values), fast_mode=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", ["GRU", "scaled"])
def test_transforms(name: str) -> None:
    """Gradients of each row by torch.vmap; forward mode; a compiled graph."""
    module = make(name, num_layers=2)
    parameters = {n: p.detach() for n, p in module.named_parameters()}

    def of_row(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        found = torch.func.functional_call(module, parameters, (x[:, None],))[0]
        return found.square().sum()

    each = torch.func.vmap(torch.func.grad(of_row), (None, 1))(parameters, X)
    for b in range(B):
        alone = torch.func.grad(of_row)(parameters, X[:, b])
        for n in parameters:
            torch.testing.assert_close(each[n][b], alone[n], rtol=1e-10, atol=1e-12)
    change = draw(T, B, I, seed=7, dtype=F64)
    slope = torch.func.jvp(lambda x: module(x)[0].square().sum(), (X,), (change,))[1]
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(module(x)[0].square().sum(), x)
    torch.testing.assert_close(slope, (dx * change).sum(), rtol=1e-10, atol=1e-12)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X)[0], module(X)[0], rtol=1e-12, atol=1e-13)


def test_parameters() -> None:
    module = rnnkernels.LSTM(I, H, num_layers=2, bidirectional=True, heads=3)
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
    assert shapes["weight_ih_l0"] == (4 * H, I) and shapes["weight_ih_l1"] == (4 * H, 2 * H)
    assert shapes["weight_hh_l0"] == (4 * H, H // 3) and shapes["bias_hh_l1"] == (4 * H,)
    assert repr(module) == "LSTM(3, 6, num_layers=2, bidirectional=True, heads=3)"
    x = X.float()
    y, (h, c) = module(x)
    assert y.shape == (T, B, 2 * H) and h.shape == c.shape == (4, B, H)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x)[0], y)
    weights = module.all_weights
    again = rnnkernels.functional.lstm(x, None, weights, bidirectional=True, heads=3)[0]
    assert torch.equal(again, y)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str, backend: str) -> None:
    """A loop over a step is the layer; a row by itself, and the function of weights, are its."""
    of_layer = LAYERS.get(name, rnnkernels.IndRNN)
    module = of_layer(I, H, dtype=F64, heads=HEADS, backend=backend)
    cell = CELLS[name](I, H, dtype=F64, heads=HEADS, backend=backend)
    cell.load_state_dict({k.removesuffix("_l0"): p for k, p in module.state_dict().items()})
    got: list[Tensor] = []
    state = None
    for x in X:
        state = cell(x, state)
        got.append(state[0] if isinstance(state, tuple) else state)
    want = tensors(module(X))
    ends = list(state) if isinstance(state, tuple) else [state]
    torch.testing.assert_close([torch.stack(got), *ends], [want[0], *(s[0] for s in want[1:])])
    grads = [
        torch.autograd.grad(loss(outputs), list(owner.parameters()))
        for outputs, owner in (([torch.stack(got)], cell), ([want[0]], module))
    ]
    torch.testing.assert_close(*grads)
    first = tensors(cell(X[0]))
    alone = tensors(cell(X[0, 1]))
    torch.testing.assert_close(alone, [s[1] for s in first])


def test_parameters_of_cells() -> None:
    cell = rnnkernels.LSTMCell(I, H, heads=3)
    assert cell.weight_hh.shape == (4 * H, H // 3) and cell.weight_hh.abs().max() <= H**-0.5
    assert repr(cell) == "LSTMCell(3, 6, heads=3)"
    own = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    weights = rnnkernels.functional.LayerWeights(*own)
    h = rnnkernels.functional.cell("LSTMCell", "lstm", X[0].float(), None, weights, heads=3)
    assert same_bits(tensors(h), tensors(cell(X[0].float())))
    assert rnnkernels.GRUCell(I, 0, heads=2)(X[0].float()).shape == (B, 0)
    with pytest.raises(ValueError, match="heads: expected a divisor of hidden_size, 6, got 4"):
        rnnkernels.GRUCell(I, H, heads=4)
    with pytest.raises(ValueError, match=r"torch\.nn has no heads=3"):
        rnnkernels.revert(nn.Sequential(cell))
    with pytest.raises(ValueError, match="layer_norm: expected no heads beside it"):
        rnnkernels.LSTMCell(I, H, heads=3, layer_norm=True)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="heads: expected a divisor of hidden_size, 6, got 4"):
        rnnkernels.GRU(I, H, heads=4)
    with pytest.raises(ValueError, match=r"proj_size: expected 0 beside 2 heads.*got 2"):
        rnnkernels.LSTM(I, H, proj_size=2, heads=2)
    with pytest.raises(TypeError, match="heads should be of type int"):
        rnnkernels.GRU(I, H, heads=1.5)
    module = make("GRU")
    with pytest.raises(ValueError, match=r"torch\.nn has no heads=2"):
        rnnkernels.revert(nn.Sequential(module))
    with pytest.raises((RuntimeError, ValueError), match=r"torch\.nn has no heads"):
        make("GRU", backend="torch")(X)
    with (
        pytest.raises(NotImplementedError, match="heads: gradient_flow records one norm"),
        rnnkernels.diagnostics.gradient_flow(module),
    ):
        module(X.requires_grad_())
    X.requires_grad_(False)
    module.weight_hh_l0 = nn.Parameter(torch.zeros(3 * H, H, dtype=F64))
    for backend in ("cpu", "reference"):
        module.backend = backend
        with pytest.raises(RuntimeError, match=r"weight_hh_l0: expected shape \[18, 3\]"):
            module(X)
