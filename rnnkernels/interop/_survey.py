"""Which recurrent layers a model has, and what a conversion would make of each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from rnnkernels.interop import _holders as holders
from rnnkernels.interop._layers import GRUResetBefore
from rnnkernels.nn.base import RNNBase
from rnnkernels.nn.cells import RNNCellBase
from rnnkernels.torch_types import KEEPING, OURS, Table

_KINDS = frozenset(cls.__name__ for cls in OURS)


@dataclass(frozen=True)
class Layer:
    """A recurrent layer or cell of a model.

    Attributes:
        name: where it is inside the model, ``''`` for the model itself.
        type: its class in words, such as ``'torch.nn.LSTM'``.
        becomes: the class that :func:`rnnkernels.convert` gives it; None where it is left alone.
        reason: why it is left alone.
        ours: whether our kernels run it already.
        refused: whether :func:`rnnkernels.convert` raises because of it.
    """

    name: str
    type: str
    becomes: str | None = None
    reason: str = ""
    ours: bool = False
    refused: bool = False

    def __str__(self) -> str:
        name = self.name or "the model itself"
        if self.becomes is not None:
            return f"{name}: {self.type} -> {self.becomes}"
        return f"{name}: {self.type} {'refused' if self.refused else 'left alone'}: {self.reason}"


@dataclass(frozen=True)
class Survey:
    """What :func:`convertible` found; prints as a line per layer.

    Attributes:
        layers: a :class:`Layer` for every recurrent layer and cell, in the model's order.
    """

    layers: tuple[Layer, ...]

    @property
    def left_alone(self) -> tuple[Layer, ...]:
        """The layers that :func:`rnnkernels.convert` does not convert and that are not ours."""
        return tuple(part for part in self.layers if part.becomes is None and not part.ours)

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers)) or "no recurrent layer or cell"


def convertible(model: nn.Module, *, keep_type: bool = False) -> Survey:
    """Tells what :func:`rnnkernels.convert` would do with each recurrent layer of a model, and
    why it would leave one alone or refuse. Changes nothing.

    Args:
        model: a layer, a cell, or any model.
        keep_type: as for :func:`rnnkernels.convert`.

    Returns:
        A :class:`Survey`; ``print`` it.

    Raises:
        TypeError: ``model`` is no module.

    Example::

        >>> print(rnnkernels.convertible(model))
        encoder: torch.nn.LSTM -> rnnkernels.LSTM
        decoder: project.PeepholeLSTM left alone: a subclass of torch.nn.LSTM may compute ...
    """
    check_module("model", model)
    table = table_of(keep_type)
    places = list(holders.walk(model))
    problems = refusals(model, table, places)
    layers = [_layer(name, part, table, problems) for name, part in _recurrent(model)]
    return Survey((*layers, *_outside(model, places)))


def table_of(keep_type: bool) -> Table:
    """The class that takes the place of each."""
    ours_too = {OURS[theirs]: ours for theirs, ours in KEEPING.items()}
    return KEEPING | ours_too if keep_type else OURS


def check_module(argument: str, value: object) -> None:
    """Raises a TypeError where a model is expected and something else came."""
    if isinstance(value, type) and issubclass(value, nn.Module):
        ours = f", or use rnnkernels.{value.__name__} in its place" if value in OURS else ""
        raise TypeError(
            f"{argument}: expected a module, got the class {type_name(value)}. Pass an instance of "
            f"it, or a model that holds some{ours}"
        )
    if not isinstance(value, nn.Module):
        raise TypeError(f"{argument}: expected a torch.nn.Module, got {type_name(type(value))}")


def type_name(cls: type) -> str:
    """A class as users import it."""
    module = cls.__module__
    for package, shown in (
        ("torch.nn.modules", "torch.nn"),
        ("rnnkernels.nn", "rnnkernels"),
        ("rnnkernels.interop._layers", "rnnkernels.interop"),
    ):
        if module == package or module.startswith(package + "."):
            module = shown
    return cls.__qualname__ if module == "builtins" else f"{module}.{cls.__qualname__}"


def parametrized(module: nn.Module, table: Table) -> bool:
    """Whether the module is one of the table's classes under a parametrization, which makes a
    class of its own."""
    return parametrize.is_parametrized(module) and type(module).__mro__[1] in table


def refusals(model: nn.Module, table: Table, places: list[holders.Edge]) -> dict[int, str]:
    """Why modules of the table's classes cannot be converted where they are, by their id.

    ``places`` is what :func:`rnnkernels.interop._holders.walk` found in the model.
    """
    found: dict[int, str] = {}
    targets: set[int] = set()
    for module in model.modules():
        if parametrized(module, table):
            found[id(module)] = (
                f"{type(module).__name__} is parametrized. Remove the parametrizations, convert, "
                "and register them again."
            )
        if type(module) in table:
            targets.add(id(module))
            if holders.replaces_forward(module):
                patch = module.__dict__["forward"]
                found[id(module)] = (
                    f"forward is replaced on the instance, by {holders.describe(patch)}, and would "
                    f"go on to run {type_name(type(module))}. Remove what replaced it (a hook, "
                    "weight drop, a compiled forward), convert, and put it back."
                )
    for path, value in places:
        runs = holders.bound_forward(value)
        if runs is not None and id(runs) in targets:
            found.setdefault(
                id(runs),
                f"{path} holds the layer's forward, which would go on to run "
                f"{type_name(type(runs))}. Hold the module instead of its forward; or remove what "
                "holds it (a hook, a wrapper, torch.compile), convert, and put it back.",
            )
        if value is model and type(model) in table:
            found.setdefault(
                id(model),
                f"{path} holds the layer itself, and another takes its place. Remove what holds "
                "it, convert, and put it back; or convert(torch.nn.ModuleList([layer])), which "
                "changes the class of the layer in place.",
            )
    return found


def _recurrent(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The recurrent layers among a model's modules; a TorchScript module counts as one thing."""
    scripted: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}." if outer else "") for outer in scripted):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            scripted.append(name)
            if _scripted_layers(module):
                yield name, module
        elif is_recurrent(module):
            yield name, module


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module is a recurrent layer or cell of torch's, ours, or a quantised one."""
    kinds = (nn.RNNBase, nn.RNNCellBase, GRUResetBefore)
    return isinstance(module, kinds) or _quantised(module)


