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

``prepack(model, weight_dtype=torch.int8)``, or bfloat16 or float16, keeps the packed weights of
layers of float32 in that type, which products of few rows read in less time. ``W_ih``, ``W_hh`` and
``W_hr`` are rounded to it, to nearest, ties to even; int8 is multiples of a scale of each row, the
127th part of its greatest magnitude (a row with a value that is not finite gives NaN), and float16
ends at 65504. Biases, inputs, states and all sums stay in float32, so that results are those of the
float32 layer with the rounded weights (``rnnkernels.testing.rounded``), in any batch.

``prepack(model, compare="versions")`` spares calls that reading: what they compare is torch's count
of the writes to each weight, which optimizers, ``load_state_dict`` and all other operations on a
weight or a view of it add to. Writes that torch does not count (through ``.data``, NumPy, DLPack,
or memory shared with another process) then go unnoticed until :func:`prepack` is called again, or
:func:`drop`.

What was chosen belongs to the weights, for this process, until :func:`drop` or a ``prepack``
that chooses otherwise. A weight that is written to is seen, and rounded anew; another tensor in
its place (by ``load_state_dict(assign=True)``, ``to()``), as copies and pickles have, is as it is
until ``prepack`` is called again. The weights as they are also run in calls that save for backward,
under autocast, and in a single step, which would read them for the digest anyway (unless
``batch_invariant`` is on). ``rnnkernels.explain`` tells the type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from rnnkernels import _ops
from rnnkernels._core import option_checks
from rnnkernels.nn import flat_weights
from rnnkernels.nn.base import RNNBase

__all__ = ["drop", "packed_bytes", "packed_limit", "prepack", "set_packed_limit"]


WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.int8)
COMPARED = ("values", "versions")


def prepack(
    model: nn.Module,
    *,
    weight_dtype: torch.dtype | None = None,
    compare: Literal["values", "versions"] = "values",
) -> int:
    """Packs the weights of all RNN, LSTM and GRU layers of a model now, for the calls to come.

    Without this, the first two calls of each layer pack them. Where weights have not changed since
    they were packed, nothing happens.

    Args:
        model: a layer, or any model that holds some. Layers of torch.nn, layers elsewhere than on
            the CPU, and layers whose ``backend`` is another one, are left alone.
        weight_dtype: ``torch.bfloat16``, ``torch.float16`` or ``torch.int8``, to round the packed
            weights to, of layers of float32; ``None`` leaves them as they are, and undoes an
            earlier choice. See above for what this does to results.
        compare: by what each call sees whether weights have changed since they were packed.
            ``"values"`` notices every change, and reads all weights for it; ``"versions"`` asks
            torch how often they have been written to (``Tensor._version``), and reads nothing.

    Returns:
        The bytes that the packed weights of these layers take.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it holds no layer that the CPU kernels run; ``weight_dtype`` or ``compare`` is
            another one; ``weight_dtype`` is given, and the model holds layers that are not of
            float32; or ``compare`` is ``"versions"``, and it holds weights that were made in
            inference mode, whose writes torch does not count.
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
    _check(weight_dtype, layers)
    _check_compare(compare, layers)
    by_version = compare == "versions"
    for _, layer, weights in layers:
        for _ in range(2):  # the first call sees weights that are new, the second keeps its packs
            _ops.choose_packed(weights, weight_dtype, by_version)
            _run(layer, weights[0])
    for name, layer, weights in layers:
        kept = [size for size, *_ in _ops.packed_of(weights) if size]
        if len(kept) < layer.num_layers:
            for _, _, chosen in layers:
                _ops.choose_packed(chosen, None, False)
            where = f"the layers of {name!r}" if name else "the layers"
            raise RuntimeError(
                f"model: the packed weights of {where} were not kept. Either they do not fit into "
                f"the limit of {packed_limit()} bytes, of which {packed_bytes()} are in use: raise "
                "it by set_packed_limit. Or their weights are computed at each call, or not "
                "contiguous: make them contiguous parameters."
            )
    return sum(size for size, *_ in _ops.packed_of([w for _, _, each in layers for w in each]))


def packed_bytes(model: nn.Module | None = None) -> int:
    """The bytes that all packed weights take which this process keeps now, or those of a model."""
    if model is None:
        return _ops.packed_bytes()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    weights = [w for _, layer in _layers(model) for w in flat_weights.current(layer)]
    return sum(size for size, *_ in _ops.packed_of(weights))


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
    _ops.set_packed_limit(option_checks.size("limit", limit, minimum=0))


def drop() -> None:
    """Frees all packed weights, and undoes every ``weight_dtype`` and ``compare``. The next calls
    pack anew."""
    _ops.drop_packed()


def _check(weight_dtype: object, layers: list[tuple[str, RNNBase, list[Tensor]]]) -> None:
    if weight_dtype is None:
        return
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"weight_dtype: expected one of {', '.join(map(str, WEIGHT_DTYPES))} or None, got "
            f"{weight_dtype!r}"
        )
    for name, layer, weights in layers:
        if (got := weights[0].dtype) != torch.float32:
            raise ValueError(
                f"weight_dtype: expected {_named(name)} to be of torch.float32, got {got}. "
                "Convert it by .to(torch.float32), or leave weight_dtype out."
            )
        if layer.layer_norm:
            raise ValueError(
                f"weight_dtype: expected {_named(name)} to have no layer_norm: its input product "
                "is torch's, which reads weights as they are. Leave weight_dtype out."
            )


def _check_compare(compare: object, layers: list[tuple[str, RNNBase, list[Tensor]]]) -> None:
    option_checks.choice("compare", compare, COMPARED)
    for name, _, weights in layers:
        if compare == "versions" and any(w.is_inference() for w in weights):
            raise ValueError(
                f"compare: expected weights of {_named(name)} that count what is written to them, "
                "for 'versions', got some that were made in inference mode. Make them under "
                "torch.no_grad(), or leave compare out."
            )


def _named(name: str) -> str:
    return f"the layer {name!r}" if name else "the layer"


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
