"""Weights of one layer as arrays of NumPy, between our modules and those of other frameworks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rnnkernels._core import checks, option_checks
from rnnkernels.cells.orders import places
from rnnkernels.interop._layers import GRUResetBefore, Reversed
from rnnkernels.nn.base import RNNBase
from rnnkernels.nn.cells import RNNCellBase
from rnnkernels.nn.layers import GRU, LSTM, RNN

Array = NDArray[Any]

_DTYPES = ("float16", "float32", "float64")
#: The cell of :class:`GRUResetBefore`, which is none of the kernels'.
RESET_BEFORE = "gru_reset_before"
#: What other frameworks have too.
_KNOWN = ("rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru", RESET_BEFORE)


class Weights(NamedTuple):
    """Those of one layer and direction, gates in our order: w_ih [G*H, I], w_hh [G*H, H], biases
    [G*H]; without b_hh where one bias is all there is."""

    w_ih: Array
    w_hh: Array
    b_ih: Array | None = None
    b_hh: Array | None = None


def gates_of(cell: str) -> str:
    """The cell whose gates it has."""
    return "gru" if cell == RESET_BEFORE else cell


def array(name: str, value: Any, shape: Sequence[int | None]) -> Array:
    """A weight as an array of NumPy; None in ``shape`` is any size.

    Raises:
        TypeError: it holds no floating point numbers of 16, 32 or 64 bits.
        ValueError: another shape.
    """
    found = np.asarray(value)
    if found.dtype.name not in _DTYPES:
        raise TypeError(
            f"{name}: expected an array of {', '.join(_DTYPES)}, got {found.dtype.name} from "
            f"{type(value).__name__}. Convert it first, with .astype('float32') say"
        )
    fits = found.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape, found.shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{sizes}], got {list(found.shape)}")
    return found.astype(found.dtype.newbyteorder("="), copy=False)  # files have either


def from_order(a: Array, cell: str, framework: str) -> Array:
    """Rows [G*H, ...] in a framework's order of gates, in ours."""
    there = places(gates_of(cell), framework)
    return _blocks(a, tuple(there.index(gate) for gate in range(len(there))))


def to_order(a: Array, cell: str, framework: str) -> Array:
    """Rows [G*H, ...] in our order of gates, in a framework's."""
    return _blocks(a, places(gates_of(cell), framework))


def _blocks(a: Array, order: tuple[int, ...]) -> Array:
    parts = np.split(a, len(order))
    return np.concatenate([parts[place] for place in order])


#: Of the cells that are no RNN's.
_LAYERS: dict[str, type[nn.Module]] = {RESET_BEFORE: GRUResetBefore, "lstm": LSTM, "gru": GRU}


def module_of(
    cell: str, directions: Sequence[Weights], *, batch_first: bool, merge_mode: str = "concat"
) -> nn.Module:
    """A layer of ours with these weights, one of each direction, in their dtype.

    Raises:
        TypeError: the weights are of several dtypes.
        ValueError: those of the directions are of different sizes.
    """
    dtypes = {a.dtype.name for weights in directions for a in weights if a is not None}
    if len(dtypes) > 1:
        raise TypeError(
            f"weights: expected arrays of one dtype, got {', '.join(sorted(dtypes))}. Convert "
            "them with .astype"
        )
    first = directions[0]
    options: dict[str, Any] = {
        "bias": first.b_ih is not None,
        "bias_mode": "single" if first.b_ih is not None and first.b_hh is None else "double",
        "batch_first": batch_first,
        "bidirectional": len(directions) == 2,
        "merge_mode": merge_mode,
        "dtype": getattr(torch, dtypes.pop()),
    }
    sizes = first.w_ih.shape[1], first.w_hh.shape[1]
    if cell not in _LAYERS:
        options["nonlinearity"] = cell.removeprefix("rnn_")
    layer = _LAYERS.get(cell, RNN)(*sizes, **options)
    parameters = dict(layer.named_parameters())
    with torch.no_grad():
        for direction, weights in enumerate(directions):
            for base, value in zip(checks.WEIGHT_NAMES, weights, strict=False):
                if value is None:
                    continue
                parameter = parameters[checks.parameter_name(base, 0, direction)]
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"weights: expected those of both directions to be of the same sizes, got "
                        f"{list(parameter.shape)} and {list(value.shape)} for {base}"
                    )
                # A copy in rows: arrays may be views, read-only, or of negative strides.
                parameter.copy_(torch.from_numpy(np.array(value, order="C")))
    return layer


