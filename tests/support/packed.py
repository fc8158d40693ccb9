"""Layers whose packed weights are kept, for the tests of these."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from helpers import tensors
from rnnkernels import _ops

T, B, I, H = 3, 2, 19, 35  # ends of rows and of the last tile do not fall together with vectors


def call(layer: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return tensors(layer(x))


def unseen(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What the layer gives, by weights that no call has seen before."""
    return call(copy.deepcopy(layer), x)


def weights(layer: Any) -> list[Tensor]:
    return list(layer._flat_weights)


def kept(layer: Any) -> bool:
    return len([size for size, *_ in _ops.packed_of(weights(layer)) if size]) == layer.num_layers


def used(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What the layer gives by packs that it keeps."""
    for _ in range(2):
        call(layer, x)
    assert kept(layer)
    return call(layer, x)


def drawn(like: Tensor) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype) / 4