def _quantised(module: nn.Module) -> bool:
    cls = type(module)
    return cls.__module__.startswith("torch.ao.nn.") and cls.__name__ in _KINDS


def _scripted_layers(module: Any) -> list[str]:
    """The recurrent layers inside a TorchScript module, or the operators of such."""
    kinds = {getattr(part, "original_name", "") for part in module.modules()} & _KINDS
    graphs = [part.inlined_graph for part in module.modules() if hasattr(part, "inlined_graph")]
    ops = {op for graph in graphs for op in re.findall(_RECURRENT_OPS, str(graph))}
    return sorted(kinds) or sorted(ops)


_RECURRENT_OPS = r"aten::(?:lstm|gru|rnn_tanh|rnn_relu)(?:_cell)?\b"


def _layer(name: str, module: nn.Module, table: Table, problems: dict[int, str]) -> Layer:
    cls = type(module)
    kind = type_name(cls)
    if id(module) in problems:
        return Layer(name, kind, reason=problems[id(module)], refused=True)
    if cls in table:
        return Layer(name, kind, type_name(table[cls]))
    if isinstance(module, (RNNBase, RNNCellBase)):
        return Layer(name, kind, reason="it is a layer of rnnkernels", ours=True)
    return Layer(name, kind, reason=_why_not(module))


def _why_not(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        inside = ", ".join(_scripted_layers(module))
        return (
            f"TorchScript, compiled with {inside} inside, which cannot be exchanged. Build the "
            "model in Python, load_state_dict, and convert that"
        )
    if type(module).__module__.startswith("torch.ao.nn."):
        return "quantised weights, for which rnnkernels has no kernels. Convert before quantising"
    if isinstance(module, GRUResetBefore):
        return (
            "its reset gate acts before the recurrent product, for which there is no kernel: a "
            "loop of torch operations runs it"
        )
    base = next((cls for cls in type(module).__mro__ if cls in OURS), None)
    if base is None:
        return "it is none of torch.nn's layers and cells, and may compute anything"
    return (
        f"a subclass of {type_name(base)} may compute anything. If it calls its base's forward, "
        f"derive it from {type_name(OURS[base])}"
    )


def _outside(model: nn.Module, places: list[holders.Edge]) -> Iterator[Layer]:
    """Layers that a model holds without registering them."""
    seen = {id(module) for module in model.modules()}
    for path, value in places:
        if not issubclass(type(value), nn.Module) or id(value) in seen:
            continue
        seen.add(id(value))
        ours = isinstance(value, (RNNBase, RNNCellBase))
        if ours or not is_recurrent(value):
            continue
        yield Layer(
            path,
            type_name(type(value)),
            reason="it is no registered module of the model: not among its parameters, nor moved "
            "or saved with it. Assign it to an attribute, or use torch.nn.ModuleList or "
            "ModuleDict in place of a plain list or dict; or convert it by itself",
        )
