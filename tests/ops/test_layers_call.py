"""The short way of layers: when it is taken, and that it gives what the long one gives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import rnnkernels
from helpers import draw, same_bits, tensors
from modes import Dispatch, Functions, Subclass
from rnnkernels import _backends, _ops
from rnnkernels.diagnostics import gradient_flow

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

T, B, I, H = 4, 3, 5, 6
LAYERS: dict[str, dict[str, Any]] = {
    "RNN": {},
    "LSTM": {},
    "GRU": {},
    "RNN relu, 2 layers": {"nonlinearity": "relu", "num_layers": 2},
    "LSTM projected, both ways": {"proj_size": 2, "bidirectional": True, "num_layers": 2},
    "LSTM projected without bias": {"proj_size": 3, "bias": False},
    "GRU one bias, batch first": {"bias_mode": "single", "batch_first": True, "num_layers": 3},
    "GRU both ways, batch first": {"bidirectional": True, "batch_first": True},
    "LSTM both ways": {"bidirectional": True},
}


def build(name: str = "LSTM", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    kind = getattr(rnnkernels, name.split()[0])
    return kind(I, H, dtype=dtype, **LAYERS.get(name, {}), **options)


def arguments(module: Any, steps: int = T, rows: int = B) -> tuple[Tensor, Any]:
    dtype = module.weight_hh_l0.dtype
    shape = (rows, steps, I) if module.batch_first else (steps, rows, I)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or H, *([H] if module.mode == "LSTM" else [])]
    h = [draw(layers, rows, n, seed=i, dtype=dtype).requires_grad_() for i, n in enumerate(widths)]
    x = draw(*shape, seed=9, dtype=dtype).requires_grad_()
    return x, tuple(h) if len(h) > 1 else h[0]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the short way was taken, for every call of layers that tried it."""
    found: list[bool] = []

    def look(*args: Any) -> Any:
        result = short(*args)
        found.append(result is not None)
        return result

    short = _ops.layers_call
    monkeypatch.setattr(_ops, "layers_call", look)
    return found


