"""Modules of cells that users write."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from rnnkernels import cells
from rnnkernels._core.option_checks import Zoneout
from rnnkernels.cells import DefinedCell
from rnnkernels.functional._noise import known
from rnnkernels.functional._spec import State
from rnnkernels.nn.base import RNNBase
from rnnkernels.nn.cells import RNNCellBase
from rnnkernels.nn.options import Options, spelled_out
from rnnkernels.nn.options import known as known_options


def cell(function: Callable[..., Any]) -> DefinedCell:
    """Makes a cell of a function of gates and states; a decorator.

    The function takes gates by position and states by keyword, and returns the next states::

        @rnnkernels.cell
        def mgu(f, n, *, h):
            f = torch.sigmoid(f)
            n = torch.tanh(n.x + f * n.h)
            return (1 - f) * h + f * n

        MGU = rnnkernels.layer(mgu)
        y, h_n = MGU(10, 20, num_layers=2)(torch.randn(5, 3, 10))

    Keywords behind the states may be parameters, which :func:`rnnkernels.per_unit` marks, and noise
    that is drawn at every step, which :func:`rnnkernels.bernoulli` does.

    It is called once, with symbols in place of numbers, and says what one hidden unit does in one
    step. A gate is its pre-activation ``W_ih x + b_ih + W_hh h + b_hh``; ``n.x`` and ``n.h`` are
    its input part ``W_ih x + b_ih`` and its hidden part ``W_hh h + b_hh``. The first state is h,
    which W_hh is multiplied by and which is the output. There may be others, and up to eight
    gates, whose rows the weights have in the order of the signature.

    Values are combined by ``+ - * /``, ``**`` with a number, and torch's ``exp``, ``log``,
    ``sigmoid``, ``tanh``, ``relu``, ``abs``, ``sqrt``, ``square``, ``minimum``, ``maximum``,
    ``clamp``, ``where`` of a comparison, and ``torch.nn.functional.softplus``. Numbers from outside
    are constants of the cell.

    From it follow kernels of forward and backward and all derivatives: see docs/cells.md. Kernels
    are compiled when the cell first runs.

    Raises:
        TypeError, ValueError: the function cannot be a cell; with file and line, what was expected,
            what came, and what to do.
    """
    return known(cells.define(function))


def layer(cell: DefinedCell) -> type[DefinedLayer]:
    """The layers of a cell that :func:`cell` made, as a class of modules.

    Arguments, options, calls, shapes and errors are those of :class:`rnnkernels.GRU` where the cell
    has one state, of :class:`rnnkernels.LSTM` where it has more, which ``hx`` and the last states
    are a tuple of; ``proj_size`` only where nothing but the output needs h. One cell has one class.

    Raises:
        TypeError: ``cell`` is something else.
    """
    return _layer(_checked(cell))


def cell_class(cell: DefinedCell) -> type[DefinedStep]:
    """A single step of a cell that :func:`cell` made, as a class of modules.

    Arguments, calls, shapes and errors are those of :class:`rnnkernels.GRUCell` where the cell has
    one state, of :class:`rnnkernels.LSTMCell` where it has more, which ``hx`` is a tuple of.

    Raises:
        TypeError: ``cell`` is something else.
    """
    return _cell_class(_checked(cell))


def _checked(cell: Any) -> DefinedCell:
    if not isinstance(cell, DefinedCell):
        raise TypeError(
            f"cell: expected what rnnkernels.cell returned, got {type(cell).__name__}. Put "
            "@rnnkernels.cell above the function"
        )
    return cell


class DefinedLayer(RNNBase):
    """Layers of a cell that a user wrote; :func:`rnnkernels.layer` makes a class of it."""

    definition: ClassVar[DefinedCell]

    @spelled_out(RNNBase)
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        own = self.definition
        known_options(type(self), options)
        if proj_size and (len(own.states) < 2 or own.reads_own_h):
            needs = "has no state beside h" if len(own.states) < 2 else "computes with h itself"
            raise ValueError(
                f"proj_size: expected 0 for the cell {own.title}, which {needs}: a projected h is "
                f"of another size. Got {proj_size}"
            )
        super().__init__(
            own.name,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
            **options,
        )

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "definition" in cls.__dict__ and len(cls.definition.states) == 2:
            # torch gives LSTM its own versions of these, for a pair of states
            for name in ("get_expected_cell_size", "check_forward_args", "permute_hidden"):
                setattr(cls, name, getattr(nn.LSTM, name))

    def _shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        own = {f"weight_{name}": (self.hidden_size,) for name in self.definition.params}
        return super()._shapes(layer) | own

    def reset_parameters(self) -> None:
        """As torch.nn's layers, but for parameters of the cell that begin otherwise."""
        super().reset_parameters()
        initial = self.definition.initial
        for group in self._all_weights:
            for name, begin in zip(group[len(group) - len(initial) :], initial, strict=True):
                begin.fill(getattr(self, name))

    @property
    def _kind(self) -> str:
        return self.definition.title

    @property
    def _noise(self) -> tuple[float, ...]:
        return self.definition.probabilities

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__dict__.copy()
        if type(self) is not _layer(self.definition):  # a class that is found by its own name
            return copyreg.__newobj__, (type(self),), state  # type: ignore[attr-defined]
        return _empty_layer, (self.definition,), state

    def __setstate__(self, state: Any) -> None:
        _same(self.definition, state["mode"])
        super().__setstate__(state)


