"""Serving on a CPU: the packed weights that calls without gradients keep.

The CPU kernels bring the weights of a layer into the order in which their products read them. A
call that saves nothing for backward (``torch.inference_mode()``, ``torch.no_grad()``, or frozen
weights and inputs) keeps them so for the calls after it, from the second call with the same weights
on. There is nothing to switch on, and nothing to do when weights change, whichever way: every call
reads them and compares digests of all values, and packs anew what is no longer the same. Results
have the same bits as without.

Kept weights take as much memory as the weights themselves, in float32 for 16-bit layers. They are
given up when the weights are gone, or when others need the room and were used more recently; no
copy, pickle or ``state_dict`` of a module has them. Several threads, and modules that share
weights, use the same ones. A single step of one direction (T = 1, as of cells) packs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rnnkernels import _ops
from rnnkernels._core import checks
from rnnkernels.nn import flat_weights
from rnnkernels.nn.layers import RNNBase

__all__ = ["drop", "packed_bytes", "packed_limit", "prepack", "set_packed_limit"]


def prepack(model: nn.Module) -> int:
    """Packs the weights of all RNN, LSTM and GRU layers of a model now, for the calls to come.

    Without this, the first two calls of each layer pack them. Where weights have not changed since
    they were packed, nothing happens.

    Args:
        model: a layer, or any model that holds some. Layers of torch.nn, layers elsewhere than on
            the CPU, and layers whose ``backend`` is another one, are left alone.

    Returns:
        The bytes that the packed weights of these layers take.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it holds no layer that the CPU kernels run.
        RuntimeError: they do not fit into :func:`packed_limit`, or a layer has weights that are
            computed at each call, or not contiguous, which are packed at every call.

    Example::

        model = rnnkernels.convert(model).eval()
        rnnkernels.serving.prepack(model)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    layers = [(name, layer, flat_weights.current(layer)) for name, layer in _layers(model)]
    if not layers:
        raise ValueError(
            "model: expected one with RNN, LSTM or GRU layers of rnnkernels on the CPU, whose "
            f"backend is the automatic one or 'cpu', got {type(model).__name__} without any. "
            "rnnkernels.convert(model) makes such layers of torch.nn's."
        )
    for _, layer, weights in layers:
        for _ in range(2):  # the first call sees the weights, the second keeps what it packs
            _run(layer, weights[0])
    for name, layer, weights in layers:
        if len(_ops.packed_bytes_of(weights)) < layer.num_layers:
            where = f"the layers of {name!r}" if name else "the layers"
            raise RuntimeError(
                f"model: the packed weights of {where} were not kept. Either they do not fit into "
                f"the limit of {packed_limit()} bytes, of which {packed_bytes()} are in use: raise "
                "it by set_packed_limit. Or their weights are computed at each call, or not "
                "contiguous: make them contiguous parameters."
            )
    return sum(_ops.packed_bytes_of([w for _, _, weights in layers for w in weights]))


def packed_bytes() -> int:
    """The bytes that all packed weights take which this process keeps now."""
    return _ops.packed_bytes()


def packed_limit() -> int:
    """The bytes that packed weights may take in this process: 256 MiB, if not set otherwise."""
    return _ops.packed_limit()


def set_packed_limit(limit: int) -> None:
    """Sets :func:`packed_limit`. Layers whose packed weights need more than that pack them at every
    call, and 0 keeps none. Where all layers of a model together need more, they take the room from
    each other at every call, and gain nothing.

    Raises:
        TypeError: ``limit`` is no int.
        ValueError: it is below 0.
    """
    _ops.set_packed_limit(checks.size("limit", limit, minimum=0))


def drop() -> None:
    """Frees all packed weights. The next calls pack anew."""
    _ops.drop_packed()


def _layers(model: nn.Module) -> Iterator[tuple[str, RNNBase]]:
    """Those that the CPU kernels run, and their names."""
    if _ops.missing is not None:
        return
    for name, layer in model.named_modules():
        ours = isinstance(layer, RNNBase) and layer.backend in (None, "auto", "cpu")
        if ours and flat_weights.current(layer)[0].device.type == "cpu":
            yield name, layer


def _run(layer: RNNBase, like: Tensor) -> None:
    """Two steps of zeros, without the hooks of the module."""
    x = like.new_zeros((2, 1, layer.input_size))
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        layer.forward(x.transpose(0, 1) if layer.batch_first else x)
