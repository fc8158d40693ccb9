"""From torch.nn's recurrent modules to ours and back, sharing every Parameter."""

from __future__ import annotations

import logging
import warnings

from torch import nn

from rnnkernels.interop import _holders as holders
from rnnkernels.interop import _survey as survey
from rnnkernels.interop._survey import check_module, type_name
from rnnkernels.nn.base import ADDED, RNNBase
from rnnkernels.nn.cells import ADDED_TO_CELLS, RNNCellBase
from rnnkernels.torch_types import KEEPING, OURS, THEIRS, Table

_log = logging.getLogger("rnnkernels")


def from_torch(module: nn.Module, *, keep_type: bool = False) -> nn.Module:
    """A new module of ours in place of a ``torch.nn`` recurrent layer or cell.

    It shares the Parameter objects, hooks and training flag of ``module``, so optimisers that hold
    the parameters go on working. ``module`` stays what it is.

    Args:
        module: exactly one of the six classes of torch.nn.
        keep_type: see :func:`convert`.

    Raises:
        TypeError: ``module`` is not exactly one of the six classes (a subclass may compute
            anything), or is parametrized, which makes a class of its own; its ``forward`` is
            replaced on the instance; something on it, such as a hook, holds ``module`` itself or
            its ``forward``, and would go on to run it.

    Example::

        ours = rnnkernels.from_torch(torch.nn.GRU(8, 16))
    """
    table = KEEPING if keep_type else OURS
    check_module("module", module)
    if type(module) not in table and not survey.parametrized(module, table):
        known = ", ".join(map(type_name, table))
        raise TypeError(f"module: expected one of {known}, got {type_name(type(module))}")
    _refuse(module, table, "module")
    return _rebuilt(module, table[type(module)])


def to_torch(module: nn.Module) -> nn.Module:
    """A new ``torch.nn`` module in place of one of ours, sharing its Parameter objects.

    Raises:
        TypeError: ``module`` is not exactly one of our classes; or as :func:`from_torch`.
        ValueError: it has an option that torch.nn has not, which the message names.

    Example::

        theirs = rnnkernels.to_torch(rnnkernels.GRU(8, 16))
    """
    check_module("module", module)
    if type(module) not in THEIRS and not survey.parametrized(module, THEIRS):
        known = ", ".join(map(type_name, OURS.values()))
        raise TypeError(f"module: expected one of {known}, got {type_name(type(module))}")
    _refuse(module, THEIRS, "module")
    _refuse_options(module, "module")
    return _rebuilt(module, THEIRS[type(module)])


def convert(model: nn.Module, *, keep_type: bool = False, strict: bool = False) -> nn.Module:
    """Makes every torch.nn recurrent layer and cell inside ``model`` one of ours, in place.

    The very module objects change their class. So parameters, names, hooks and state_dict stay the
    same, and whoever holds a module (a list, a closure, an optimiser, a wrapper) holds the
    converted one. Subclasses of torch's classes, TorchScript, quantised layers and modules that
    are not registered in the model are left alone; :func:`convertible` tells which and why, and
    the logger ``"rnnkernels"`` has the same at level INFO.

    Args:
        model: any model; or a layer or cell itself, for which a new module is returned that shares
            its parameters, as :func:`from_torch` does, while ``model`` stays what it is.
        keep_type: whether the layers stay instances of torch.nn's classes too, for code that asks
            ``isinstance(layer, torch.nn.LSTM)``. ``torch.compile`` then refuses layers by their
            type, as it refuses torch.nn's; see :mod:`rnnkernels.torch_types`.
        strict: whether a recurrent layer that would be left alone is an error.

    Returns:
        ``model``, or our module where ``model`` itself is a recurrent layer or cell.

    Raises:
        TypeError: ``model`` is no module; a layer is parametrized; its ``forward`` is replaced on
            the instance, or held elsewhere in the model, and would go on to run torch.nn's; with
            ``strict``, a layer would be left alone. Nothing has been changed then.

    Warns:
        UserWarning: the model holds no layer of rnnkernels afterwards.

    Example::

        model = rnnkernels.convert(model)  # revert(model) undoes it
    """
    found = survey.convertible(model, keep_type=keep_type)
    for layer in found.layers:
        if layer.refused:
            where = f"model: {layer.name}" if layer.name else "model"
            raise TypeError(f"{where}: {layer.reason}")
    if strict and found.left_alone:
        lines = "\n".join(f"  {layer}" for layer in found.left_alone)
        raise TypeError(f"model: strict=True, and not every layer can be converted:\n{lines}")
    for layer in found.layers:
        _log.info("convert: %s", layer)
    if not any(layer.becomes or layer.ours for layer in found.layers):
        lines = "".join(f"\n  {layer}" for layer in found.layers)
        warnings.warn(
            f"convert: nothing in {type_name(type(model))} was converted: "
            + (f"every recurrent layer was left alone{lines}" if lines else str(found)),
            stacklevel=2,
        )
    return _change(model, survey.table_of(keep_type))


