"""The short way of layers over rows of unequal lengths, padded and packed, and with resets: when it
is taken, and that it gives what the long one gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkernels
from helpers import draw, same_bits, tensors
from modes import Subclass
from rnnkernels import _backends, _ops
from short_ways import LAYERS, B, H, I, T, arguments, build, run

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

Given = tuple[Any, dict[str, Any]]


def marks(module: Any) -> Tensor:
    """Resets of the rows."""
    found = draw(T, B, seed=5, dtype=torch.float64) > 0.3
    return found.t().contiguous() if module.batch_first else found


def packed(module: Any, x: Tensor, lengths: list[int], **how: Any) -> PackedSequence:
    found = pack_padded_sequence(x.detach(), lengths, module.batch_first, **how)
    return PackedSequence(found.data.requires_grad_(), *found[1:])


#: What rows have steps and resets by, from a module and x to what the module is called with.
FORMS: dict[str, Callable[[Any, Tensor], Given]] = {
    "lengths": lambda m, x: (x, {"lengths": torch.tensor([1, 4, 3])}),
    "int32": lambda m, x: (x, {"lengths": torch.tensor([1, 4, 3], dtype=torch.int32)}),
    "apart in memory": lambda m, x: (x, {"lengths": torch.tensor([1, 0, 4, 0, 3])[::2]}),
    "list": lambda m, x: (x, {"lengths": [2, 2, 3]}),
    "tuple": lambda m, x: (x, {"lengths": (3, 2, 1)}),
    "rows without a step": lambda m, x: (x, {"lengths": [0, 3, 0]}),
    "last row without a step": lambda m, x: (x, {"lengths": [4, 3, 0]}),
    "all steps": lambda m, x: (x, {"lengths": [T] * B}),
    "reset": lambda m, x: (x, {"reset": marks(m)}),
    "lengths and reset": lambda m, x: (x, {"lengths": [1, 4, 3], "reset": marks(m)}),
    "all steps and reset": lambda m, x: (x, {"lengths": [T] * B, "reset": marks(m)}),
    "packed": lambda m, x: (packed(m, x, [4, 3, 1]), {}),
    "packed, unsorted": lambda m, x: (packed(m, x, [3, 1, 4], enforce_sorted=False), {}),
    "packed, all steps": lambda m, x: (packed(m, x, [4, 4, 4]), {}),
    "packed, reset": lambda m, x: (packed(m, x, [4, 3, 1]), {"reset": marks(m)}),
    "packed, unsorted, reset": lambda m, x: (
        packed(m, x, [3, 1, 4], enforce_sorted=False),
        {"reset": marks(m)},
    ),
    "packed, all steps, another order, reset": lambda m, x: (
        PackedSequence(*packed(m, x, [4, 4, 4])[:2], torch.tensor([2, 0, 1])),
        {"reset": marks(m)},
    ),
}  # fmt: skip


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs something without the short way."""

    def run_long(what: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(_backends, "undisturbed", lambda name: False)
            return what()

    return run_long


@pytest.mark.parametrize("hx", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_long_way(
    name: str, form: str, hx: bool, taken: list[bool], long_way: Callable[..., Any]
) -> None:
    """To the bit, in the same form; gradients too, of x in the same layout of memory."""
    module = build(name)
    x, state = arguments(module)
    given, call = FORMS[form](module, x)
    short = run(module, (given, state), hx, **call)
    assert taken == [True]
    long = long_way(lambda: run(module, (given, state), hx, **call))
    assert len(taken) == 1
    assert same_bits(short, long)
    assert [t.stride() for t in short] == [t.stride() for t in long]
    assert type(module(given, **call)[0]) is type(given)


def test_transforms_leave_nothing_behind(taken: list[bool]) -> None:
    """Torch keeps a state of transforms for a thread once it has run any."""
    torch.func.vmap(torch.sin)(torch.ones(2))
    module = build("GRU both ways, batch first")
    x, state = arguments(module)
    dx = run(module, (x, state), True, lengths=[1, 4, 3])[2]
    assert taken == [True] and dx.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_without_gradients(
    form: str, dtype: torch.dtype, taken: list[bool], long_way: Callable[..., Any]
) -> None:
    module = build("LSTM both ways", dtype)
    x, state = arguments(module)
    given, call = FORMS[form](module, x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            short = tensors(module(given, state, **call))
            long = long_way(lambda: tensors(module(given, state, **call)))
        assert not any(t.requires_grad for t in short) and same_bits(short, long)
    assert taken == [True, True]


@pytest.mark.parametrize("form", FORMS)
def test_under_autocast(form: str, taken: list[bool], long_way: Callable[..., Any]) -> None:
    module = build("LSTM", torch.float32)
    x, state = arguments(module)
    given, call = FORMS[form](module, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        short = run(module, (given, state), True, **call)
        assert taken == [True]
        assert same_bits(short, long_way(lambda: run(module, (given, state), True, **call)))


@pytest.mark.parametrize("form", FORMS)
def test_functions_take_it(form: str, taken: list[bool]) -> None:
    module = build("LSTM")
    x, state = arguments(module)
    given, call = FORMS[form](module, x)
    want = tensors(module(given, state, **call))
    got = tensors(rnnkernels.functional.lstm(given, state, module.all_weights, **call))
    assert taken == [True, True] and same_bits(got, want)


def test_options_of_functions_go_the_long_way(taken: list[bool]) -> None:
    module = build("GRU")
    x, state = arguments(module)
    calls: list[dict[str, Any]] = [
        {"truncate": 2},
        {"grad_clip": 1.0},
        {"recompute": 2},
        {"heads": 1, "zoneout": 0.5},
        {"recurrent_dropout": 0.5, "training": True},
        {"return_all_states": True},
        {"backend": "cpu"},
    ]
    for call in calls:
        rnnkernels.functional.gru(x, state, module.all_weights, **call)
    assert taken == []
    rnnkernels.functional.gru(x, state, module.all_weights, bidirectional=False, training=True)
    assert taken == [True]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[..., ::2],
        lambda x: x[:, ::2],
        lambda x: x[:, :1].expand(-1, B, -1),
        lambda x: torch._neg_view(x),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    ],
    ids=["features apart", "rows apart", "repeated", "negative", "batch first inside"],
)
def test_memory_of_the_input(
    change: Callable[[Tensor], Tensor], taken: list[bool], long_way: Callable[..., Any]
) -> None:
    module = build("GRU")
    base = draw(T, 2 * B, 2 * I, seed=1, dtype=torch.float64).requires_grad_()

    def results() -> list[Tensor]:
        x = change(base)[:, :B, :I]
        y, h = module(x, lengths=[1, 4, 3])
        return [y, h, *torch.autograd.grad((y * y).sum() + h.sum(), base)]

    short = results()
    assert taken == [True] and same_bits(short, long_way(results))


def test_many_rows_are_copied_by_threads(long_way: Callable[..., Any]) -> None:
    module = rnnkernels.GRU(80, 8, batch_first=True)
    x = torch.randn(50, 60, 80, requires_grad=True)
    lengths = torch.randint(0, 61, (50,))
    short = run(module, (x, None), False, lengths=lengths)
    assert same_bits(short, long_way(lambda: run(module, (x, None), False, lengths=lengths)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by make_dual
@pytest.mark.parametrize("form", ["lengths", "rows without a step", "packed, unsorted, reset"])
def test_further_derivatives(form: str, taken: list[bool], long_way: Callable[..., Any]) -> None:
    """A second derivative, a batch of gradients, gradients of which nothing is asked, tangents."""
    module = build("LSTM")
    x, state = arguments(module)
    given, call = FORMS[form](module, x)
    (leaf,) = tensors(given)

    def results() -> list[Tensor]:
        out = tensors(module(given, state, **call))
        y, h, c = out
        first = torch.autograd.grad((y * y).sum() + c.sum(), [leaf, *state], create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), [leaf, *state])
        basis = draw(3, *h.shape, seed=2, dtype=h.dtype)
        out = tensors(module(given, state, **call))
        batch = torch.autograd.grad(out[1], [leaf, state[0]], basis, is_grads_batched=True)
        with forward_ad.dual_level():
            duals = tuple(forward_ad.make_dual(s, torch.ones_like(s)) for s in state)
            moved = tensors(module(given, duals, **call))
            tangents = [forward_ad.unpack_dual(t).tangent for t in moved]
        return [*first, *second, *batch, *tangents]

    short = results()
    assert taken == [True] * 3
    for got, want in zip(short, long_way(results), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by the compiler
def test_compiled_autograd(taken: list[bool], fresh_compiler: None) -> None:
    module = build("GRU")
    x, h = arguments(module)
    want = run(module, (x, h), True, lengths=[1, 4, 3])
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        got = run(module, (x, h), True, lengths=[1, 4, 3])
    assert taken == [True, True]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-13)


def test_outputs_may_be_changed_in_place(long_way: Callable[..., Any]) -> None:
    module = build("GRU")
    x, h = arguments(module)

    def results() -> list[Tensor]:
        y, h_n = module(x, h, lengths=[1, 4, 3])
        y.relu_()
        h_n[:, 0] = 0
        return [*torch.autograd.grad(y.sum() + h_n.sum(), [x, h, *module.parameters()])]

    assert same_bits(results(), long_way(results))


def inferred(*numbers: int) -> Tensor:
    with torch.inference_mode():
        return sizes(*numbers)


def with_parts(module: Any, x: Tensor, **parts: Any) -> PackedSequence:
    return packed(module, x, [4, 3, 1], enforce_sorted=False)._replace(**parts)


def sizes(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


#: Calls that go the long way, and the error or None.
UNUSUAL: dict[str, tuple[Callable[[Any, Tensor], Given], type[Exception] | None]] = {
    "array": (lambda m, x: (x, {"lengths": np.array([1, 4, 3])}), None),
    "int16": (lambda m, x: (x, {"lengths": sizes(1, 4, 3).short()}), None),
    "numbers of NumPy": (lambda m, x: (x, {"lengths": [np.int64(1), 4, 3]}), None),
    "a subclass": (lambda m, x: (x, {"lengths": sizes(1, 4, 3).as_subclass(Subclass)}), None),
    "no step at all": (lambda m, x: (x, {"lengths": [0, 0, 0]}), None),
    "bytes": (lambda m, x: (x, {"reset": marks(m).byte()}), None),
    "lists": (lambda m, x: (x, {"reset": marks(m).tolist()}), None),
    "one row": (lambda m, x: (x[:, 0], {"lengths": 3 * sizes(1)}), None),
    "too long": (lambda m, x: (x, {"lengths": [1, 5, 3]}), ValueError),
    "negative": (lambda m, x: (x, {"lengths": sizes(1, -1, 3)}), ValueError),
    "huge": (lambda m, x: (x, {"lengths": [1, 2**80, 3]}), ValueError),
    "few": (lambda m, x: (x, {"lengths": [1, 4]}), ValueError),
    "many": (lambda m, x: (x, {"lengths": sizes(1, 4, 3, 2)}), ValueError),
    "bools": (lambda m, x: (x, {"lengths": [True, 4, 3]}), TypeError),
    "floats": (lambda m, x: (x, {"lengths": sizes(1, 4, 3).float()}), TypeError),
    "a number": (lambda m, x: (x, {"lengths": 3}), TypeError),
    "two dimensions": (lambda m, x: (x, {"lengths": sizes(1, 4, 3)[None]}), ValueError),
    "meta": (lambda m, x: (x, {"lengths": sizes(1, 4, 3).to("meta")}), RuntimeError),
    "reset of other rows": (lambda m, x: (x, {"reset": marks(m).t()}), ValueError),
    "reset of numbers": (lambda m, x: (x, {"reset": marks(m).int()}), TypeError),
    "reset on meta": (lambda m, x: (x, {"reset": marks(m).to("meta")}), RuntimeError),
    "lengths beside a PackedSequence": (
        lambda m, x: (with_parts(m, x), {"lengths": [4, 3, 1]}),
        ValueError,
    ),
    "sizes that increase": (
        lambda m, x: (with_parts(m, x, batch_sizes=sizes(2, 3, 2, 1)), {}),
        ValueError,
    ),
    "sizes of 0": (lambda m, x: (with_parts(m, x, batch_sizes=sizes(3, 3, 2, 0)), {}), ValueError),
    "other sizes": (lambda m, x: (with_parts(m, x, batch_sizes=sizes(3, 2, 2)), {}), ValueError),
    "more sizes": (lambda m, x: (with_parts(m, x, batch_sizes=sizes(3, 2, 2, 2)), {}), ValueError),
    "no sizes": (lambda m, x: (with_parts(m, x, batch_sizes=sizes()), {}), TypeError),
    "sizes of int32": (
        lambda m, x: (with_parts(m, x, batch_sizes=sizes(3, 2, 2, 1).int()), {}),
        TypeError,
    ),
    "data of three dimensions": (
        lambda m, x: (with_parts(m, x, data=draw(8, 1, I, seed=1, dtype=x.dtype)), {}),
        RuntimeError,
    ),
    "order of other rows": (
        lambda m, x: (with_parts(m, x, sorted_indices=sizes(0, 1, 3)), {}),
        ValueError,
    ),
    "order of fewer rows": (
        lambda m, x: (with_parts(m, x, unsorted_indices=sizes(0, 1)), {}),
        ValueError,
    ),
    "order made in inference mode": (
        lambda m, x: (with_parts(m, x, unsorted_indices=inferred(1, 2, 0)), {}),
        RuntimeError,
    ),
    "a row twice": (lambda m, x: (with_parts(m, x, sorted_indices=sizes(0, 1, 1)), {}), None),
    "reset of other packed rows": (
        lambda m, x: (with_parts(m, x), {"reset": marks(m)[1:]}),
        ValueError,
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_goes_the_long_way(
    name: str, taken: list[bool], long_way: Callable[..., Any]
) -> None:
    """Which has its own checks and errors: the same as without the short way."""
    change, error = UNUSUAL[name]
    module = build("GRU")
    x, h = (t.detach() for t in arguments(module))
    given, call = change(module, x)
    hx = h[:, 0] if isinstance(given, Tensor) and given.dim() == 2 else h

    def outcome() -> tuple[str, list[Tensor]]:
        try:
            return "", tensors(module(given, hx, **call))
        except (TypeError, ValueError, RuntimeError) as raised:
            return f"{type(raised).__name__}: {raised}", []

    text, found = outcome()
    want_text, want = long_way(outcome)
    assert taken == [False]
    assert text == want_text and same_bits(found, want)
    assert text.startswith("" if error is None else error.__name__) and bool(text) == bool(error)


def test_wrong_states_go_the_long_way(taken: list[bool]) -> None:
    """Of a batch whose rows stand in another order, or do not all take part."""
    module = build("GRU")
    x, h = arguments(module)
    for given, call in (
        FORMS["packed, unsorted"](module, x),
        FORMS["rows without a step"](module, x),
    ):
        for wrong in (h[:, 1:], h[..., 1:], h.float()):
            with pytest.raises((RuntimeError, ValueError), match=r"hidden|hx"):
                module(given, wrong, **call)
    assert taken == [False] * 6


@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_has_its_bits_in_any_batch(threads: int, taken: list[bool]) -> None:
    module = build("GRU", torch.float32)
    x = draw(30, 9, I, seed=3, dtype=torch.float32)
    lengths = [30, 1, 0, 7, 7, 29, 2, 30, 12]
    torch.set_num_threads(threads)
    with rnnkernels.batch_invariant():
        y, h_n = module(x, lengths=lengths)
        for b, n in enumerate(lengths):
            alone, last = module(x[:n, b : b + 1])
            assert torch.equal(y[:n, b : b + 1], alone) and not y[n:, b].any()
            assert torch.equal(h_n[:, b : b + 1], last)
    assert all(taken) and h_n.shape == (1, 9, H)
