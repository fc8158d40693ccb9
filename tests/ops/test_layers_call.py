"""The short way of layers: when it is taken, and that it gives what the long one gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnkernels
from helpers import same_bits, tensors
from modes import Dispatch, Functions, Subclass
from rnnkernels import _backends, _ops
from rnnkernels.diagnostics import gradient_flow
from short_ways import LAYERS, B, H, I, T, arguments, build, run

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)


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


@contextmanager
def nested(*contexts: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@pytest.mark.parametrize(
    ("context", "short"),
    [
        (Functions, False),
        (Dispatch, False),
        (lambda: torch.device("meta"), True),
        (lambda: nested(torch.device("meta"), Functions()), False),
        (lambda: nested(Functions(), torch.device("meta")), False),
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), True),
    ],
    ids=[
        "function mode",
        "dispatch mode",
        "default device",
        "function mode in a default device",
        "default device in a function mode",
        "autocast",
    ],
)
def test_modes(context: Callable[[], Any], short: bool, taken: list[bool]) -> None:
    module = build()
    args = arguments(module)
    want = tensors(module(*args))
    with context():
        assert same_bits(tensors(module(*args)), want)
    assert taken == [True, short]


@pytest.mark.parametrize("hx", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_long_way_under_autocast(
    name: str, hx: bool, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(name, torch.float32)
    args = arguments(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        short = run(module, args, hx)
        assert taken == [True]
        assert all(t.dtype == torch.bfloat16 for t in tensors(module(*args)))
        monkeypatch.setattr(_backends, "undisturbed", lambda name: False)
        assert same_bits(short, run(module, args, hx))
    assert len(taken) == 2


#: Types that autocast casts to one, by a layer of float32 or float64; and such as stay apart.
MIXED: dict[str, tuple[torch.dtype, Callable[[Tensor, Any], tuple[Any, Any]], bool]] = {
    "input of float16": (torch.float32, lambda x, s: (x.half(), s), True),
    "state of float16": (torch.float32, lambda x, s: (x, (s[0].half(), s[1])), True),
    "float64": (torch.float32, lambda x, s: (x.double(), s), False),
    "state of float64": (torch.float32, lambda x, s: (x, (s[0].double(), s[1])), False),
    "c of float64": (torch.float32, lambda x, s: (x, (s[0], s[1].double())), False),
    "int": (torch.float32, lambda x, s: (x.int(), s), False),
    "state of int": (torch.float32, lambda x, s: (x, (s[0].int(), s[1])), False),
    "weights of float64": (torch.float64, lambda x, s: (x.float(), s), False),
    "float64 alone": (torch.float32, lambda x, s: (x.double(), None), False),
    "weights of float64 alone": (torch.float64, lambda x, s: (x.float(), None), False),
}


@pytest.mark.parametrize("name", MIXED)
def test_types_under_autocast(
    name: str, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, change, fits = MIXED[name]
    module = build("LSTM", dtype)
    x, state = change(*arguments(module))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if not fits:
            with pytest.raises((RuntimeError, ValueError, TypeError), match=r"dtype|float32"):
                module(x, state)
            assert taken == [False]
            return
        short = tensors(module(x, state))
        assert taken == [True]
        monkeypatch.setattr(_backends, "undisturbed", lambda name: False)
        assert same_bits(short, tensors(module(x, state)))


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dropout": ({"num_layers": 2, "dropout": 0.5}, {}),
    "windows": ({"truncate": 2}, {}),
    "windows of a call": ({}, {"truncate": 2}),
    "clipped": ({"grad_clip": 1.0}, {}),
    "clipped for a call": ({}, {"grad_clip": 1.0}),
    "recomputed": ({"recompute": 2}, {}),
    "recomputed for a call": ({}, {"recompute": 2}),
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
    "nested": (
        lambda x, s: (torch.nested.nested_tensor(list(x.detach())), s),
        (ValueError, NotImplementedError),
    ),
    "sparse": (lambda x, s: (x.detach().to_sparse(), s), ValueError),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
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


@pytest.mark.parametrize("transform", ["grad", "vmap", "functionalize"])
def test_transforms_see_what_they_do_not_transform(transform: str, taken: list[bool]) -> None:
    module = build("GRU")
    x, h = (t.detach() for t in arguments(module))
    want = module(x, h)[0]
    got: list[Tensor] = []

    def call(factor: Tensor) -> Tensor:
        got.append(module(x, h)[0])
        return got[0].sum() * factor

    given = torch.ones(2 if transform == "vmap" else (), dtype=torch.float64)
    getattr(torch.func, transform)(call)(given)
    assert taken == [True, False] and len(got) == 1
    assert torch.equal(want.sum(), call(torch.ones((), dtype=torch.float64)))


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
    sizes, rest = (I, H, 0, 1, 1, "concat", False), (h, None, None)
    for args in (
        (),
        ("gru", None, *sizes, x, *rest),
        (3, weights, *sizes, x, *rest),
        ("gru", weights, "I", H, 0, 1, 1, "concat", False, x, *rest),
    ):
        with pytest.raises(TypeError):
            _ops.layers_call(*args)
    with pytest.raises(ValueError, match="cell: expected one of"):
        _ops.layers_call("elman", weights, *sizes, x, *rest)
    beside = [*weights[:2], 3, weights[3]]
    strange = [*weights[:2], weights[2].detach().as_subclass(Subclass), weights[3]]
    others = [weights[:1], [*weights, *weights], weights + weights[:1], beside, strange]
    for given in ([], *others, [None] * 4, [None, *weights[1:]]):
        assert _ops.layers_call("gru", given, *sizes, x, *rest) is None
    more, no_state = [*weights, *weights, weights[0]], (None, None, None)
    assert _ops.layers_call("gru", more, I, H, 0, 2, 1, "concat", False, x, *no_state) is None
    assert _ops.layers_call("gru", weights, I, H, 0, 0, 1, "concat", False, x, *rest) is None
    with pytest.raises(ValueError, match="merge_mode: expected one of"):
        _ops.layers_call("gru", weights, I, H, 0, 1, 1, "max", False, x, *rest)
