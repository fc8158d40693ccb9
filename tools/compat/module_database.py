"""torch's own database of modules, by which it tests torch.nn: its inputs and expected errors of
RNN, LSTM, GRU and their cells, and the checks that torch makes with them."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import re
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from compat.registry import CELLS, LAYERS, Library, Section, same, tensors

database = Section("torch's database of modules")
DOUBLE = torch.float64


def row(
    title: str, exception: str = ""
) -> Callable[[Callable[[Library], None]], Callable[[Library], None]]:
    return database.row(title, costly=True, exception=exception)


@functools.cache
def infos() -> list[Any]:
    """What the database has of the six classes."""
    if "expecttest" not in sys.modules:
        with suppress(ImportError):
            importlib.import_module("expecttest")
    if "expecttest" not in sys.modules:  # of which torch's tests take the base class alone
        stand_in: Any = types.ModuleType("expecttest")
        stand_in.TestCase, stand_in.ACCEPT = unittest.TestCase, False
        sys.modules["expecttest"] = stand_in
    modules = importlib.import_module("torch.testing._internal.common_modules")
    names = {(nn, name) for name in (*LAYERS, *CELLS)}
    return [info for info in modules.module_db if (nn, info.module_cls.__name__) in names]


class Sample(NamedTuple):
    """A module, and a call of it."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reference: Any

    def run(self) -> list[Tensor]:
        return tensors(self.module(*self.args, **self.kwargs))


def samples(library: Library, dtype: torch.dtype = DOUBLE, grad: bool = False) -> Iterator[Sample]:
    """All that the database has, in training and in evaluation."""
    assert len(infos()) == 6
    for info in infos():
        for training in (True, False):
            inputs = info.module_inputs_func(
                info, device="cpu", dtype=dtype, requires_grad=grad, training=training
            )
            assert inputs
            for each in inputs:
                made, call = each.constructor_input, each.forward_input
                torch.manual_seed(0)
                module = getattr(library.module, info.module_cls.__name__)(
                    *made.args, **made.kwargs, device="cpu", dtype=dtype
                )
                yield Sample(module.train(training), call.args, call.kwargs, each.reference_fn)


@row("forward, against torch's reference; twice the same bits")
def _(library: Library) -> None:
    for sample in samples(library):
        found = sample.run()
        same(found, tensors(sample.reference(sample.module, *sample.args, **sample.kwargs)))
        assert all(map(torch.equal, found, sample.run()))
        assert repr(sample.module).startswith(type(sample.module).__name__)


@row("pickle, state_dict, to_empty")
def _(library: Library) -> None:
    for sample in samples(library):
        twin = pickle.loads(pickle.dumps(sample.module))
        same(tensors(twin(*sample.args, **sample.kwargs)), sample.run(), 0)
        twin = copy.deepcopy(sample.module).to("meta").to_empty(device="cpu")
        twin.load_state_dict(sample.module.state_dict())
        same(tensors(twin(*sample.args, **sample.kwargs)), sample.run(), 0)


@row("training and evaluation; dtype and device of the constructor")
def _(library: Library) -> None:
    for dtype in (torch.float32, DOUBLE):
        for sample in samples(library, dtype):
            assert all(p.dtype == dtype for p in sample.module.parameters())
            assert all(t.dtype == dtype for t in sample.run())
            for training in (True, False):
                assert sample.module.train(training).training is training


@row("memory formats")
def _(library: Library) -> None:
    for sample in samples(library):
        want = sample.run()
        for form in (torch.channels_last, torch.channels_last_3d, torch.contiguous_format):
            sample.module.to(memory_format=form)
            same(sample.run(), want, 0)


def apart(value: Any) -> Any:
    """The same numbers with gaps between them."""
    if isinstance(value, (tuple, list)):
        return tuple(apart(each) for each in value)
    wide = torch.stack([value.detach(), value.detach() + 1], -1)
    return wide[..., 0].requires_grad_(value.requires_grad)


@row("inputs, states and parameters that are not contiguous: outputs and gradients")
def _(library: Library) -> None:
    for sample in samples(library, grad=True):
        leaves = [*tensors(sample.args), *sample.module.parameters()]
        want = sample.run()
        slopes = torch.autograd.grad(torch.stack([t.square().sum() for t in want]).sum(), leaves)
        args = apart(sample.args)
        with torch.no_grad():
            for p in sample.module.parameters():
                p.set_(apart(p.detach()))
        found = tensors(sample.module(*args, **sample.kwargs))
        same(found, want, 1e-10)
        leaves = [*tensors(args), *sample.module.parameters()]
        loss = torch.stack([t.square().sum() for t in found]).sum()
        same(list(torch.autograd.grad(loss, leaves)), list(slopes), 1e-10)


def checked(library: Library, check: Callable[..., bool], **options: Any) -> None:
    for sample in samples(library, grad=True):
        if not sample.module.training:  # the same once more: no sample has dropout
            continue
        flat = [*tensors(sample.args), *sample.module.parameters()]
        options_of_call = sample.kwargs

        def run(*given: Tensor, sample: Sample = sample, kwargs: Any = options_of_call) -> Any:
            left = iter(given)

            def again(value: Any) -> Any:
                return tuple(map(again, value)) if isinstance(value, tuple) else next(left)

            return tuple(tensors(sample.module(*again(sample.args), **kwargs)))

        assert check(run, flat, check_batched_grad=True, fast_mode=True, **options)


@row("gradcheck, with batches of gradients")
def _(library: Library) -> None:
    checked(library, gradcheck)


@row("gradgradcheck, with batches of gradients")
def _(library: Library) -> None:
    checked(library, gradgradcheck)


@row(
    "errors: types and texts",
    exception="the database hands 'relu' to cells as `bias`, which torch.nn's take for True and "
    "ours refuse, as layers of both do.",
)
def _(library: Library) -> None:
    modules = importlib.import_module(infos()[0].__module__)
    for info in infos():
        for each in info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=False
        ):
            given, name = each.module_error_input, info.module_cls.__name__
            made = given.constructor_input
            module = None
            try:
                module = getattr(library.module, name)(*made.args, **made.kwargs)
                call = given.forward_input
                module(*call.args, **call.kwargs)
            except each.error_type as error:
                late = each.error_on == modules.ModuleErrorEnum.FORWARD_ERROR
                assert late is (module is not None), f"{name}: raised elsewhere: {error}"
                assert re.search(each.error_regex, str(error)), f"{name}: {error}"
            else:
                raise AssertionError(f"{name}: no error: expected {each.error_regex}")
