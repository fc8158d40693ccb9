"""MGU, CIFG, PeepholeLSTM, IndRNN and SLSTM: their papers' formulas in NumPy, derivatives, every
option against the reference; the parameters of a cell itself, which PeepholeLSTM has."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkernels
import written_cells
from cases import make_call
from helpers import draw, same_bits, tensors
from rnnkernels._backends import triton
from rnnkernels._core.call import LayerWeights
from rnnkernels.cells import DefinedCell
from rnnkernels.nn import gated

F64 = torch.float64
T, B, I, H = 6, 4, 3, 5
X = draw(T, B, I, seed=1, dtype=F64)
LENGTHS = torch.tensor([6, 2, 0, 5])
RESET = draw(T, B, seed=2, dtype=F64) > 0.7

Array = Any
#: The next states of the units of one row: from the parts of each gate, states and parameters.
Step = Callable[..., list[Array]]


def sigmoid(a: Array) -> Array:
    return 1 / (1 + np.exp(-a))


def mgu(x: Array, g: Array, state: list[Array], p: list[Array]) -> list[Array]:
    """Zhou et al. 2016, equations 6, but for the place of the gate."""
    f = sigmoid(x[0] + g[0])
    n = np.tanh(x[1] + f * g[1])
    return [(1 - f) * state[0] + f * n]


def cifg(x: Array, g: Array, state: list[Array], p: list[Array]) -> list[Array]:
    """Greff et al. 2017, without peepholes: f = 1 - i."""
    i, z, o = sigmoid(x[0] + g[0]), np.tanh(x[1] + g[1]), sigmoid(x[2] + g[2])
    c = z * i + state[1] * (1 - i)
    return [np.tanh(c) * o, c]


def peephole_lstm(x: Array, g: Array, state: list[Array], p: list[Array]) -> list[Array]:
    """Gers and Schmidhuber 2000; the output gate looks at the new c."""
    i, f = sigmoid(x[0] + g[0] + p[0] * state[1]), sigmoid(x[1] + g[1] + p[1] * state[1])
    c = f * state[1] + i * np.tanh(x[2] + g[2])
    return [sigmoid(x[3] + g[3] + p[2] * c) * np.tanh(c), c]


def ind_rnn(x: Array, g: Array, state: list[Array], p: list[Array]) -> list[Array]:
    """Li et al. 2018, equation 4."""
    return [np.maximum(x[0] + p[0] * state[0], 0)]


def slstm(x: Array, g: Array, state: list[Array], p: list[Array]) -> list[Array]:
    """Beck et al. 2024, equations 8 to 17, with a forget gate that is a sigmoid; without what keeps
    exponentials small where that changes nothing: c and n are those of the paper times exp(-m)."""
    i, f, z, o = (a + b for a, b in zip(x, g, strict=True))
    _, c, n, m = state
    c = sigmoid(f) * c * np.exp(m) + np.exp(i) * np.tanh(z)
    n = sigmoid(f) * n * np.exp(m) + np.exp(i)
    m = np.where(state[2] == 0, i, np.maximum(i, m + np.log(sigmoid(f))))
    return [sigmoid(o) * c / n, c * np.exp(-m), n * np.exp(-m), m]


FORMULAS: dict[str, tuple[Step, int, int]] = {  # with gates and states
    "MGU": (mgu, 2, 1),
    "CIFG": (cifg, 3, 2),
    "PeepholeLSTM": (peephole_lstm, 4, 2),
    "IndRNN": (ind_rnn, 1, 1),
    "SLSTM": (slstm, 4, 4),
}
NAMES = list(FORMULAS)


def make(name: str, *sizes: int, seed: int = 3, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    module: nn.Module = getattr(rnnkernels, name)(*(sizes or (I, H)), dtype=F64, **options)
    return module


def by_formula(name: str, module: Any, lengths: Any = None, reset: Any = None) -> list[Array]:
    """Output and last states, a step of a unit at a time."""
    step, gates, states = FORMULAS[name]
    value = {n: p.detach().numpy() for n, p in module.named_parameters()}
    own = module.definition.params
    lengths = [T] * B if lengths is None else lengths.tolist()
    cut = np.zeros((T, B), bool) if reset is None else reset.numpy()
    D = 2 if module.bidirectional else 1
    x, lasts = X.numpy(), []
    for layer in range(module.num_layers):
        y = np.zeros((T, B, D * H))
        for d in range(D):
            at = f"_l{layer}" + "_reverse" * d
            params = [value[f"weight_{p}{at}"] for p in own]
            last = np.zeros((states, B, H))
            for b in range(B):
                state = [np.zeros(H) for _ in range(states)]
                steps = range(lengths[b]) if d == 0 else reversed(range(lengths[b]))
                for t in steps:
                    boundary = t + d
                    if boundary < lengths[b] and cut[boundary, b]:
                        state = [np.zeros(H) for _ in range(states)]
                    gx = value["weight_ih" + at] @ x[t, b] + value["bias_ih" + at]
                    gh = np.zeros_like(gx)
                    if module.definition.recurrent:
                        gh = value["weight_hh" + at] @ state[0] + value["bias_hh" + at]
                    state = step(np.split(gx, gates), np.split(gh, gates), state, params)
                    y[t, b, d * H : (d + 1) * H] = state[0]
                last[:, b] = state
            lasts.append(last)
        x = y
    return [x, *(np.stack([last[s] for last in lasts]) for s in range(states))]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_is_its_formula(name: str, backend: str) -> None:
    for of_layer, of_call in (
        ({}, {}),
        ({"num_layers": 2, "bidirectional": True}, {"lengths": LENGTHS, "reset": RESET}),
    ):
        module = make(name, backend=backend, **of_layer)
        got = tensors(module(X, **of_call))
        for a, b in zip(got, by_formula(name, module, **of_call), strict=True):
            torch.testing.assert_close(a, torch.from_numpy(b), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str) -> None:
    module = make(name, 2, 2, bidirectional=True)
    names = [n for n, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    x = draw(3, 2, 2, seed=4, dtype=F64).requires_grad_()
    given = {"lengths": torch.tensor([3, 1]), "reset": RESET[:3, :2]}

    def run(x: Tensor, *weights: Tensor) -> list[Tensor]:
        parameters = dict(zip(names, weights, strict=True))
        return tensors(torch.func.functional_call(module, parameters, (x,), given))

    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


#: Of a layer, and of its call.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stack": ({"num_layers": 3, "bidirectional": True}, {}),
    "lengths-reset": ({"bidirectional": True}, {"lengths": LENGTHS, "reset": RESET}),
    "merged": ({"bidirectional": True, "merge_mode": "sum", "num_layers": 2}, {}),
    "one-bias": ({"bias_mode": "single", "batch_first": True}, {}),
    "no-bias": ({"bias": False}, {"reset": RESET}),
    "truncate": ({"truncate": 2, "bidirectional": True}, {"lengths": LENGTHS}),
    "overlapping": ({"truncate": (2, 3)}, {}),
    "clip-norm": ({"grad_clip": ("norm", 0.1), "num_layers": 2}, {}),
    "clip-value": ({"grad_clip": 0.05}, {"reset": RESET}),
    "recompute": ({"recompute": 2, "num_layers": 2, "bidirectional": True}, {"lengths": LENGTHS}),
    "all-states": ({"num_layers": 2, "bidirectional": True}, {"return_all_states": True}),
    "projection": ({"proj_size": 2, "num_layers": 2}, {"reset": RESET}),
}


def results(module: Any, x: Any, **options: Any) -> list[Tensor]:
    """All outputs and gradients."""
    module.zero_grad()
    x = x.detach().requires_grad_() if isinstance(x, Tensor) else x
    outputs = tensors(module(x, **options))
    torch.stack([(o * o).sum() + o.sum() for o in outputs]).sum().backward()
    gradients = [p.grad for p in module.parameters()]
    return [*outputs, *gradients, *([x.grad] if isinstance(x, Tensor) else [])]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_reference(name: str, option: str) -> None:
    if name in ("MGU", "IndRNN") and option == "projection":
        pytest.skip("no projection")
    of_layer, of_call = OPTIONS[option]
    module, other = make(name, **of_layer), make(name, backend="reference", **of_layer)
    pairs = zip(results(module, X, **of_call), results(other, X, **of_call), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_packed() -> None:
    x = pack_padded_sequence(X, torch.tensor([6, 5, 3, 1]))
    for name in NAMES:
        module, other = make(name, bidirectional=True), make(name, backend="reference")
        other = make(name, bidirectional=True, backend="reference")
        for got, want in zip(results(module, x), results(other, x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_a_step_of_the_layer(name: str) -> None:
    module = make(name)
    torch.manual_seed(0)
    step = getattr(rnnkernels, f"{name}Cell")(I, H, dtype=F64)
    step.load_state_dict({n.removesuffix("_l0"): p for n, p in module.state_dict().items()})
    weights = list(step.parameters())
    matrices = step.weight_ih, step.weight_hh, step.bias_ih, step.bias_hh
    own = LayerWeights(*matrices, params=step._params())
    alone = rnnkernels.functional.cell("MyCell", step.definition, X[0], None, own)
    for rows in (X[:1], X[:1, :1]):
        got, want = tensors(step(rows[0])), tensors(module(rows)[1])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b[0], rtol=1e-12, atol=1e-13)
        of_step = torch.autograd.grad(got[0].square().sum(), weights, allow_unused=True)
        of_layer = torch.autograd.grad(want[0].square().sum(), list(module.parameters()))
        for a, b in zip(of_step, of_layer, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(tensors(alone), tensors(step(X[0])), rtol=1e-12, atol=1e-13)
    y = rnnkernels.functional.layers(step.definition, X, None, module.all_weights)[0]
    assert torch.equal(y, module(X)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    module = make("PeepholeLSTM", 5, 37, bidirectional=True).to(dtype)
    wide = copy.deepcopy(module).double()
    wide.backend = "reference"  # type: ignore[assignment]
    x = draw(7, 9, 5, seed=5, dtype=F64).to(dtype)
    got, want = (
        results(module, x, lengths=[7] * 8 + [3]),
        results(wide, x.double(), lengths=[7] * 8 + [3]),
    )
    rtol = 1e-4 if dtype == torch.float32 else 0.05
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol * b.abs().max().item())


def test_the_same_bits_with_any_threads() -> None:
    module = make("PeepholeLSTM", 8, 67, bidirectional=True).float()
    x = draw(9, 21, 8, seed=6, dtype=torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([t.clone() for t in results(module, x, lengths=[9] * 20 + [4])])
    finally:
        torch.set_num_threads(before)
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


def test_transforms() -> None:
    """Gradients of each row by torch.vmap; lanes with parameters of their own; forward mode."""
    module = make("PeepholeLSTM")
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x[:, None],))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, X)
    models = {n: torch.stack([p + 0.1 * k for k in range(B)]) for n, p in parameters.items()}
    several = torch.func.vmap(torch.func.grad(loss), (0, 1))(models, X)
    for b in range(B):
        alone = torch.func.grad(loss)(parameters, X[:, b])
        other = torch.func.grad(loss)({n: m[b] for n, m in models.items()}, X[:, b])
        for name in parameters:
            torch.testing.assert_close(each[name][b], alone[name], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(several[name][b], other[name], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode() -> None:
    module, other = make("PeepholeLSTM"), make("PeepholeLSTM", backend="reference")
    names = [n for n, _ in module.named_parameters()]
    values = tuple(p.detach() for p in module.parameters())
    changes = tuple(draw(*v.shape, seed=i, dtype=F64) for i, v in enumerate(values))

    def run(module: nn.Module) -> Tensor:
        def call(*weights: Tensor) -> Any:
            named = dict(zip(names, weights, strict=True))
            return torch.func.functional_call(module, named, (X,))[0]

        found: Tensor = torch.func.jvp(call, values, changes)[1]
        return found

    torch.testing.assert_close(run(module), run(other), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_compile_and_export(name: str) -> None:
    module = make(name, num_layers=2, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for got, want in zip(results(compiled, X), results(module, X), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    program = torch.export.export(module, (X,))
    torch.testing.assert_close(program.module()(X)[0], module(X)[0])


@pytest.mark.parametrize("end", ["", "Cell"])
@pytest.mark.parametrize("name", NAMES)
def test_pickle_and_copy(name: str, end: str) -> None:
    module = getattr(rnnkernels, name + end)(I, H, dtype=F64)
    x = X[0] if end else X
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert torch.equal(tensors(other(x))[0], tensors(module(x))[0])
    assert repr(module) == f"{name}{end}(3, 5)"


@pytest.mark.parametrize("name", ["IndRNN", "SLSTM"])
def test_streams(name: str) -> None:
    module = make(name, num_layers=2).eval()
    runner = rnnkernels.streaming.StreamRunner(module)
    y = torch.cat([runner("a", X[:2, 0]), runner("a", X[2:, 0])])
    whole, last = module(X[:, :1])
    torch.testing.assert_close(y, whole[:, 0].detach(), rtol=1e-12, atol=1e-13)
    state = tensors(runner.state("a"))
    for got, want in zip(state, tensors(last), strict=True):
        torch.testing.assert_close(got, want[:, 0].detach(), rtol=1e-12, atol=1e-13)
    runner.set_state("b", runner.state("a"))
    with pytest.raises((TypeError, ValueError), match="hx: expected a"):
        runner.set_state("b", state[:1] * 3)


def test_outputs_may_be_changed_in_place() -> None:
    """Before backward, each as if it were a copy."""
    module = rnnkernels.SLSTM(I, H, dtype=F64)
    x = X.clone().requires_grad_()

    def gradients(change: bool) -> list[Tensor]:
        y, states, every = module(x, return_all_states=True)
        outputs = [y, *states, *every.c[0]]
        if not change:
            outputs = [t.clone() for t in outputs]
        for t in outputs:
            t.mul_(2)
        return list(torch.autograd.grad(sum(t.sum() for t in outputs), [x, *module.parameters()]))

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_exponentials_stay_finite() -> None:
    """Gates of which no exponential is a number of float32: what is remembered is their ratio."""
    module = make("SLSTM", bidirectional=True).float()
    wide = copy.deepcopy(module).double()
    wide.backend = "reference"  # type: ignore[assignment]
    got, want = results(module, 400 * X.float()), results(wide, 400 * X)
    assert all(t.isfinite().all() for t in got)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-3, atol=1e-4)


def test_what_triton_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of units, no recurrent weights, norms, heads and dropout, but no projections."""
    for name in ("INSTALLED", "INTERPRETED"):
        monkeypatch.setattr(triton, name, True)
    cells = (gated.mgu, gated.peephole_lstm, written_cells.forgets)
    names = [*(cell.name for cell in cells), "layer_norm_lstm", "layer_norm_gru"]
    calls = [make_call(name, dtype=torch.float32).call() for name in names]
    heads = make_call("lstm", heads=2, dtype=torch.float32).call()
    taken = [*calls, heads, heads._replace(h_mask=heads.h0)]
    assert [triton.refusal(call) for call in taken] == [None] * 7
    projected = make_call("lstm", proj=2, dtype=torch.float32).call()
    assert triton.refusal(projected) == "it has no kernels for proj_size"


def test_cells_of_the_package_are_cells() -> None:
    for cell in (gated.mgu, gated.cifg, gated.peephole_lstm, gated.ind_rnn, gated.slstm):
        assert isinstance(cell, DefinedCell) and pickle.loads(pickle.dumps(cell)) is cell
