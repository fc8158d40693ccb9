"""Zoneout: the paper's formula in NumPy with the masks that are drawn, the same masks whichever way
a call goes, all derivatives; the modules that have the option; cells with noise of their own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import formulas
import noise
import rnnkernels
from cases import make_call
from helpers import draw, same_bits, tensors
from rnnkernels._backends import onnx
from rnnkernels.functional._noise import cell_of

F64 = torch.float64
T, B, I, H = 6, 4, 3, 5
P = (0.3, 0.6)
X = draw(T, B, I, seed=1, dtype=F64)
LENGTHS = torch.tensor([4, 6, 0, 5])
RESET = draw(T, B, seed=2, dtype=F64) > 0.7
Array = Any


def make(kind: Any = rnnkernels.LSTM, *sizes: int, zoneout: Any = P, **options: Any) -> Any:
    torch.manual_seed(3)
    return kind(*(sizes or (I, H)), dtype=F64, zoneout=zoneout, **options)


def results(module: Any, x: Tensor = X, seed: int = 7, **options: Any) -> list[Tensor]:
    """All outputs and gradients, of a call that begins with this seed."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    outputs = tensors(module(x, **options))
    torch.stack([(o * o).sum() + o.sum() for o in outputs]).sum().backward()
    return [*outputs, x.grad, *(p.grad for p in module.parameters())]


def by_formula(module: Any, seed: int | None, lengths: Any = None, reset: Any = None) -> list[Any]:
    """Output and last states of an LSTM, step by step; without a seed in evaluation."""
    value = {n: p.detach().numpy() for n, p in module.named_parameters()}
    lengths = [T] * B if lengths is None else lengths.tolist()
    cut = np.zeros((T, B), bool) if reset is None else reset.numpy()
    D = 2 if module.bidirectional else 1
    x, lasts = X.numpy(), []
    for layer in range(module.num_layers):
        y = np.zeros((T, B, D * H))
        for d in range(D):
            at, last = f"_l{layer}" + "_reverse" * d, np.zeros((2, B, H))
            stream = layer * D + d
            keep = [
                np.full((T, B, H), p) if seed is None
                else noise.masks(seed, p, leaf, T, B, H, stream) for leaf, p in enumerate(P)
            ]  # fmt: skip
            for b in range(B):
                state = [np.zeros(H), np.zeros(H)]
                for t in range(lengths[b]) if d == 0 else reversed(range(lengths[b])):
                    if t + d < lengths[b] and cut[t + d, b]:
                        state = [np.zeros(H), np.zeros(H)]
                    gates = value["weight_ih" + at] @ x[t, b] + value["bias_ih" + at]
                    gates = gates + value["weight_hh" + at] @ state[0] + value["bias_hh" + at]
                    masks = (keep[0][t, b], keep[1][t, b])
                    state = formulas.zoneout_lstm(*np.split(gates, 4), *state, *masks)
                    y[t, b, d * H : (d + 1) * H] = state[0]
                last[:, b] = state
            lasts.append(last)
        x = y
    return [x, *(np.stack([last[s] for last in lasts]) for s in range(2))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_is_the_papers_formula(backend: str, training: bool) -> None:
    """Packed inside or not: rows are numbered as the caller has them."""
    seed = noise.seed_of(7) if training else None
    for of_layer, of_call in (
        ({}, {}),
        ({"num_layers": 2, "bidirectional": True}, {"lengths": LENGTHS, "reset": RESET}),
    ):
        module = make(backend=backend, **of_layer).train(training)
        torch.manual_seed(7)
        got = tensors(module(X, **of_call))
        for a, b in zip(got, by_formula(module, seed, **of_call), strict=True):
            torch.testing.assert_close(a, torch.from_numpy(b), rtol=1e-11, atol=1e-12)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lengths-reset": (
        {"num_layers": 2, "bidirectional": True}, {"lengths": LENGTHS, "reset": RESET}
    ),
    "truncate": ({"truncate": 2, "bidirectional": True}, {"lengths": LENGTHS}),
    "overlapping": ({"truncate": (2, 3)}, {}),
    "batch-first": ({"batch_first": True, "merge_mode": "sum", "bidirectional": True}, {}),
    "heads": ({"num_layers": 2, "bidirectional": True, "heads": H}, {"lengths": LENGTHS}),
    "all-states": ({"num_layers": 2}, {"return_all_states": True, "reset": RESET}),
    "recompute": ({"num_layers": 2, "bidirectional": True, "recompute": 4}, {"lengths": LENGTHS}),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", [rnnkernels.LSTM, rnnkernels.GRU], ids=lambda k: k.__name__)
