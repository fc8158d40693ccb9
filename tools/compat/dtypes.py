"""Dtypes, autocast, and devices without numbers."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence

from compat.registry import CELLS, LAYERS, B, H, I, Library, Section, T, same, tensors, total

dtypes = Section("Dtypes")
row = dtypes.row
NARROW = (torch.bfloat16, torch.float16)


def given(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    return torch.randn(*((B, I) if kind in CELLS else (T, B, I)), dtype=dtype)


def state(kind: str, dtype: torch.dtype) -> Any:
    h = torch.randn(*((B, H) if kind in CELLS else (1, B, H)), dtype=dtype)
    return (h, h) if "LSTM" in kind else h


def under_autocast(library: Library, dtype: torch.dtype, of_state: torch.dtype | None) -> None:
    """The dtypes and, roughly, the numbers of torch.nn."""
    for kind in (*LAYERS, *CELLS):
        x, hx = given(kind), None if of_state is None else state(kind, of_state)
        with torch.autocast("cpu", dtype):
            found = tensors(library.make(kind)(x, hx))
            want = tensors(Library("torch.nn", nn).make(kind)(x, hx))
        assert [t.dtype for t in found] == [t.dtype for t in want], kind
        same([t.float() for t in found], [t.float() for t in want], 0.05)


CLASSES = (
    "on a CPU, torch.nn's GRU, GRUCell and LSTMCell give the dtype of their state, since autocast "
    "does not list them there, and its other classes what autocast casts to. All of ours give what "
    "it casts to ([design](design.md#semantics)), as a row below shows."
)


@row("autocast to bfloat16: dtypes and numbers of torch.nn", exception=CLASSES)
def _(library: Library) -> None:
    under_autocast(library, torch.bfloat16, None)


@row("autocast to bfloat16 with float32 and with bfloat16 states: the same", exception=CLASSES)
def _(library: Library) -> None:
    for of_state in (torch.float32, torch.bfloat16):
        under_autocast(library, torch.bfloat16, of_state)


@row("autocast to bfloat16: every class gives bfloat16, whatever its state")
def _(library: Library) -> None:
    for kind in (*LAYERS, *CELLS):
        for of_state in (None, torch.float32, torch.bfloat16):
            hx = None if of_state is None else state(kind, of_state)
            with torch.autocast("cpu", torch.bfloat16):
                found = tensors(library.make(kind)(given(kind), hx))
            assert {t.dtype for t in found} == {torch.bfloat16}, kind


@row("autocast to float16 runs every class")
def _(library: Library) -> None:
    for kind in (*LAYERS, *CELLS):
        with torch.autocast("cpu", torch.float16):
            assert all(t.isfinite().all() for t in tensors(library.make(kind)(given(kind))))


@row("autocast to bfloat16: a PackedSequence; cells in a loop")
def _(library: Library) -> None:
    for kind in LAYERS:
        layer, x = library.make(kind), given(kind)
        packed = pack_padded_sequence(x, torch.tensor([T, 2, 1]))
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(packed)[0].data
        same(found.float(), layer(packed)[0].data, 0.05)
    for kind in CELLS:
        cell, x = library.make(kind), given(kind)
        with torch.autocast("cpu", torch.bfloat16):
            found = tensors(steps(cell, x, 4))
        same([t.float() for t in found], tensors(steps(cell, x, 4)), 0.05)
        total(found).backward()
        assert all(p.grad is not None for p in cell.parameters())


def steps(cell: nn.Module, x: Tensor, count: int) -> Any:
    hx = None
    for _ in range(count):
        hx = cell(x, hx)
    return hx


@row("autocast to bfloat16, 200 steps of a cell: at most twice the error of torch.nn's")
def _(library: Library) -> None:
    for kind in CELLS:
        x, errors = given(kind), []
        for each in (library, Library("torch.nn", nn)):
            cell = each.make(kind)
            with torch.no_grad():
                want = tensors(steps(cell, x, 200))[0]
                with torch.autocast("cpu", torch.bfloat16):
                    found = tensors(steps(cell, x, 200))[0]
            errors.append(float((found.float() - want).abs().max()))
        assert errors[0] <= 2 * errors[1] + 1e-6, f"{kind}: {errors}"


@row("GradScaler and autocast: a training step")
def _(library: Library) -> None:
    model = library.model()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = total(model(given("LSTM")))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all((p != q).any() for p, q in zip(model.parameters(), before, strict=True))


@row("a model .to(bfloat16), .half(), .double()")
def _(library: Library) -> None:
    for kind, dtype in itertools.product(LAYERS, (*NARROW, torch.float64)):
        x = given(kind, dtype)
        found = library.model(kind).to(dtype)(x)
        assert found.dtype == dtype
        same(found.float(), library.model(kind)(x.float()), 0.05)


@row("set_default_dtype(float64)")
def _(library: Library) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert library.model()(given("LSTM", torch.float64)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@row("built on meta, to_empty, load_state_dict")
def _(library: Library) -> None:
    whole = library.model()
    with torch.device("meta"):
        empty = library.model()
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(whole.state_dict())
    x = given("LSTM")
    same(filled(x), whole(x))


@row("built on meta, load_state_dict(assign=True)")
def _(library: Library) -> None:
    whole = library.model()
    with torch.device("meta"):
        filled = library.model()
    filled.load_state_dict(whole.state_dict(), assign=True)
    x = given("LSTM")
    same(filled(x), whole(x))


@row("built on meta, to_empty, reset_parameters: initial weights of the seed")
def _(library: Library) -> None:
    for kind in (*LAYERS, *CELLS):
        with torch.device("meta"):
            made = library.make(kind)
        made.to_empty(device="cpu")
        torch.manual_seed(0)
        made.reset_parameters()
        x = given(kind)
        same(made(x), library.make(kind)(x))


@row("nn.utils.skip_init, then reset_parameters")
def _(library: Library) -> None:
    for kind in LAYERS:
        made: Any = nn.utils.skip_init(getattr(library.module, kind), I, H)
        torch.manual_seed(0)
        made.reset_parameters()
        x = given(kind)
        same(made(x), library.make(kind)(x))


@row("forward and backward on meta: shapes")
def _(library: Library) -> None:
    for kind in (*LAYERS, *CELLS):
        module = library.make(kind).to("meta")
        x = given(kind).to("meta").requires_grad_()
        found = tensors(module(x))
        total(found).backward()
        assert x.grad is not None and x.grad.shape == x.shape
        assert [t.shape for t in found] == [
            t.shape for t in tensors(library.make(kind)(given(kind)))
        ]


@row("FakeTensorMode: forward and backward")
def _(library: Library) -> None:
    for kind in (*LAYERS, *CELLS):
        with FakeTensorMode():
            module = library.make(kind)
            total(module(given(kind))).backward()
            assert all(p.grad is not None for p in module.parameters())


@row("FakeTensorMode over a module that is real")
def _(library: Library) -> None:
    for kind in LAYERS:
        module = library.make(kind)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            found = tensors(module(mode.from_tensor(torch.randn(T, B, I))))
        assert found[0].shape == (T, B, H)


@row("complex64: the numbers, or an error that names the dtype")
def _(library: Library) -> None:
    for kind in LAYERS:
        try:
            module = library.make(kind).to(torch.complex64)
            found = tensors(module(given(kind, torch.complex64)))
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            assert "omplex" in str(error), str(error)
        else:
            assert all(t.is_complex() for t in found)
