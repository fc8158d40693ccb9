"""The weights that a layer has at a call, and how it knows whether they are others than before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Held(tuple[Any, ...]):
    """What torch.nn's base asks of its weak references to weights, from a reference that is none:
    ``torch.utils.swap_tensors`` refuses tensors that somebody refers to weakly. Called, it is the
    tensor that it holds, or None."""

    __slots__ = ()

    def __call__(self) -> Any:
        return self[0] if self else None


class Holder(nn.RNNBase):
    """torch.nn's base of layers, with references of this kind. The list of weights holds the same
    tensors anyway, so that none lives longer; what is replaced is let go at once."""

    def hold_weights(self) -> None:
        """Makes references to weights, of whatever kind they are, those of this class."""
        held: Any = [None if ref is None else Held((ref(),)) for ref in self._flat_weight_refs]
        self._flat_weight_refs = held

    def _init_flat_weights(self) -> None:
        super()._init_flat_weights()
        self.hold_weights()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.hold_weights()

    def __setattr__(self, name: str, value: Any) -> None:
        refs: Any = self.__dict__.get("_flat_weight_refs")
        if refs and name in self._flat_weights_names:
            refs[self._flat_weights_names.index(name)] = Held()
        super().__setattr__(name, value)


def current(module: nn.RNNBase) -> list[Tensor]:
    """The weights of all layers and directions in torch's order, as torch.nn's forward finds them.

    The attributes, where one of them is another object than at the call before; else
    ``_flat_weights``.

    Raises:
        TypeError: ``_flat_weights`` holds something else than tensors.
        ValueError: it has another length than ``_flat_weights_names``.
    """
    names, refs = module._flat_weights_names, module._flat_weight_refs
    now: list[Any] = []
    computed = False
    for name in names:
        weight: Any = module._parameters.get(name)
        if weight is None and hasattr(type(module), name):
            weight, computed = getattr(module, name), True  # its own AttributeError, if any
        now.append(getattr(module, name, None) if weight is None else weight)
    changed = len(refs) != len(names) or any(
        weight is not None and ref is not None and ref() is not weight
        for weight, ref in zip(now, refs, strict=True)
    )
    flat: Any = module._flat_weights
    if changed and (computed or torch.compiler.is_compiling()):
        flat = now  # not kept: graphs of a parametrization, and what a compiler traces with
    elif changed:
        module._init_flat_weights()
        flat = module._flat_weights
    if not isinstance(flat, (list, tuple)) or len(flat) != len(names):
        got = len(flat) if isinstance(flat, (list, tuple)) else f"a {type(flat).__name__}"
        raise ValueError(
            f"_flat_weights: expected a list of {len(names)} tensors, in the order of "
            f"_flat_weights_names ({', '.join(names)}), got {got}"
        )
    for i, weight in enumerate(flat):
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"_flat_weights[{i}]: expected a Tensor for {names[i]}, got {type(weight).__name__}"
            )
    return list(flat)
