"""Conversion where something beside the registered modules holds a layer: it runs what was
converted, or nothing is changed and the error names the holder."""

from __future__ import annotations

import functools
import types
import unittest
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rnnkernels
from rnnkernels import convert, convertible, from_torch, revert
from rnnkernels.interop import _holders as holders

I, H = 3, 4


class Anything:
    """A plain object."""

    def __init__(self, held: Any) -> None:
        self.held = held


class Slots:
    __slots__ = ("empty", "held")

    def __init__(self, held: Any) -> None:
        self.held = held


class Model(nn.Module):
    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.rnn = layer or nn.LSTM(I, H)
        self.holder: Any = None


def closure(held: Any) -> Callable[..., Any]:
    unset: Any

    def use(*args: Any) -> Any:
        return held(*args)

    def never() -> Any:
        return unset  # an empty cell

    use.never = never  # type: ignore[attr-defined]
    del never
    return use
    unset = None


def default(held: Any) -> Callable[..., Any]:
    def use(x: Tensor, inner: Any = held) -> Any:
        return inner(x)

    return use


def keyword_default(held: Any) -> Callable[..., Any]:
    def use(x: Tensor, *, inner: Any = held) -> Any:
        return inner(x)

    return use


def method(held: Any) -> Any:
    return types.MethodType(lambda self, x: self.held(x), Anything(held))


def method_closure(held: Any) -> Any:
    return types.MethodType(lambda self, x: held(x), Anything(None))


def wrapped(held: Any) -> Any:
    @functools.wraps(held)
    def use(x: Tensor) -> Any:
        return x

    return use


def cycle(held: Any) -> list[Any]:
    loop: list[Any] = [held]
    loop.insert(0, loop)
    return loop


#: How something can be held, and how the error calls it.
HOLDERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "attribute": (lambda f: f, r"holder holds"),
    "list": (lambda f: [1, f], r"holder\[1\] holds"),
    "tuple": (lambda f: ((f,),), r"holder\[0\]\[0\] holds"),
    "set": (lambda f: {f}, r"holder\[0\] holds"),
    "deque": (lambda f: deque([f]), r"holder\[0\] holds"),
    "dict": (lambda f: {"a": {2: f}}, r"holder\['a'\]\[2\] holds"),
    "key": (lambda f: {f: 1}, r"holder, a key holds"),
    "partial": (lambda f: functools.partial(print, f), r"holder, argument 0 of a partial"),
    "partial-keyword": (lambda f: functools.partial(print, end=f), r"argument 'end' of a partial"),
    "partial-function": (lambda f: functools.partial(f, hx=None), r"function of a partial"),
    "object": (Anything, r"holder\.held holds"),
    "slots": (Slots, r"holder\.held holds"),
    "closure": (closure, r"variable 'held' of closure\.<locals>\.use \(.*test_holders\.py:\d+\)"),
    "default": (default, r"default 0 of default\.<locals>\.use \(.*test_holders\.py:\d+\)"),
    "keyword-default": (keyword_default, r"default 'inner' of keyword_default"),
    "method": (method, r"holder\.__self__\.held holds"),
    "method-closure": (method_closure, r"variable 'held' of method_closure\.<locals>\.<lambda>"),
    "wrapped": (wrapped, r"holder\.__wrapped__ holds"),
    "cache": (lambda f: functools.lru_cache(f), r"holder\.__wrapped__ holds"),
    "cycle": (cycle, r"holder\[1\] holds"),
    "unregistered": (lambda f: [Model(nn.Linear(1, 1)), Anything(f)], r"holder\[1\]\.held holds"),
}


@pytest.mark.parametrize("library", [nn, rnnkernels], ids=["convert", "revert"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_held_forward_is_refused_and_a_held_module_is_served(holder: str, library: Any) -> None:
    """It would go on to run the old class, and not the one that the type says."""
    make, named = HOLDERS[holder]
    change = convert if library is nn else revert
    model = Model(library.LSTM(I, H))
    model.holder = make(model.rnn.forward)
    first = nn.Sequential(library.GRU(I, H), model)
    before = [type(m) for m in first.modules()]
    with pytest.raises(TypeError, match=rf"model: 1\.rnn: .*{named}") as error:
        change(first)
    assert f"run {'torch.nn' if library is nn else 'rnnkernels'}.LSTM" in str(error.value)
    assert [type(m) for m in first.modules()] == before
    model.holder = make(model.rnn)  # the module itself: it is converted, wherever it is held
    change(first)
    other = rnnkernels if library is nn else nn
    assert type(model.rnn) is getattr(other, "LSTM") and type(first[0]) is other.GRU  # noqa: B009


def test_a_weak_reference_to_forward_is_refused() -> None:
    model = Model()
    model.holder = weakref.WeakMethod(model.rnn.forward)
    with pytest.raises(TypeError, match="holder holds the layer's forward"):
        convert(model)


def test_a_partial_of_the_class_and_the_layer_is_refused() -> None:
    model = Model()
    model.holder = functools.partial(nn.LSTM.forward, model.rnn)
    with pytest.raises(TypeError, match="holder holds the layer's forward"):
        convert(model)


def test_a_hook_that_holds_forward_is_refused() -> None:
    model = Model()
    model.register_forward_hook(closure(model.rnn.forward))
    with pytest.raises(TypeError, match=r"_forward_hooks\[\d+\], variable 'held' of closure"):
        convert(model)


def weight_drop(layer: Any) -> None:
    raw, inner = layer.weight_hh_l0, layer.forward
    del layer._parameters["weight_hh_l0"]
    layer.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))

    def forward(*args: Any, **kwargs: Any) -> Any:
        layer.weight_hh_l0 = nn.functional.dropout(layer.weight_hh_l0_raw, 0.5, layer.training)
        return inner(*args, **kwargs)

    layer.forward = forward


