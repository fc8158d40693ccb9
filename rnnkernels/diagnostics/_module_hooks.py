"""Looks on while a model runs: which of its layers a call comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rnnkernels.nn.base import RNNBase
from rnnkernels.nn.cells import RNNCellBase

#: What is told of a layer and the keyword arguments of its forward before it runs.
Enter = Callable[[nn.Module, dict[str, Any]], None]


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers and cells of rnnkernels inside a model, by name; ``''`` is the model itself."""
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, (RNNBase, RNNCellBase))
    }


@contextmanager
def running(model: nn.Module, enter: Enter | None = None) -> Iterator[list[str]]:
    """Yields a list that holds, inside the block, the names of the layers that run now, the
    innermost last."""
    names: list[str] = []
    hooks = []
    try:
        for name, part in layers(model).items():
            before, after = _hooks(names, name, enter)
            hooks.append(part.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(part.register_forward_hook(after, always_call=True))
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(
    names: list[str], name: str, enter: Enter | None
) -> tuple[Callable[..., None], Callable[..., None]]:
    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        names.append(name)
        if enter is not None:
            enter(module, kwargs)

    def after(*_: Any) -> None:
        if names[-1:] == [name]:  # not where an error came before our own hook
            names.pop()

    return before, after


def label(module: str, layer: int) -> str:
    """A layer in words; -1 is a cell."""
    parts = [module] * bool(module) + [f"layer {layer}"] * (layer >= 0)
    return ", ".join(parts) or "cell"
