"""Fake kernels of the ops: the shapes and types of what they return, and what they check, without
values. They serve ``torch.compile``, export and tensors on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rnnkernels._core import checks
from rnnkernels._core.call import LayerWeights, norms_dtype, units
from rnnkernels._ops.schema import FIRST_WEIGHT, arguments
from rnnkernels.cells import find

Shape = tuple[int | torch.SymInt, ...]


def _on_one_device(like: Tensor, a: Any) -> None:
    """A meta tensor among the arguments brings a call here, whatever the device of the others."""
    for name, value in vars(a).items():
        tensors = value if isinstance(value, (list, tuple)) else [value]
        for i, t in enumerate(tensors):
            if isinstance(t, Tensor) and t.device != like.device:
                users = _USERS_NAMES.get(name, name)
                shown = _name_of_weight(a, i) if name == "weights" else users
                raise RuntimeError(
                    f"{shown}: expected device {like.device} like the input, got {t.device}"
                )


def _arguments(op: str, like: str, values: Sequence[Any]) -> SimpleNamespace:
    """The arguments of a fake kernel: what shapes are made from is checked here, as the kernels do
    in ``csrc/ops/check.cpp``; ``like`` names the tensor that has all steps."""
    a = arguments(op, values)
    _check_tensors(**{like: getattr(a, like), "h0": a.h0})
    for name in ("layers", "directions", "heads"):
        if getattr(a, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {getattr(a, name)}")
    cell = find(a.cell)
    if (a.c0 is None) != (cell.C == 0):
        wanted = "an initial c" if cell.C else "no c"
        raise ValueError(
            f"c0: a cell '{a.cell}' takes {wanted}, got {'none' if a.c0 is None else 'one'}"
        )
    packed = a.starts is not None
    for name, dims in (("h0", 3), ("c0", 3), ("starts", 1), (like, 2 if packed else 3)):
        t = getattr(a, name)
        if t is not None and t.dim() != dims:
            raise RuntimeError(f"{name}: expected {dims} dimensions, got shape {list(t.shape)}")
    _on_one_device(getattr(a, like), a)
    return a


def _check_tensors(**named: Any) -> None:
    """Schemas let ``None`` pass for a tensor, as which a further derivative hands on what it does
    not know of a forward: these have to be there."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")


_USERS_NAMES = {"h0": "hx", "c0": "cx"}


def _name_of_weight(a: Any, index: int) -> str:
    each, rest = divmod(len(a.weights), a.layers * a.directions)
    if not each or rest:
        return "weights"
    group, place = divmod(index, each)
    cell = find(a.cell)
    own = a.weights[group * each :][:each]
    weights = LayerWeights.from_list(own, a.projected, cell.P, cell.recurrent)
    names = [n for n, w in zip(checks.WEIGHT_NAMES, weights, strict=False) if w is not None]
    names += [f"weight_{name}" for name in cell.params]
    layer = -1 if getattr(a, "step", False) else group // a.directions
    return checks.parameter_name(names[place], layer, group % a.directions)


class _Sizes:
    """Those of a call of the ops: steps are [T, B], or packed [N]."""

    def __init__(self, a: Any, steps: Shape) -> None:
        self.steps, self.L, self.B = steps, a.layers, a.h0.size(1)
        self.heads, self.D = a.heads, a.directions * a.heads
        self.H, self.R = units(a), a.h0.size(2)
        self.cell, self.has_c = find(a.cell), a.c0 is not None
        self.C = self.cell.C * self.H  # of all states beside h
        self.projected = a.projected
        self.merged = a.directions > 1 and a.merge_mode != "concat"

    def every(self, *after: int | torch.SymInt) -> Shape:
        """The shape of what all layers have at all steps."""
        return (self.L, *self.steps, self.D, *after)

    def states(self, size: int | torch.SymInt) -> Shape:
        return (self.L * self.D, self.B, size)


def _fake_forward(*values: Any) -> tuple[Tensor, ...]:
    a = _arguments("sequence_forward", "x", values)
    n = _Sizes(a, tuple(a.x.shape[:-1]))
    inner = n.L if n.merged else n.L - 1
    kept = a.save or a.all_states

    def empty(yes: bool, *shape: int | torch.SymInt) -> Tensor:
        found: Tensor = a.x.new_empty(shape if yes else (0,))
        return found

    return (
        empty(True, *n.steps, n.heads * n.R if n.merged else n.D * n.R),
        empty(True, *n.states(n.R)),
        empty(n.has_c, *n.states(n.C)),
        empty(kept and inner > 0, inner, *n.steps, n.D * n.R),
        empty(kept and n.has_c, *n.every(n.C)),
        empty(a.save and n.projected, *n.every(n.H)),
        empty(a.save and n.cell.K > 0, *n.every(n.cell.K * n.H)),
    )


