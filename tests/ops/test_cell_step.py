"""The short way of a cell: when it is taken, and that it gives what the long one gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import rnnkernels
from helpers import draw, tensors
from modes import Dispatch, Functions, Subclass
from rnnkernels import _backends, _ops, functional
from rnnkernels._core.call import LayerWeights
from rnnkernels.diagnostics import gradient_flow

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

B, I, H = 3, 5, 4
CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
F64 = torch.float64
CELLS: dict[str, dict[str, Any]] = {
    "RNNCell": {},
    "LSTMCell": {},
    "GRUCell": {},
    "RNNCell relu": {"nonlinearity": "relu"},
    "LSTMCell no bias": {"bias": False},
    "GRUCell single bias": {"bias_mode": "single"},
}


def build(name: str = "LSTMCell", **options: Any) -> Any:
    torch.manual_seed(0)
    kind = getattr(rnnkernels, name.split()[0])
    return kind(I, H, dtype=F64, **CELLS.get(name, {}), **options)


def arguments(module: Any) -> tuple[Tensor, Any]:
    x, h, c = (draw(B, n, seed=n + i, dtype=F64).requires_grad_() for i, n in enumerate((I, H, H)))
    return x, (h, c) if module.cell == "lstm" else h


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the short way was taken, for every call of a cell that tried it."""
    found: list[bool] = []

    def look(*args: Any) -> Any:
        state = short(*args)
        found.append(state is not None)
        return state

    short = _ops.cell_step
    monkeypatch.setattr(_ops, "cell_step", look)
    return found


def long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "undisturbed", lambda name: False)


def run(module: Any, hx: bool = True) -> list[Tensor]:
    """Outputs, their gradients in everything, and the gradients of those."""
    x, state = arguments(module)
    out = tensors(module(x, state if hx else None))
    leaves = [x, *(tensors(state) if hx else []), *module.parameters()]
    loss = torch.stack([(o * draw(B, H, seed=9 + i, dtype=F64)).sum() for i, o in enumerate(out)])
    first = torch.autograd.grad(loss.sum(), leaves, retain_graph=True)
    kept = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in kept), leaves, allow_unused=True)
    last = torch.autograd.grad(module(x, state if hx else None)[0].sum(), leaves)
    return [*out, *first, *kept, *(s for s in second if s is not None), *last]