def test_equals_the_reference(kind: Any, option: str) -> None:
    of_layer, of_call = OPTIONS[option]
    p = P if kind is rnnkernels.LSTM else P[0]
    x = X.transpose(0, 1) if "batch_first" in of_layer else X
    module = make(kind, zoneout=p, **of_layer)
    other = make(kind, zoneout=p, backend="reference", **of_layer)
    for got, want in zip(results(module, x, **of_call), results(other, x, **of_call), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_windows_of_any_kind_have_the_same_masks() -> None:
    """Without them, with gradients truncated at the end of rows, and with gates computed again."""
    for heads in (1, H):
        options: dict[str, Any] = {"bidirectional": True, "num_layers": 2, "heads": heads}
        plain = results(make(**options), lengths=LENGTHS, reset=RESET)
        again = results(make(**options, recompute=2), lengths=LENGTHS, reset=RESET)
        for got, want in zip(again, plain, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    alone = results(make(num_layers=2), reset=RESET)
    for option in ({"truncate": 2}, {"truncate": (2, 4)}, {"recompute": 4}):
        found = results(make(num_layers=2, **option), reset=RESET)
        assert same_bits(found[:1], alone[:1])
    whole = results(make(truncate=(2, 9)))  # every window goes back to the first step
    for got, want in zip(whole, results(make()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_rows_are_numbered_as_the_caller_has_them() -> None:
    lengths = torch.tensor([3, 6, 5, 1])
    module = make(bidirectional=True)
    torch.manual_seed(7)
    y, (h, c) = module(X, lengths=lengths)
    packed = pack_padded_sequence(X, lengths, enforce_sorted=False)
    torch.manual_seed(7)
    of_packed, (h_packed, c_packed) = module(packed)
    there = torch.arange(T)[:, None] < lengths
    torch.testing.assert_close(
        torch.nn.utils.rnn.pad_packed_sequence(of_packed)[0][there], y[there], rtol=0, atol=1e-15
    )
    assert torch.equal(h, h_packed) and torch.equal(c, c_packed)
    rows = [X[:n, b] for b, n in enumerate(lengths.tolist())]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    torch.manual_seed(7)
    first = make(bidirectional=True, batch_first=True)
    torch.manual_seed(7)
    of_jagged = first(jagged)[0]
    for b, row in enumerate(of_jagged.unbind()):
        assert torch.equal(row, y[: len(row), b])
    one = make()
    whole, shorter = results(one)[0], results(one, lengths=lengths)[0]
    for b, n in enumerate(lengths.tolist()):  # the steps of a row are those of it without an end
        torch.testing.assert_close(shorter[:n, b], whole[:n, b], rtol=1e-12, atol=1e-14)
    torch.manual_seed(7)
    again = module(X, lengths=lengths)[0]
    assert torch.equal(again, y) and not torch.equal(module(X, lengths=lengths)[0], y)


@pytest.mark.parametrize("case", ["plain", "rows", "truncate"])
def test_derivatives(case: str) -> None:
    """First and second ones of a function: the call with one seed."""
    of_layer: dict[str, Any] = {"bidirectional": True}
    of_call: dict[str, Any] = {}
    if case == "rows":
        of_call = {"lengths": [3, 2], "reset": RESET[:3, :2]}
    torch.manual_seed(3)
    module = rnnkernels.LSTM(2, 2, dtype=F64, zoneout=(0.4, 0.5), **of_layer)
    x, names = X[:3, :2, :2].clone().requires_grad_(), [n for n, _ in module.named_parameters()]
    weights = tuple(module.parameters())
    if case == "truncate":  # no derivative of any function of all inputs, but equal in both
        other = copy.deepcopy(module)
        other.backend = "reference"
        for each in (module, other):
            each.truncate = 2
        pairs = [second(m, x) for m in (module, other)]
        for got, want in zip(*pairs, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        return

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        named = dict(zip(names, weights, strict=True))
        return tuple(tensors(torch.func.functional_call(module, named, (x,), of_call)))

    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *weights), fast_mode=True)


def second(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(7)
    y = module(x)[0]
    first = torch.autograd.grad(y.square().sum(), [x, *module.parameters()], create_graph=True)
    total = torch.stack([g.square().sum() for g in first]).sum()
    return torch.autograd.grad(total, [x, *module.parameters()])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_transforms() -> None:
    """Lanes of torch.vmap have the masks of one call, or their own; tangents those of values."""
    module = make(num_layers=2)
    parameters = dict(module.named_parameters())
    xs = torch.stack([X, 2 * X, X - 1])

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,), {"lengths": LENGTHS})[0].sum()

    def seeded(f: Any, *args: Any) -> Any:
        torch.manual_seed(7)
        return f(*args)

    grad = torch.func.grad(loss, (0, 1))
    each = seeded(torch.func.vmap(grad, (None, 0), randomness="same"), parameters, xs)
    models = {n: torch.stack([p, 0.5 * p, p]) for n, p in parameters.items()}
    several = seeded(torch.func.vmap(grad, (0, 0), randomness="same"), models, xs)
    for i in range(3):
        alone = seeded(grad, parameters, xs[i])
        torch.testing.assert_close(each[1][i], alone[1], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(each[0]["weight_hh_l1"][i], alone[0]["weight_hh_l1"])
        alone = seeded(grad, {n: m[i] for n, m in models.items()}, xs[i])
        torch.testing.assert_close(several[1][i], alone[1], rtol=1e-10, atol=1e-12)
    run = torch.func.vmap(lambda x: module(x)[0], randomness="different")
    y = seeded(run, torch.stack([X, X]))
    assert not torch.equal(y[0], y[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: module(x)[0])(xs)

    change, eps = draw(T, B, I, seed=5, dtype=F64), 1e-6
    moved = seeded(torch.func.jvp, lambda x: module(x)[0], (X,), (change,))[1]
    ends = [seeded(module, X + s * eps * change)[0] for s in (1, -1)]
    torch.testing.assert_close(moved, (ends[0] - ends[1]) / (2 * eps), rtol=1e-6, atol=1e-8)


def test_evaluation_draws_nothing() -> None:
    module = make().eval()
    before = torch.get_rng_state()
    assert torch.equal(module(X)[0], module(X)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_compile_and_export() -> None:
    module = make(num_layers=2, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    first, want = results(compiled), results(module)
    for got, other in zip(first, want, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-12, atol=1e-13)
    assert not torch.equal(results(compiled, seed=8)[0], first[0])
    for training in (True, False):
        program = torch.export.export(module.train(training), (X,))
        torch.manual_seed(7)
        got = program.module()(X)[0]
        torch.manual_seed(7)
        torch.testing.assert_close(got, module(X)[0])


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_single_steps(name: str) -> None:
    """Those of the layer of one step, with the option and without."""
    p: Any = P if name == "LSTM" else P[0]
    backend = "reference" if name == "RNN" else None  # which compiles nothing
    layer = make(getattr(rnnkernels, name), zoneout=p, backend=backend)
    step = getattr(rnnkernels, f"{name}Cell")(I, H, dtype=F64, zoneout=p, backend=backend)
    step.load_state_dict({n.removesuffix("_l0"): w for n, w in layer.state_dict().items()})
    hx = tuple(draw(B, H, seed=i, dtype=F64) for i in range(1 + (name == "LSTM")))
    for training in (True, False):
        for module in (layer, step):
            module.train(training)
        torch.manual_seed(7)
        got = tensors(step(X[0], hx if len(hx) > 1 else hx[0]))
        torch.manual_seed(7)
        of_layer = tuple(s[None] for s in hx)
        want = tensors(layer(X[:1], of_layer if len(hx) > 1 else of_layer[0])[1])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b[0], rtol=1e-12, atol=1e-13)
        stays = (got[0] == hx[0]).double().mean()
        assert (0 < stays < 1) if training else stays == 0
    torch.manual_seed(7)
    weights = rnnkernels._core.call.LayerWeights(*step.parameters())
    options: dict[str, Any] = {"zoneout": p, "training": True, "backend": backend}
    state = hx if len(hx) > 1 else hx[0]
    alone = rnnkernels.functional.cell("MyCell", step.cell, X[0], state, weights, **options)
    torch.manual_seed(7)
    want = tensors(step.train()(X[0], state))
    torch.testing.assert_close(tensors(alone), want, rtol=1e-12, atol=1e-13)


def test_without_it_nothing_changes() -> None:
    plain = make(zoneout=None)
    for none in (0, 0.0, (0, 0)):
        module = make(zoneout=none)
        assert module.zoneout is None
        assert same_bits(results(module), results(plain))
    one = make(zoneout=(0, 0.6), proj_size=2, backend="reference")
    assert cell_of("lstm", (False, True)) != cell_of("lstm", (True, True))
    assert one.eval()(X)[0].shape == (T, B, 2)
    assert cell_of("lstm", (False, False)) == "lstm"


def test_modules() -> None:
    for kind in (rnnkernels.LSTM, rnnkernels.LSTMCell):
        module = make(kind)
        x = X[0] if kind is rnnkernels.LSTMCell else X
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(other) is kind and other.zoneout == P
            found = []
            for each in (module, other):
                torch.manual_seed(7)
                found.append(tensors(each(x)))
            assert same_bits(*found)
        assert "zoneout=(0.3, 0.6)" in repr(module)
        with pytest.raises(ValueError, match=r"torch.nn has no zoneout=\(0.3, 0.6\)"):
            rnnkernels.revert(module)
        theirs = getattr(nn, kind.__name__)(I, H)
        assert rnnkernels.convert(theirs).zoneout is None
    weights = make().all_weights
    torch.manual_seed(7)
    y = rnnkernels.functional.lstm(X, None, weights, zoneout=P, training=True)[0]
    assert torch.equal(y, results(make())[0])


ERRORS: list[tuple[Any, str]] = [
    (1, "zoneout: expected a probability from 0 up to 1, 1 left out, got 1.0"),
    ((0.1, -0.1), "got -0.1"),
    ("0.1", "zoneout: expected a number, got str"),
    (True, "zoneout: expected a number, got bool"),
    ((0.1, 0.2, 0.3), r"zoneout: expected a probability, or one for each state, \(h, c\)"),
]


@pytest.mark.parametrize(("value", "message"), ERRORS)
def test_errors(value: Any, message: str) -> None:
    for kind in (rnnkernels.LSTM, rnnkernels.LSTMCell):
        with pytest.raises((ValueError, TypeError), match=message):
            kind(I, H, zoneout=value)


def test_what_is_refused() -> None:
    zoned = make_call(noise.ZONED_LSTM.name).call()
    assert onnx.refusal(zoned) == f"none of them is the cell {noise.ZONED_LSTM.name}"
    with pytest.raises(ValueError, match=r"module: expected a layer without zoneout, got"):
        rnnkernels.interop.to_keras(make())
    with pytest.raises(ValueError, match=r"zoneout: expected 0 for h where there is a proj_size"):
        rnnkernels.LSTM(I, H, proj_size=2, zoneout=0.1)
    with pytest.raises(TypeError, match="bernoulli: p: expected a number, got str"):
        rnnkernels.bernoulli("0.1")  # type: ignore[arg-type]

    def unused(a: Any, *, h: Any, d: Any = rnnkernels.bernoulli(0.1)) -> Any:
        return torch.tanh(a)

    with pytest.raises(TypeError, match="noise d: expected every noise to be used"):
        rnnkernels.cell(unused)


def test_noise_of_a_written_cell() -> None:
    """Its own in front of zoneout's, by a module and by functions; a step of it."""
    kind = rnnkernels.layer(noise.noisy)
    for zoneout, backend in ((None, "reference"), (0.3, "cpu")):  # one of them is compiled
        module = make(kind, zoneout=zoneout, num_layers=2, backend=backend)
        other = make(kind, zoneout=zoneout, num_layers=2, backend="reference")
        got, want = results(module, lengths=LENGTHS), results(other, lengths=LENGTHS)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert not torch.equal(results(module, seed=8)[0], results(module)[0])
        torch.manual_seed(7)
        options: dict[str, Any] = {"zoneout": zoneout, "training": True, "lengths": LENGTHS}
        options["backend"] = backend
        y = rnnkernels.functional.layers(noise.noisy, X, None, module.all_weights, **options)[0]
        assert torch.equal(y, got[0])
    own = make(rnnkernels.cell_class(noise.noisy), zoneout=None, backend="reference")
    assert not torch.equal(own(X[0]), own(X[0]))
    assert torch.equal(own.eval()(X[0]), own(X[0]))
    step = make(rnnkernels.cell_class(noise.noisy), zoneout=0.3).eval()
    h = draw(B, H, seed=4, dtype=F64)
    gx = nn.functional.linear(X[0], step.weight_ih, step.bias_ih).chunk(2, 1)
    gh = nn.functional.linear(h, step.weight_hh, step.bias_hh).chunk(2, 1)
    a = torch.sigmoid(gx[0] + gh[0] + 0.4 * step.weight_p)
    by_hand = 0.3 * h + 0.7 * (0.8 * a * torch.tanh(gx[1] + a * gh[1]) + (1 - a) * h)
    torch.testing.assert_close(step(X[0], h), by_hand, rtol=1e-12, atol=1e-13)
    again = pickle.loads(pickle.dumps(noise.ZONED_NOISY))
    assert again is noise.ZONED_NOISY