def _fake_backward(*values: Any) -> tuple[Tensor, ...]:
    a = _arguments("sequence_backward", "y", values)
    n = _Sizes(a, tuple(a.y.shape[:-1]))
    T = a.y.size(0) if a.starts is None else a.starts.size(0) - 1
    # One at least: where there are no steps, the rows are there all the same.
    windows = torch.sym_max(-(-T // a.window), 1) if a.window else 1  # type: ignore[no-untyped-call]

    def empty(yes: bool, *shape: int | torch.SymInt) -> Tensor:
        found: Tensor = a.y.new_empty(shape if yes else (0,))
        return found

    return (
        empty(True, *n.every((n.cell.G + n.cell.A) * n.H)),
        empty(a.initial, *n.states(n.R)),
        empty(a.initial and n.has_c, *n.states(n.C)),
        empty(n.projected, *n.every(n.R)),
        empty(a.record, *n.every()).to(norms_dtype(a.y.dtype)),
        empty(n.cell.P > 0, n.L, windows * n.B, n.D, n.cell.P * n.H).to(norms_dtype(a.y.dtype)),
    )


def _fake_backward_over_saved(*values: Any) -> tuple[Tensor, ...]:
    return _fake_backward(*values)[1:]


def _fake_input_gradient(dgates: Tensor, w_ih: Sequence[Tensor]) -> Tensor:
    _check_tensors(dgates=dgates)
    if not w_ih or dgates.dim() < 2 or any(w.dim() != 2 for w in w_ih):
        raise ValueError(
            "dgates, w_ih: expected [.., D, G*H] and [G*H, I] of each of D directions, got "
            f"{list(dgates.shape)} and {[list(w.shape) for w in w_ih]}"
        )
    _on_one_device(dgates, SimpleNamespace(w_ih=w_ih))
    return dgates.new_empty((*dgates.shape[:-2], w_ih[0].size(1)))


def _fake_gradients(*values: Any) -> tuple[list[Tensor], Tensor]:
    a = _arguments("sequence_gradients", "x", values)
    inputs = [a.x, a.h0, a.c0, *a.weights]
    found = []
    for i in a.wanted:
        if not 0 <= i < len(inputs) or inputs[i] is None:
            raise ValueError(
                f"wanted: expected positions from 0 to {len(inputs) - 1}, of x, h0, c0 where there "
                f"is one, and the weights, got {i}"
            )
        lanes = (a.lanes,) if a.lanes and i >= FIRST_WEIGHT else ()
        found.append(a.x.new_empty((*lanes, *inputs[i].shape)))
    every = a.layers, *a.x.shape[:-1], a.directions * a.heads
    norms = a.x.new_empty(every if a.record else (0,))
    return found, norms.to(norms_dtype(a.x.dtype)) if a.record else norms


def _check_factors(a: Tensor, b: Tensor, dim: int, names: str) -> None:
    """As in ``csrc/cpu/products.cpp``."""
    if a.dim() != 2 or b.dim() != 2 or a.size(dim) != b.size(0):
        raise ValueError(
            f"{names}: expected two matrices of one inner size, got shapes {list(a.shape)} and "
            f"{list(b.shape)}"
        )
    if a.dtype != b.dtype or not a.is_floating_point():
        raise ValueError(f"{names}: expected one floating dtype, got {a.dtype} and {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"{names}: expected tensors on one device, got {a.device} and {b.device}")


def _fake_rows_product(a: Tensor, w: Tensor) -> Tensor:
    _check_tensors(a=a, w=w)
    _check_factors(a, w, 1, "a, w")
    return a.new_empty((a.size(0), w.size(1)))


def _fake_steps_product(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    if not a or len(a) != len(b):
        raise ValueError(
            f"a, b: expected as many of both, and one or more, got {len(a)} and {len(b)}"
        )
    for left, right in zip(a, b, strict=True):
        _check_factors(left, right, 0, "a, b")
        both, first = (left.size(1), right.size(1)), (a[0].size(1), b[0].size(1))
        if both != first or left.dtype != a[0].dtype:
            raise ValueError(
                "a, b: expected products of one shape and dtype, got shapes "
                f"{list(left.shape)} and {list(right.shape)} behind {list(a[0].shape)} and "
                f"{list(b[0].shape)}"
            )
    return a[0].new_empty((a[0].size(1), b[0].size(1)))


def register() -> None:
    """For the ops of both libraries, where there are compiled kernels."""
    fake = torch.library.register_fake
    for library in ("rnnkernels", "rnnkernels_triton"):
        fake(f"{library}::sequence_forward", _fake_forward)
        fake(f"{library}::sequence_backward", _fake_backward)
        fake(f"{library}::sequence_backward_", _fake_backward_over_saved)
        fake(f"{library}::sequence_gradients", _fake_gradients)
    fake("rnnkernels::input_gradient", _fake_input_gradient)
    fake("rnnkernels::rows_product", _fake_rows_product)
    fake("rnnkernels::steps_product", _fake_steps_product)