@pytest.mark.parametrize("hx", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_equals_the_long_way(
    name: str, hx: bool, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients to the bit; gradients of gradients, added in another order, closely."""
    short = run(build(name), hx)
    assert taken == [True, True]
    long_way(monkeypatch)
    long = run(build(name), hx)
    assert len(taken) == 2 and len(short) == len(long)
    for got, want in zip(short, long, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)
    exact = len(tensors(arguments(build(name))[1]))
    assert all(torch.equal(a, b) for a, b in zip(short[:exact], long[:exact], strict=True))


@pytest.mark.parametrize("name", CELLS)
def test_without_gradients(name: str, taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(name)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            short = tensors(module(*arguments(module)))
            with monkeypatch.context() as patch:
                long_way(patch)
                long = tensors(module(*arguments(module)))
        assert not any(t.requires_grad for t in short)
        assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))
    assert taken == [True, True]


@pytest.mark.parametrize(
    ("context", "tried"),
    [
        (Dispatch, [False]),
        (Functions, [False, True]),
        (lambda: torch.device("cpu"), [True]),
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), [True]),
    ],
    ids=["dispatch mode", "function mode", "default device", "autocast"],
)
def test_modes(context: Callable[[], Any], tried: list[bool], taken: list[bool]) -> None:
    """A dispatch mode sees everything; a function mode one call, behind which nothing is seen."""
    module = build("GRUCell")
    x, h = arguments(module)
    want = module(x, h)
    with context():
        torch.testing.assert_close(module(x, h), want)
    assert taken == [True, *tried]


@pytest.mark.parametrize("name", CELLS)
def test_a_function_mode_sees_one_call(name: str) -> None:
    """And may answer it, or change what it is called with; a default device changes nothing."""
    seen: list[Any] = []

    class Look(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    module = build(name)
    x, state = arguments(module)
    default, other = torch.device("cpu"), torch.device("meta")
    for args in ((x, state), (x,), (x[0],)):
        want = tensors(module(*args))
        with other, Look(), default:
            seen.clear()
            got = tensors(module(*args))
        assert seen == [functional.cell]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.autograd.grad(sum(t.sum() for t in got), x)[0].any()


def test_the_function_that_modes_see_takes_the_short_way(taken: list[bool]) -> None:
    module = build("LSTMCell")
    x, state = arguments(module)
    weights = LayerWeights(*(getattr(module, n) for n in CELL_WEIGHTS))
    got = functional.cell("LSTMCell", "lstm", x, state, weights)
    assert taken == [True]
    assert all(
        torch.equal(a, b) for a, b in zip(tensors(got), tensors(module(x, state)), strict=True)
    )


def test_transforms_and_fake_tensors_go_the_long_way(taken: list[bool]) -> None:
    module = build("GRUCell")
    x, h = (t.detach() for t in arguments(module))
    torch.func.grad(lambda x: module(x, h).sum())(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module(mode.from_tensor(x), mode.from_tensor(h)).shape == (B, H)
    assert taken == [False, False]


def test_subclasses_go_the_long_way(taken: list[bool]) -> None:
    module = build("GRUCell")
    x, h = (t.detach() for t in arguments(module))
    for args in ((x.as_subclass(Subclass), h), (x, h.as_subclass(Subclass))):
        assert type(module(*args)) is Subclass
    module(nn.Parameter(x), nn.Parameter(h))
    assert taken == [False, False, True]


@contextmanager
def observed(module: nn.Module) -> Iterator[None]:
    with gradient_flow(module):
        yield


@pytest.mark.parametrize(
    ("options", "context"),
    [
        ({"backend": "cpu"}, lambda m: nullcontext()),
        ({}, lambda m: rnnkernels.use_backend("reference")),
        ({}, observed),
    ],
    ids=["argument", "context", "observer"],
)
def test_whoever_asks_for_a_backend_or_looks_on(
    options: dict[str, Any], context: Callable[[nn.Module], Any], taken: list[bool]
) -> None:
    module = build("LSTMCell", **options)
    with context(module):
        module(*arguments(module))
    assert taken == []


def test_the_automatic_choice_by_its_name(taken: list[bool]) -> None:
    module = build("LSTMCell", backend="auto")
    module(*arguments(module))
    with rnnkernels.use_backend("reference"):
        module(*arguments(module))
    assert taken == [True, True]


def test_environment(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    module = build()
    monkeypatch.setattr(_backends, "_environment", "reference")
    module(*arguments(module))
    assert taken == []


def test_compilers_see_the_op(taken: list[bool]) -> None:
    """A compiled model has no call in it that a graph cannot hold."""
    torch._dynamo.reset()
    module = build("GRUCell")
    x, h = arguments(module)
    got = torch.compile(module, backend="eager", fullgraph=True)(x, h)
    assert taken == []
    torch.testing.assert_close(got, module(x, h))
    torch._dynamo.reset()


#: What a cell may be called with beyond the usual, and what comes of it.
UNUSUAL: dict[str, tuple[Callable[[Tensor, Any], tuple[Any, Any]], Any]] = {
    "one row": (lambda x, s: (x[0], (s[0][0], s[1][0])), None),
    "a list": (lambda x, s: (x, list(s)), None),
    "three states": (lambda x, s: (x, (*s, s[0])), TypeError),
    "a number": (lambda x, s: (3, s), TypeError),
    "no tensor": (lambda x, s: (x, (s[0], None)), TypeError),
    "three dimensions": (lambda x, s: (x[None], s), ValueError),
    "input size": (lambda x, s: (x[:, 1:], s), RuntimeError),
    "rows of the state": (lambda x, s: (x, (s[0], s[1][1:])), RuntimeError),
    "size of the state": (lambda x, s: (x, (s[0][:, 1:], s[1])), RuntimeError),
    "dtype": (lambda x, s: (x.float(), s), RuntimeError),
    "dtype of the state": (lambda x, s: (x, (s[0].float(), s[1])), RuntimeError),
    "dtype of c": (lambda x, s: (x, (s[0], s[1].float())), ValueError),
    "meta": (lambda x, s: (x.to("meta"), s), RuntimeError),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_goes_the_long_way(name: str, taken: list[bool]) -> None:
    """Which has its own checks and errors."""
    change, error = UNUSUAL[name]
    module = build()
    with pytest.raises(error) if error else nullcontext():
        module(*change(*arguments(module)))
    assert taken == [False]


def test_replaced_parameters(taken: list[bool]) -> None:
    """Weights that are no longer the module's own parameters are read where they are."""
    module = build("RNNCell")
    x, h = arguments(module)
    nn.utils.parametrize.register_parametrization(module, "weight_hh", nn.Softplus())
    torch.testing.assert_close(
        module(x, h),
        torch.tanh(
            x @ module.weight_ih.t() + h @ module.weight_hh.t() + module.bias_ih + module.bias_hh
        ),
    )
    assert taken == [False]
    wrong = build("RNNCell")
    wrong.weight_ih = nn.Parameter(torch.zeros(H, I + 1, dtype=F64))
    with pytest.raises(RuntimeError, match=f"expected {I}"):
        wrong(torch.zeros(B, I + 1, dtype=F64), h)
    with pytest.raises(RuntimeError, match="weight_ih: expected shape"):
        wrong(x, h)
    assert taken == [False, False]


def test_what_was_saved_is_guarded(taken: list[bool]) -> None:
    module = build()
    x, (h, c) = arguments(module)
    for changed in (x, h, c, module.weight_hh):
        loss = module(x, (h, c))[0].sum()
        with torch.no_grad():
            changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    h_next = module(x, (h, c))[0]
    h_next.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        h_next.sum().backward()
    assert all(taken)


def test_wrong_calls_of_the_entry_itself() -> None:
    module = build()
    x, state = arguments(module)
    p = module._parameters
    for args in ((), ("lstm", p, I, H, x), ("lstm", None, I, H, x, state), (3, p, I, H, x, state)):
        with pytest.raises(TypeError):
            _ops.cell_step(*args)
    with pytest.raises(ValueError, match="cell: expected one of"):
        _ops.cell_step("elman", p, I, H, x, state)
    with pytest.raises(TypeError):
        _ops.cell_step("lstm", p, "I", H, x, state)
    assert _ops.cell_step("lstm", {}, I, H, x, state) is None
