"""The ``state_dict`` of a module as arrays of NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from rnnkernels.interop._survey import check_module
from rnnkernels.interop._weights import Array, array, to_array


def to_numpy(module: nn.Module) -> dict[str, Array]:
    """The ``state_dict`` of a module as arrays of NumPy, copied; for ``numpy.savez`` say.

    Args:
        module: any module whose state is floating point numbers.

    Returns:
        Arrays by the names of the ``state_dict``, in the shapes and gate order of torch.nn.
        bfloat16, which NumPy has not, becomes the same numbers in float32.

    Raises:
        TypeError: ``module`` is no module, or has a state that is not floating point.

    Example::

        numpy.savez("lstm.npz", **rnnkernels.interop.to_numpy(lstm))
    """
    check_module("module", module)
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"module: expected floating point numbers, got {got} as {name}")
    return {name: to_array(value) for name, value in state.items()}


def from_numpy(module: nn.Module, arrays: Mapping[str, Any]) -> nn.Module:
    """Copies arrays of NumPy into the parameters of a module, in place; undoes :func:`to_numpy`.

    Args:
        module: any module.
        arrays: by the names of its ``state_dict``, all of them, in the same shapes and dtypes; a
            module in bfloat16 takes float32, which is rounded.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no module; an array of another dtype.
        ValueError: names that are missing or unknown; an array of another shape. Nothing has been
            copied then.

    Example::

        rnnkernels.interop.from_numpy(lstm, numpy.load("lstm.npz"))
    """
    check_module("module", module)
    state = module.state_dict()
    if state.keys() != set(arrays):
        missing, more = sorted(state.keys() - set(arrays)), sorted(set(arrays) - state.keys())
        raise ValueError(
            f"arrays: expected {', '.join(state)}; missing: {', '.join(missing) or 'none'}, "
            f"unknown: {', '.join(map(str, more)) or 'none'}"
        )
    tensors = {}
    for name, value in state.items():
        found = array(f"arrays[{name!r}]", arrays[name], tuple(value.shape))
        stored = torch.float32 if value.dtype == torch.bfloat16 else value.dtype
        wanted = str(stored).removeprefix("torch.")
        if found.dtype.name != wanted:
            raise TypeError(
                f"arrays[{name!r}]: expected {wanted} for a parameter of {value.dtype}, got "
                f"{found.dtype.name}. Convert it with .astype, or the module with .to"
            )
        tensors[name] = torch.from_numpy(np.array(found, order="C"))
    module.load_state_dict(tensors)
    return module