class DefinedStep(RNNCellBase):
    """A step of a cell that a user wrote; :func:`rnnkernels.cell_class` makes a class of it."""

    definition: ClassVar[DefinedCell]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias_mode: str = "double",
        backend: str | None = None,
        zoneout: Zoneout = None,
        heads: int = 1,
    ) -> None:
        name, options = self.definition.name, (bias_mode, backend, zoneout, heads)
        super().__init__(input_size, hidden_size, bias, name, device, dtype, *options)
        for own in self.definition.params:
            parameter = nn.Parameter(torch.empty(self.hidden_size, device=device, dtype=dtype))
            setattr(self, f"weight_{own}", parameter)
        if self.definition.params:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn's cells, but for parameters of the cell that begin otherwise."""
        super().reset_parameters()
        for name, begin in zip(self.definition.params, self.definition.initial, strict=True):
            if hasattr(self, f"weight_{name}"):  # not yet, when torch's own are made
                begin.fill(getattr(self, f"weight_{name}"))

    def _params(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"weight_{name}") for name in self.definition.params)

    @property
    def _noise(self) -> tuple[float, ...]:
        return self.definition.probabilities

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        return self._step(input, hx)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__dict__.copy()
        if type(self) is not _cell_class(self.definition):
            return copyreg.__newobj__, (type(self),), state  # type: ignore[attr-defined]
        return _empty_step, (self.definition,), state

    def __setstate__(self, state: Any) -> None:
        _same(self.definition, state["cell"])
        super().__setstate__(state)  # type: ignore[no-untyped-call]


def _same(cell: DefinedCell, saved: str) -> None:
    if saved != cell.name:
        raise ValueError(
            f"cell {cell.title!r}: the module was saved when it was {saved!r}, and it is "
            f"{cell.name!r} now: the function has changed. Load its state_dict instead, if the "
            "weights still fit"
        )


@cache
def _layer(cell: DefinedCell) -> type[DefinedLayer]:
    names = {"definition": cell, "__doc__": _documented(cell, "Layers")}
    return type(f"{_camel(cell.title)}Layer", (DefinedLayer,), names)


@cache
def _cell_class(cell: DefinedCell) -> type[DefinedStep]:
    names = {"definition": cell, "__doc__": _documented(cell, "A single step")}
    return type(f"{_camel(cell.title)}Cell", (DefinedStep,), names)


def _documented(cell: DefinedCell, what: str) -> str:
    return f"{what} of the cell {cell.title}.\n\n{cell.function.__doc__ or ''}".rstrip()


def _camel(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _empty_layer(cell: DefinedCell) -> DefinedLayer:
    found = layer(cell)
    return found.__new__(found)


def _empty_step(cell: DefinedCell) -> DefinedStep:
    found = cell_class(cell)
    return found.__new__(found)