def revert(model: nn.Module) -> nn.Module:
    """Undoes :func:`convert`, in place as well: ours become torch.nn's modules.

    Returns:
        ``model``, or a new torch.nn module where ``model`` itself is a layer or cell of ours.

    Raises:
        TypeError: as :func:`convert`.
        ValueError: a module has an option that torch.nn has not. Nothing has been changed then.

    Example::

        torch.onnx.export(rnnkernels.revert(model), (x,), "model.onnx")
    """
    check_module("model", model)
    _refuse(model, THEIRS, "model")
    for name, module in model.named_modules():
        if type(module) in THEIRS:
            _refuse_options(module, f"model: {name}" if name else "model")
            kinds = type_name(type(module)), type_name(THEIRS[type(module)])
            _log.info("revert: %s: %s -> %s", name or "the model itself", *kinds)
    return _change(model, THEIRS)


def _refuse(model: nn.Module, table: Table, argument: str) -> None:
    problems = survey.refusals(model, table, list(holders.walk(model)))
    for name, module in model.named_modules():
        if id(module) in problems:
            where = f"{argument}: {name}" if name else argument
            raise TypeError(f"{where}: {problems[id(module)]}")


def _refuse_options(module: nn.Module, where: str) -> None:
    for name, plain in (*ADDED.items(), ("nonlinearity", None)):
        value = getattr(module, name, plain)
        same_numbers = value == plain or name in ("backend", "recompute")
        if same_numbers or value in ("tanh", "relu"):
            continue
        raise ValueError(f"{where}: torch.nn has no {name}={value!r}; it cannot be converted")


def _change(model: nn.Module, table: Table) -> nn.Module:
    if type(model) in table:
        return _rebuilt(model, table[type(model)])
    for module in list(model.modules()):
        if type(module) in table:
            _become(module, table[type(module)])
    return model


def _rebuilt(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A new module of another class with the same parameters, buffers, hooks and attributes."""
    new = type(module).__new__(type(module))
    for key, value in module.__dict__.items():
        # The handles of hooks hold on to the very dictionaries that the hooks stand in.
        shared = "hooks" in key or not isinstance(value, (dict, list))
        new.__dict__[key] = value if shared else value.copy()
    _become(new, cls)
    return new


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Makes a module one of another class, with what that class has beside the old one."""
    was_ours = isinstance(module, (RNNBase, RNNCellBase))
    module.__dict__.pop("forward", None)  # the old class's own, see holders.replaces_forward
    module.__class__ = cls
    if not isinstance(module, (RNNBase, RNNCellBase)):
        for name in (*ADDED, "cell"):
            module.__dict__.pop(name, None)
        if isinstance(module, nn.RNNBase):
            module._update_flat_weights()
            module.flatten_parameters()
    elif not was_ours:
        for name, value in ADDED.items():
            if name in ADDED_TO_CELLS or isinstance(module, RNNBase):
                setattr(module, name, value)
        if isinstance(module, RNNBase):
            module.hold_weights()
        if isinstance(module, RNNCellBase):
            gated = {"LSTMCell": "lstm", "GRUCell": "gru"}
            module.cell = gated.get(cls.__name__, f"rnn_{getattr(module, 'nonlinearity', '')}")
