"""From torch.nn's recurrent modules to ours and back, sharing every Parameter."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from rnnkernels import cell_modules, modules
from rnnkernels.cell_modules import ADDED_TO_CELLS, RNNCellBase
from rnnkernels.modules import ADDED, RNNBase

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: modules.RNN,
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNNCell: cell_modules.RNNCell,
    nn.LSTMCell: cell_modules.LSTMCell,
    nn.GRUCell: cell_modules.GRUCell,
}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


def from_torch(module: nn.Module) -> nn.Module:
    """Our module in place of a ``torch.nn`` recurrent layer or cell.

    It shares the Parameter objects, hooks and training flag of ``module``, so optimisers that hold
    the parameters go on working.

    Raises:
        TypeError: ``module`` is not exactly one of the six classes (a subclass may compute
            anything), or is parametrized, which makes a class of its own.
    """
    if parametrize.is_parametrized(module):
        raise TypeError(
            f"module: {type(module).__name__} is parametrized. Remove the parametrizations, "
            "convert, and register them again."
        )
    if type(module) not in OURS:
        known = ", ".join(f"torch.nn.{cls.__name__}" for cls in OURS)
        raise TypeError(f"module: expected one of {known}, got {_name(module)}")
    new = _rebuilt(module, OURS[type(module)])
    for name, value in ADDED.items():
        if name in ADDED_TO_CELLS or isinstance(new, RNNBase):
            setattr(new, name, value)
    if isinstance(new, RNNCellBase):
        gated = {"LSTMCell": "lstm", "GRUCell": "gru"}
        new.cell = gated.get(type(module).__name__, f"rnn_{getattr(module, 'nonlinearity', '')}")
    return new


def to_torch(module: nn.Module) -> nn.Module:
    """The ``torch.nn`` module that one of ours stands for, sharing its Parameter objects.

    Raises:
        TypeError: ``module`` is not exactly one of our six classes.
        ValueError: it has an option that torch.nn has not, which the message names.
    """
    if type(module) not in THEIRS:
        known = ", ".join(f"rnnkernels.{cls.__name__}" for cls in THEIRS)
        raise TypeError(f"module: expected one of {known}, got {_name(module)}")
    for name, plain in (*ADDED.items(), ("nonlinearity", None)):
        value = getattr(module, name, plain)
        if name == "backend" or value == plain or value in ("tanh", "relu"):
            continue
        raise ValueError(f"module: torch.nn has no {name}={value!r}; it cannot be converted")
    new = _rebuilt(module, THEIRS[type(module)])
    for name in (*ADDED, "cell"):
        new.__dict__.pop(name, None)
    if isinstance(new, nn.RNNBase):
        new._init_flat_weights()
    return new


def convert(model: nn.Module) -> nn.Module:
    """Replaces every torch.nn recurrent layer and cell inside ``model`` in place by ours.

    Parameter objects, names, hooks and state_dict stay the same. Subclasses of torch's classes
    are left alone, since they may compute something else.

    Returns:
        ``model``, or our module where ``model`` itself is a recurrent layer or cell.

    Raises:
        TypeError: a layer is parametrized; see :func:`from_torch`.

    Example::

        model = rnnkernels.convert(model)  # revert(model) undoes it
    """
    return _replace(model, OURS, from_torch)


def revert(model: nn.Module) -> nn.Module:
    """Undoes :func:`convert`: puts torch.nn's modules back in place of ours.

    Raises:
        ValueError: a module has an option that torch.nn has not; nothing has been replaced then.
    """
    return _replace(model, THEIRS, to_torch)


def _replace(
    model: nn.Module, known: dict[type[nn.Module], type[nn.Module]], build: Any
) -> nn.Module:
    # All new modules exist before the first is put in place: an error leaves the model as it was.
    old = [m for m in model.modules() if type(m) in known or _hides(m, known)]
    new = {id(m): build(m) for m in old}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[name] = new[id(child)]
    replaced: nn.Module = new.get(id(model), model)
    return replaced


def _hides(module: nn.Module, known: dict[type[nn.Module], type[nn.Module]]) -> bool:
    """Whether the module is one of the known classes under a parametrization."""
    return parametrize.is_parametrized(module) and type(module).__mro__[1] in known


def _rebuilt(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A module of another class with the same parameters, buffers, hooks and attributes."""
    new = cls.__new__(cls)
    for key, value in module.__dict__.items():
        # The handles of hooks hold on to the very dictionaries that the hooks stand in.
        shared = "hooks" in key or not isinstance(value, (dict, list))
        new.__dict__[key] = value if shared else value.copy()
    return new


def _name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