def weights_of(module: Any, layer: int | None = None) -> tuple[str, list[Weights]]:
    """The cell of a module of ours, and the weights of one of its layers, by direction.

    Args:
        module: a layer or cell of ours, a :class:`GRUResetBefore`, or a :class:`Reversed`.
        layer: which layer of a stack; None where there is one.

    Raises:
        TypeError: ``module`` is something else.
        ValueError: a stack without ``layer``, a layer that it has not, a projection, zoneout,
            layer_norm, another cell than RNN, LSTM and GRU.
    """
    if isinstance(module, Reversed):
        module = module.layer
    if isinstance(module, RNNBase):
        cell, count, directions = module.cell, module.num_layers, 1 + module.bidirectional
    elif isinstance(module, RNNCellBase):
        cell, count, directions = module.cell, 1, 1
    elif isinstance(module, GRUResetBefore):
        cell, count, directions = RESET_BEFORE, 1, 1 + module.bidirectional
    else:
        hint = ""
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            hint = ". Pass rnnkernels.from_torch(module)"
        raise TypeError(
            "module: expected a layer or cell of rnnkernels, got "
            f"{type(module).__module__}.{type(module).__qualname__}{hint}"
        )
    if cell not in _KNOWN:
        raise ValueError(
            f"module: expected one of the cells {', '.join(_KNOWN)}, got {cell}, which has no "
            "place in other frameworks. rnnkernels.interop.to_numpy has its weights"
        )
    if getattr(module, "proj_size", 0):
        raise ValueError(
            f"module: expected an LSTM without a projection, got proj_size={module.proj_size}, "
            "which the LSTM of this framework has not. rnnkernels.interop.to_numpy has its weights"
        )
    if getattr(module, "zoneout", None):
        raise ValueError(
            f"module: expected a layer without zoneout, got zoneout={module.zoneout}, which the "
            "layers of this framework have not. rnnkernels.interop.to_numpy has its weights"
        )
    if getattr(module, "layer_norm", False):
        raise ValueError(
            "module: expected a layer without layer_norm, which the layers of this framework have "
            "not. rnnkernels.interop.to_numpy has its weights"
        )
    if layer is None and count > 1:
        raise ValueError(
            f"layer: expected one of 0 to {count - 1}, since module is a stack of {count} and "
            "this framework has a layer for each, got None"
        )
    number = 0 if layer is None else option_checks.size("layer", layer, minimum=0)
    if number >= count:
        raise ValueError(f"layer: expected one of 0 to {count - 1}, got {number}")
    place = -1 if isinstance(module, RNNCellBase) else number
    found = []
    for direction in range(directions):
        names = [checks.parameter_name(b, place, direction) for b in checks.WEIGHT_NAMES[:4]]
        w_ih, w_hh, *biases = (getattr(module, name, None) for name in names)
        assert w_ih is not None and w_hh is not None
        b_ih, b_hh = (None if b is None else to_array(b) for b in biases)
        found.append(Weights(to_array(w_ih), to_array(w_hh), b_ih, b_hh))
    return cell, found


def to_array(t: Tensor) -> Array:
    """A copy of a tensor as an array; bfloat16, which NumPy has not, as the same float32."""
    t = t.detach().cpu()
    return np.array((t.float() if t.dtype == torch.bfloat16 else t).numpy())


def summed(weights: Weights) -> Array:
    """Both biases as one [G*H], zeros where there are none: what a gate adds where the parts of
    input and state are summed."""
    if weights.b_ih is None:
        return np.zeros_like(weights.w_hh[:, 0])
    return weights.b_ih if weights.b_hh is None else weights.b_ih + weights.b_hh


def pair(weights: Weights) -> tuple[Array, Array]:
    """Both biases [G*H], zeros for those that are not there."""
    zeros = np.zeros_like(weights.w_hh[:, 0])
    b_ih, b_hh = weights.b_ih, weights.b_hh
    return zeros if b_ih is None else b_ih, zeros if b_hh is None else b_hh
