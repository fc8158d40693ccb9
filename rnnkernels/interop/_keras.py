"""Weights of Keras's recurrent layers, as ``layer.get_weights()`` gives them, and ours.

Layouts and formulas: https://keras.io/api/layers/recurrent_layers/. A layer has ``kernel``
[I, G*H], ``recurrent_kernel`` [H, G*H] and, with ``use_bias``, ``bias`` [G*H], in this order; a GRU
with ``reset_after`` has a bias [2, 3H], of input and state. ``Bidirectional`` has the arrays of its
forward layer, then those of its backward layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from rnnkernels._core import option_checks
from rnnkernels.cells import find
from rnnkernels.interop._weights import (
    RESET_BEFORE,
    Array,
    Weights,
    array,
    from_order,
    gates_of,
    module_of,
    pair,
    summed,
    to_order,
    weights_of,
)

#: Keras's classes, and the functions that the kernels of each have.
_KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "SimpleRNN": {"activation": option_checks.NONLINEARITIES},
    "LSTM": {"activation": ("tanh",), "recurrent_activation": ("sigmoid",)},
    "GRU": {"activation": ("tanh",), "recurrent_activation": ("sigmoid",)},
}
#: Ours for each way in which Keras merges two directions.
_MERGES = {"concat": "concat", "sum": "sum", "ave": "mean", "mul": "mul"}


@dataclass(frozen=True)
class _Options:
    """What of a Keras layer says what its weights mean."""

    kind: str
    activation: Any = "tanh"
    recurrent_activation: Any = "sigmoid"
    reset_after: bool = True
    bidirectional: bool = False
    merge_mode: Any = "concat"


def from_keras(
    layer: Any,
    weights: Sequence[Any] | None = None,
    *,
    activation: str | None = None,
    recurrent_activation: str | None = None,
    reset_after: bool | None = None,
    bidirectional: bool | None = None,
    merge_mode: str | None = None,
    batch_first: bool = True,
) -> nn.Module:
    """A layer of ours with the weights of a Keras layer.

    Args:
        layer: a built Keras ``SimpleRNN``, ``LSTM``, ``GRU`` or a ``Bidirectional`` of one, whose
            ``get_config()`` and ``get_weights()`` are asked; or its class by name, with
            ``weights``.
        weights: where ``layer`` is a name: what ``get_weights()`` returned. Per direction
            ``kernel [I, G*H]``, ``recurrent_kernel [H, G*H]`` and ``bias [G*H]``, or none; gates
            in Keras's order, i f c o or z r h. A GRU's bias is ``[2, 3H]`` with ``reset_after``.
        activation, recurrent_activation, reset_after, merge_mode: where ``layer`` is a name:
            Keras's arguments; None for Keras's defaults, ``'tanh'``, ``'sigmoid'``, True,
            ``'concat'``.
        bidirectional: where ``layer`` is a name: whether ``weights`` are those of a
            ``Bidirectional`` of it.
        batch_first: whether the module takes ``[B, T, I]``, as Keras does.

    Returns:
        :class:`rnnkernels.RNN`, :class:`~rnnkernels.LSTM` or :class:`~rnnkernels.GRU`, with one
        bias vector (``bias_mode="single"``) where Keras has one; for ``reset_after=False`` a
        :class:`GRUResetBefore`, which no kernel runs. Its output is what Keras returns with
        ``return_sequences=True``, its h_n, of each direction, what Keras returns without. A mask
        that ends rows early is ``lengths=``.

    Raises:
        TypeError: ``layer`` is something else; ``weights`` or options beside a Keras layer, or no
            weights beside a name; arrays that are not floating point, or of several dtypes.
        ValueError: an activation that the kernels have not, which the message names; a layer that
            is not built, runs backwards, or merges no directions; arrays of a wrong number or
            shape.

    Warns:
        UserWarning: the Keras layer has ``dropout`` or ``recurrent_dropout``, which are left out.

    Example::

        ours = rnnkernels.interop.from_keras(model.get_layer("encoder"))
        ours = rnnkernels.interop.from_keras("GRU", arrays, reset_after=True)
    """
    given: dict[str, Any] = {
        "activation": activation,
        "recurrent_activation": recurrent_activation,
        "reset_after": reset_after,
        "bidirectional": bidirectional,
        "merge_mode": merge_mode,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(layer, str):
        if layer not in _KINDS:
            raise ValueError(f"layer: expected one of {_known()}, got {layer!r}")
        if weights is None:
            raise TypeError(
                "weights: expected the list that get_weights() of the Keras layer returned, got "
                "None. Or pass the Keras layer itself as layer"
            )
        options = _Options(layer, **given)
    else:
        if not (hasattr(layer, "get_config") and hasattr(layer, "get_weights")):
            raise TypeError(
                f"layer: expected a Keras layer, or one of {_known()} with weights, got "
                f"{type(layer).__name__}"
            )
        if weights is not None or given:
            named = "weights" if weights is not None else next(iter(given))
            raise TypeError(
                f"{named}: expected nothing beside a Keras layer, which brings its own. To say "
                "otherwise, pass its class by name and layer.get_weights()"
            )
        options = _options(type(layer).__name__, layer.get_config())
        weights = layer.get_weights()
    _check(options)
    cell = _cell(options)
    arrays = list(weights)
    parts = _parts(arrays, options)
    directions = [_direction(cell, part, options) for part in parts]
    merged = _MERGES[options.merge_mode] if options.bidirectional else "concat"
    return module_of(cell, directions, batch_first=batch_first, merge_mode=merged)


def to_keras(module: nn.Module, layer: int | None = None) -> list[Array]:
    """The weights of one of our layers as a Keras layer takes them by ``set_weights``.

    Args:
        module: an RNN, LSTM or GRU, layer or cell, or a :class:`GRUResetBefore`.
        layer: which layer of a stack, from 0; None where there is one.

    Returns:
        Per direction ``kernel [I, G*H]``, ``recurrent_kernel [H, G*H]`` and, where the layer has
        biases, ``bias``: ``[2, 3H]`` for a GRU, to be set in one with ``reset_after=True``, else
        ``[G*H]``, the sum of both. For two directions, set them in a ``Bidirectional`` with the
        ``merge_mode`` of the module, whose ``'mean'`` Keras calls ``'ave'``; a GRUResetBefore in a
        GRU with ``reset_after=False``.

    Raises:
        TypeError: ``module`` is something else.
        ValueError: a stack without ``layer``; ``proj_size``; another cell than these.

    Example::

        keras_layer.set_weights(rnnkernels.interop.to_keras(rnnkernels.GRU(8, 16)))
    """
    cell, directions = weights_of(module, layer)
    arrays = []
    for w in directions:
        arrays += [np.ascontiguousarray(to_order(a, cell, "keras").T) for a in (w.w_ih, w.w_hh)]
        if w.b_ih is None:
            continue
        if cell != RESET_BEFORE and find(cell).A:  # a hidden part by itself has a bias of its own
            arrays.append(np.stack([to_order(b, cell, "keras") for b in pair(w)]))
        else:
            arrays.append(to_order(summed(w), cell, "keras"))
    return arrays


def _known() -> str:
    return ", ".join(map(repr, _KINDS))


def _options(kind: str, config: Mapping[str, Any]) -> _Options:
    """Of a Keras layer by its class and configuration."""
    if kind == "Bidirectional":
        inner = config["layer"]
        options = _options(inner["class_name"], inner["config"])
        other = config.get("backward_layer")
        if other is not None:
            backwards = {**other["config"], "go_backwards": False}
            if _options(other["class_name"], backwards) != options:
                raise ValueError(
                    "layer: expected a Bidirectional of two layers of the same kind and "
                    f"activations, got {inner['class_name']} and {other['class_name']} with others"
                )
        merge = config.get("merge_mode", "concat")
        return _Options(
            options.kind,
            options.activation,
            options.recurrent_activation,
            options.reset_after,
            bidirectional=True,
            merge_mode=merge,
        )
    if kind not in _KINDS:
        raise TypeError(f"layer: expected one of {_known()} or a Bidirectional of one, got {kind}")
    if config.get("go_backwards"):
        raise ValueError(
            "layer: expected go_backwards=False, got True. Pass the class by name and "
            "layer.get_weights(), and run the module on input.flip(1)"
        )
    for name in ("dropout", "recurrent_dropout"):
        if config.get(name):
            warnings.warn(
                f"from_keras: {name}={config[name]} of the Keras layer is left out, which drops "
                "parts of input or state in training. Outputs of inference are the same",
                stacklevel=3,
            )
    defaults = _Options(kind)
    return _Options(
        kind,
        config.get("activation", defaults.activation),
        config.get("recurrent_activation", defaults.recurrent_activation),
        bool(config.get("reset_after", False)),  # which older versions had not
    )


def _check(options: _Options) -> None:
    for name, known in _KINDS[options.kind].items():
        value = getattr(options, name)
        if value not in known:
            got = repr(value) if isinstance(value, str) else "a function of its own"
            raise ValueError(
                f"{name}: expected {' or '.join(map(repr, known))} for {options.kind}, got "
                f"{got}, which the kernels have not. A cell of your own may have it: "
                "rnnkernels.cell"
            )
    for name in ("reset_after", "bidirectional"):
        option_checks.flag(name, getattr(options, name))
    if options.merge_mode not in _MERGES:
        raise ValueError(
            f"merge_mode: expected one of {', '.join(map(repr, _MERGES))}, got "
            f"{options.merge_mode!r}. For two outputs apart, pass 'concat' and split the output"
        )


def _cell(options: _Options) -> str:
    if options.kind == "SimpleRNN":
        return f"rnn_{options.activation}"
    if options.kind == "GRU" and not options.reset_after:
        return RESET_BEFORE
    return options.kind.lower()


def _parts(arrays: list[Any], options: _Options) -> list[list[Any]]:
    """The arrays of each direction."""
    count = 2 if options.bidirectional else 1
    each, rest = divmod(len(arrays), count)
    if rest or each not in (2, 3):
        hint = "" if arrays else ". The layer is not built: call it on an input first"
        raise ValueError(
            f"weights: expected {2 * count} or {3 * count} arrays, kernel, recurrent_kernel and "
            f"bias{' of each direction' if count > 1 else ''}, got {len(arrays)}{hint}"
        )
    return [arrays[d * each : (d + 1) * each] for d in range(count)]


def _direction(cell: str, arrays: list[Any], options: _Options) -> Weights:
    G = find(gates_of(cell)).G
    recurrent = array("recurrent_kernel", arrays[1], (None, None))
    H = recurrent.shape[0]
    array("recurrent_kernel", recurrent, (H, G * H))
    kernel = array("kernel", arrays[0], (None, G * H))
    w_ih, w_hh = (from_order(a.T, cell, "keras") for a in (kernel, recurrent))
    if len(arrays) == 2:
        return Weights(w_ih, w_hh)
    bias = np.asarray(arrays[2])
    if options.kind == "GRU" and bias.ndim != 1 + options.reset_after:
        has = "[2, 3H] with reset_after=True, [3H] without"
        raise ValueError(
            f"bias: expected shape {has}, got {list(bias.shape)} and "
            f"reset_after={options.reset_after}. Pass reset_after={not options.reset_after}"
        )
    if cell != "gru":
        return Weights(w_ih, w_hh, from_order(array("bias", bias, (G * H,)), cell, "keras"))
    b_ih, b_hh = array("bias", bias, (2, G * H))
    return Weights(w_ih, w_hh, *(from_order(b, cell, "keras") for b in (b_ih, b_hh)))