def hook(layer: Any) -> None:
    """As accelerate puts its hooks on a module."""
    old = layer.forward
    new = functools.partial(lambda m, *args: old(*args), layer)
    layer._old_forward, layer.forward = old, functools.update_wrapper(new, old)


def unhook(layer: Any) -> None:
    layer.forward = layer._old_forward
    del layer._old_forward


@pytest.mark.parametrize("patch", [weight_drop, hook])
@pytest.mark.parametrize("library", [nn, rnnkernels], ids=["convert", "revert"])
def test_a_replaced_forward_is_refused(patch: Any, library: Any) -> None:
    change = convert if library is nn else revert
    model = nn.Sequential(library.GRU(I, H), library.LSTM(I, H))
    patch(model[1])
    where = rf"by {patch.__name__}\.<locals>\..* \(.*test_holders\.py:\d+\)"
    for target, name in ((model, "model: 1"), (model[1], "model")):
        with pytest.raises(TypeError, match=rf"{name}: forward is replaced .*{where}"):
            change(target)
    assert [type(m) for m in model] == [library.GRU, library.LSTM]
    if library is nn:
        with pytest.raises(TypeError, match=r"module: forward is replaced"):
            from_torch(model[1])


def test_a_forward_put_back_is_no_obstacle() -> None:
    """A removed hook leaves the class's own forward on the instance."""
    layer, x = nn.LSTM(I, H), torch.randn(5, I)
    expected = layer(x)[0]
    hook(layer)
    unhook(layer)
    assert "forward" in vars(layer)
    for model in (convert(nn.Sequential(layer)), nn.Sequential(from_torch(nn.LSTM(I, H)))):
        assert "forward" not in vars(model[0])
    torch.testing.assert_close(layer(x)[0], expected)


def test_patched_after_conversion_works_as_with_torchs() -> None:
    outputs = []
    for library in (nn, rnnkernels):
        torch.manual_seed(0)
        layer = library.LSTM(I, H)
        weight_drop(layer)
        hook(layer)
        x = torch.randn(5, I)
        outputs.append((layer(x)[0], layer.eval()(x)[0]))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_what_holds_a_layer_that_is_replaced_itself_is_named() -> None:
    """A layer by itself gets a new module, which a hook of the old one does not know."""
    layer = nn.GRU(I, H)
    handle = layer.register_forward_hook(closure(layer))
    for change in (convert, from_torch):
        with pytest.raises(TypeError, match=r"_forward_hooks\[.*variable 'held'.* holds the layer"):
            change(layer)
    model = convert(nn.ModuleList([layer]))
    assert type(model[0]) is rnnkernels.GRU and model[0] is layer
    handle.remove()


def test_subclasses_may_be_held_as_they_like() -> None:
    class Special(nn.LSTM):
        pass

    model = Model(Special(I, H))
    model.holder = [model.rnn.forward, nn.LSTM.forward]
    other = nn.Sequential(nn.LSTM(I, H), model)
    convert(other)
    assert type(other[0]) is rnnkernels.LSTM and type(model.rnn) is Special


def test_the_walk_runs_no_code_of_what_it_meets() -> None:
    class Trap:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"asked for {name}")

        @property
        def forbidden(self) -> Any:
            raise AssertionError("a property was run")

    gone = nn.Linear(1, 1)
    model = Model()
    model.holder = [Trap(), weakref.proxy(gone), weakref.ref(gone), torch.zeros(2), iter([1])]
    del gone
    found = dict(holders.walk(model))
    assert found["holder[2]"]() is None
    assert list(holders.walk(model)) and "rnn" in found
    assert type(convert(model).rnn) is rnnkernels.LSTM


def test_shared_closures_are_walked_once() -> None:
    """Places that hold each other all over take no exponential time."""
    model = Model()
    layers: list[Any] = [[]]
    for _ in range(200):
        layers.append([layers[-1], layers[-1]])
    model.holder = layers[-1]
    assert len(list(holders.walk(model))) < 1000