def run(module: Any, args: tuple[Tensor, Any], hx: bool) -> list[Tensor]:
    """Outputs, and their gradients in everything."""
    x, state = args
    out = tensors(module(x, state) if hx else module(x))
    leaves = [x, *(tensors(state) if hx else []), *module.parameters()]
    loss = sum((o * draw(*o.shape, seed=i, dtype=o.dtype)).sum() for i, o in enumerate(out))
    return [*out, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("hx", [True, False])
@pytest.mark.parametrize(("steps", "rows"), [(T, B), (1, 1), (1, B), (0, B), (T, 0)])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_long_way(
    name: str, steps: int, rows: int, hx: bool, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in the same form, in memory that nothing shares."""
    module = build(name)
    args = arguments(module, steps, rows)
    short = run(module, args, hx)
    assert taken == [True]
    out = tensors(module(*args))
    addresses = [t.data_ptr() for t in out if t.numel()]
    assert len(set(addresses)) == len(addresses)
    monkeypatch.setattr(_backends, "undisturbed", lambda name: False)
    long = run(module, args, hx)
    assert len(taken) == 2
    assert same_bits(short, long)
    assert [t.stride() for t in short if t.numel()] == [t.stride() for t in long if t.numel()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_without_gradients(
    name: str, dtype: torch.dtype, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(name, dtype)
    args = arguments(module)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            short = tensors(module(*args))
            with monkeypatch.context() as patch:
                patch.setattr(_backends, "undisturbed", lambda name: False)
                long = tensors(module(*args))
        assert not any(t.requires_grad for t in short) and same_bits(short, long)
    assert taken == [True, True]


@pytest.mark.parametrize(
    ("context", "short"),
    [
        (Functions, False),
        (Dispatch, False),
        (lambda: torch.device("meta"), True),
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), True),
    ],
    ids=["function mode", "dispatch mode", "default device", "autocast"],
)
def test_modes(context: Callable[[], Any], short: bool, taken: list[bool]) -> None:
    module = build()
    args = arguments(module)
    want = tensors(module(*args))
    with context():
        assert same_bits(tensors(module(*args)), want)
    assert taken == [True, short]


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dropout": ({"num_layers": 2, "dropout": 0.5}, {}),
    "windows": ({"truncate": 2}, {}),
    "windows of a call": ({}, {"truncate": 2}),
    "clipped": ({"grad_clip": 1.0}, {}),
    "clipped for a call": ({}, {"grad_clip": 1.0}),
    "recomputed": ({"recompute": 2}, {}),
    "recomputed for a call": ({}, {"recompute": 2}),
    "lengths": ({}, {"lengths": [T] * B}),
    "resets": ({}, {"reset": torch.zeros(T, B, dtype=torch.bool)}),
    "all states": ({}, {"return_all_states": True}),
    "backend": ({"backend": "cpu"}, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_go_the_long_way(name: str, taken: list[bool]) -> None:
    options, call = OPTIONS[name]
    module = build("GRU", **options)
    module(*arguments(module), **call)
    assert taken == []


def test_options_that_do_nothing(taken: list[bool]) -> None:
    dropping = build("GRU", num_layers=2, dropout=0.5).eval()
    for module, call in (
        (dropping, {}),
        (build("GRU", truncate=2), {"truncate": None}),
        (build("GRU", merge_mode="sum"), {}),
        (build("GRU", bidirectional=True, merge_mode="sum"), {}),
        (build("GRU", backend="auto"), {"grad_clip": None}),
    ):
        module(*arguments(module), **call)
    assert taken == [True] * 5


@pytest.mark.parametrize(
    "context",
    [lambda m: rnnkernels.use_backend("reference"), gradient_flow],
    ids=["backend", "observer"],
)
def test_whoever_asks_for_a_backend_or_looks_on(
    context: Callable[[nn.Module], Any], taken: list[bool]
) -> None:
    module = build()
    with context(module):
        module(*arguments(module))
    assert taken == []


#: What layers may be called with beyond the usual, and what comes of it.
UNUSUAL: dict[str, tuple[Callable[[Tensor, Any], tuple[Any, Any]], Any]] = {
    "one row": (lambda x, s: (x[:, 0], (s[0][:, 0], s[1][:, 0])), None),
    "a list": (lambda x, s: (x, list(s)), None),
    "packed": (lambda x, s: (pack_sequence([x[:, 0], x[:2, 1], x[:1, 2]]), s), None),
    "a subclass": (lambda x, s: (x.detach().as_subclass(Subclass), s), None),
    "a subclass as a state": (lambda x, s: (x, (s[0].detach().as_subclass(Subclass), s[1])), None),
    "a single state": (lambda x, s: (x, s[0]), TypeError),
    "three states": (lambda x, s: (x, (*s, s[0])), TypeError),
    "a number": (lambda x, s: (3, s), TypeError),
    "no tensor": (lambda x, s: (x, (s[0], None)), TypeError),
    "four dimensions": (lambda x, s: (x[None], s), ValueError),
    "input size": (lambda x, s: (x[..., 1:], s), RuntimeError),
    "rows of the state": (lambda x, s: (x, (s[0], s[1][:, 1:])), RuntimeError),
    "size of the state": (lambda x, s: (x, (s[0][..., 1:], s[1])), RuntimeError),
    "layers of the state": (lambda x, s: (x, (s[0].repeat(2, 1, 1), s[1])), RuntimeError),
    "dtype": (lambda x, s: (x.float(), s), ValueError),
    "dtype of the state": (lambda x, s: (x, (s[0].float(), s[1])), ValueError),
    "meta": (lambda x, s: (x.to("meta"), s), RuntimeError),
    "sparse": (lambda x, s: (x.detach().to_sparse(), s), (RuntimeError, NotImplementedError)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_goes_the_long_way(name: str, taken: list[bool]) -> None:
    """Which has its own checks and errors."""
    change, error = UNUSUAL[name]
    module = build()
    with pytest.raises(error) if error else nullcontext():
        module(*change(*arguments(module)))
    assert taken == [False]


def test_replaced_weights(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    module = build("RNN")
    nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", nn.Softplus())
    args = arguments(module)
    short = tensors(module(*args))
    assert taken == [True]
    wrong = build("RNN")
    wrong.weight_ih_l0 = nn.Parameter(torch.zeros(H, I + 1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="weight_ih_l0: expected shape"):
        wrong(*args)
    monkeypatch.setattr(_backends, "undisturbed", lambda name: False)
    assert same_bits(tensors(module(*args)), short)
    with pytest.raises(RuntimeError, match="weight_ih_l0: expected shape"):
        wrong(*args)


def test_transforms_and_compilers_see_the_op(taken: list[bool]) -> None:
    module = build("GRU")
    x, h = (t.detach() for t in arguments(module))
    torch.func.grad(lambda x: module(x, h)[0].sum())(x)
    assert taken == [False]
    torch._dynamo.reset()
    got = torch.compile(module, backend="eager", fullgraph=True)(x, h)
    assert taken == [False]
    assert same_bits(tensors(got), tensors(module(x, h)))
    torch._dynamo.reset()


def test_batch_invariance_holds_on_the_short_way(taken: list[bool]) -> None:
    module = build("GRU", torch.float32)
    x, h = arguments(module, rows=37)
    with rnnkernels.batch_invariant():
        y, h_n = module(x, h)
        row, last = module(x[:, 5:6], h[:, 5:6])
    assert taken == [True, True]
    assert torch.equal(y[:, 5:6], row) and torch.equal(h_n[:, 5:6], last)


def test_wrong_calls_of_the_entry_itself() -> None:
    module = build("GRU")
    x, h = arguments(module)
    weights = list(module.parameters())
    sizes = (I, H, 0, 1, 1, "concat", False)
    for args in (
        (),
        ("gru", None, *sizes, x, h),
        (3, weights, *sizes, x, h),
        ("gru", weights, "I", H, 0, 1, 1, "concat", False, x, h),
    ):
        with pytest.raises(TypeError):
            _ops.layers_call(*args)
    with pytest.raises(ValueError, match="cell: expected one of"):
        _ops.layers_call("elman", weights, *sizes, x, h)
    for given in ([], weights[:1], [*weights, *weights], weights + weights[:1], [None] * 4):
        assert _ops.layers_call("gru", given, *sizes, x, h) is None
    assert _ops.layers_call("gru", weights, I, H, 0, 0, 1, "concat", False, x, h) is None
    with pytest.raises(ValueError, match="merge_mode: expected one of"):
        _ops.layers_call("gru", weights, I, H, 0, 1, 1, "max", False, x, h)


def test_same_weights_of_the_entry_itself() -> None:
    module = build("GRU")
    names, flat, refs = module._flat_weights_names, module._flat_weights, module._flat_weight_refs
    own = module._parameters
    assert _ops.same_weights(own, names, flat, refs) is True
    assert _ops.same_weights({}, [], [], []) is True
    other = [nn.Parameter(w.detach().clone()) for w in flat]
    for given in (
        ({}, names, flat, refs),
        (None, names, flat, refs),
        (own, names, tuple(flat), refs),
        (own, names, flat, None),
        (own, names[::-1], flat, refs),
        (own, names, flat, refs[::-1]),
        (own, names, flat, [None] * 4),
        (own, names, other, refs),
        (dict(zip(names, other, strict=True)), names, other, refs),
        (dict.fromkeys(names), names, [None] * 4, refs),
        (own, names, flat, refs[:1]),
        (own, names[:1], flat, refs),
    ):
        assert _ops.same_weights(*given) is False
    with pytest.raises(TypeError, match="unhashable"):
        _ops.same_weights(own, [[]] * 4, flat, refs)
    with pytest.raises(TypeError, match="expected 4 arguments"):
        _ops.same_weights(own, names, flat)
