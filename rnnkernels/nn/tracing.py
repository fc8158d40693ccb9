"""What layers answer to those who take modules over: FX, TorchScript, torch.ao.quantization."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Proxy


def fx_proxy(*values: Any) -> Proxy | None:
    """The first value of torch.fx.symbolic_trace among the arguments of a layer, if any."""
    for value in values:
        if isinstance(value, Proxy):
            return value
        if isinstance(value, (tuple, list)):
            found = next((part for part in value if isinstance(part, Proxy)), None)
            if found is not None:
                return found
    return None


def fx_leaf(module: nn.Module, proxy: Proxy, *args: Any, **kwargs: Any) -> Proxy:
    """The call of a layer as one node of the graph that torch.fx traces, as torch.nn's are.

    Arguments that have their default are left out.
    """
    tracer: Any = proxy.tracer
    takes = inspect.signature(module.forward).parameters
    given = {name: value for name, value in kwargs.items() if value is not takes[name].default}
    node: Proxy = tracer.create_proxy("call_module", tracer.path_of_module(module), args, given)
    return node


#: Makes a torch.nn module of one of ours. The package brings it, from rnnkernels.interop, which
#: stands above the layers.
to_torch: Callable[[nn.Module], nn.Module] | None = None


def scriptable(module: nn.Module) -> nn.Module:
    """The torch.nn module that torch.jit.script compiles in place of one of ours.

    Raises:
        TypeError: it is a subclass of ours, or parametrized.
        ValueError: it has an option that torch.nn has not.
    """
    assert to_torch is not None
    try:
        theirs = to_torch(module)
    except (TypeError, ValueError) as error:
        raise type(error)(
            "torch.jit.script compiles torch.nn's layers in place of rnnkernels', as "
            f"rnnkernels.revert(model) puts them, and cannot here: {error}"
        ) from error
    warnings.warn(
        "torch.jit.script: TorchScript cannot hold the kernels of rnnkernels. The scripted model "
        "runs torch.nn's layers with the same parameters, and torch.jit.script has put them into "
        "the model itself as well; rnnkernels.convert(model) takes that back",
        stacklevel=1,  # one place for all layers: Python's filters then show it once
    )
    return theirs


class QConfig:
    """The attribute ``qconfig``, by which torch.ao.quantization chooses modules to quantise.

    It goes on to replace torch.nn's classes and leaves others as they are, in silence. So a layer
    that is given one warns. A layer that was not chosen is given None, and knows nothing: not
    whether torch.nn's class of the same name was.
    """

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self
        try:
            return module.__dict__["qconfig"]
        except KeyError:
            raise AttributeError(f"{owner.__name__!r} object has no attribute 'qconfig'") from None

    def __set__(self, module: nn.Module, value: Any) -> None:
        module.__dict__["qconfig"] = value
        if value is not None:
            warnings.warn(
                "torch.ao.quantization: layers of rnnkernels were chosen, and have no quantised "
                "kernels: they stay as they are. rnnkernels.revert(model) puts torch.nn's layers "
                "in their place, with the same parameters, which can be quantised; choose "
                "torch.nn.LSTM, torch.nn.GRU or their cells then. Or keep layers of rnnkernels: "
                "rnnkernels.serving.prepack(model, weight_dtype=torch.int8) has them read weights "
                "of 8 bits on a CPU",
                stacklevel=1,  # one place for all layers, as above
            )

    def __delete__(self, module: nn.Module) -> None:
        if module.__dict__.pop("qconfig", self) is self:
            raise AttributeError("qconfig")