class Special(nn.GRU):
    pass


def everything() -> nn.Module:
    model = Model()
    model.cell = nn.GRUCell(I, H)
    model.special = Special(I, H)
    model.ours = rnnkernels.GRU(I, H)
    model.plain = [nn.RNN(I, H), {"again": nn.Sequential(nn.LSTM(I, H))}]
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit.:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_the_report_says_what_becomes_of_each() -> None:
    model: Any = everything()
    model.script = torch.jit.script(nn.Sequential(nn.GRUCell(I, H)))
    model.none = torch.jit.script(nn.Linear(I, H))
    quantised = torch.ao.nn.quantized.dynamic.LSTM(I, H)
    model.quantised = quantised
    before = [type(m) for m in model.modules()]
    lines = str(convertible(model)).splitlines()
    assert lines[:2] == [
        "rnn: torch.nn.LSTM -> rnnkernels.LSTM",
        "cell: torch.nn.GRUCell -> rnnkernels.GRUCell",
    ]
    expected = {
        "special: ": r"a subclass of torch.nn.GRU may compute anything",
        "ours: ": "it is a layer of rnnkernels",
        "script: ": "TorchScript, compiled with GRUCell inside",
        "quantised: ": "quantised weights",
        "plain[0]: torch.nn.RNN ": "no registered module",
        "plain[1]['again'].0: torch.nn.LSTM ": "no registered module",
    }
    assert len(lines) == 2 + len(expected)
    for line, (name, reason) in zip(lines[2:], expected.items(), strict=True):
        assert line.startswith(name) and reason in line, line
    kept = convertible(model, keep_type=True).layers
    assert kept[0].becomes == "rnnkernels.torch_types.LSTM"
    assert kept[3].becomes == "rnnkernels.torch_types.GRU"
    assert [type(m) for m in model.modules()] == before
    assert str(convertible(nn.Linear(1, 1))) == "no recurrent layer or cell"


def test_the_report_has_what_convert_refuses() -> None:
    model = Model()
    model.other = parametrizations.weight_norm(nn.GRU(I, H), "weight_hh_l0")
    hook(model.rnn)
    first, second = convertible(model).layers
    assert first.refused and "forward is replaced" in first.reason
    assert second.refused and "is parametrized" in second.reason
    assert {first, second} == set(convertible(model).left_alone)


def logged(change: Callable[[nn.Module], object], model: nn.Module) -> list[str]:
    with unittest.TestCase().assertLogs("rnnkernels", level="INFO") as logs:
        change(model)
    return [record.getMessage() for record in logs.records]


def test_convert_logs_the_report() -> None:
    model = everything()
    expected = [f"convert: {line}" for line in str(convertible(model)).splitlines()]
    assert logged(convert, model) == expected
    assert "revert: rnn: rnnkernels.LSTM -> torch.nn.LSTM" in logged(revert, model)


def test_strict_names_every_layer_that_would_be_left_alone() -> None:
    model: Any = everything()
    with pytest.raises(TypeError) as error:
        convert(model, strict=True)
    for name in ("special", "plain[0]", "plain[1]['again'].0"):
        assert f"\n  {name}: " in str(error.value)
    assert "cell" not in str(error.value) and "ours" not in str(error.value)
    assert type(model.rnn) is nn.LSTM
    del model.special, model.plain
    assert type(convert(model, strict=True).rnn) is rnnkernels.LSTM


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(1, 1), r"nothing in torch\.nn\.Linear was converted: no recurrent layer"),
        (nn.Sequential(Special(I, H)), r"left alone\n  0: .*Special left alone: a subclass"),
    ],
    ids=["none", "subclass"],
)
def test_convert_warns_where_nothing_is_ours(model: nn.Module, said: str) -> None:
    with pytest.warns(UserWarning, match=said) as caught:
        convert(model)
    assert caught[0].filename == __file__
    convert(nn.Sequential(rnnkernels.GRU(I, H)))  # no warning: there is nothing left to do


def test_explain_tells_of_layers_that_are_not_ours() -> None:
    class Runs(Model):
        def forward(self, x: Tensor) -> Any:
            return self.ours(self.rnn(x)[0])[0]

    model: Any = Runs()
    model.ours, model.special = rnnkernels.GRU(H, H), Special(I, H)
    found = rnnkernels.explain(model, torch.randn(2, 1, I))
    assert [c.module for c in found.choices] == ["ours"]
    assert str(found).splitlines()[-2:] == [
        "rnn: torch.nn.LSTM, not run by rnnkernels: rnnkernels.convert(model) makes it "
        "rnnkernels.LSTM",
        f"special: {__name__}.Special, not run by rnnkernels: {found.others[1].reason}",
    ]
