"""What the tests of streams share: small layers, chunks, the whole stream at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

import rnnkernels as rk
from helpers import draw

F64 = torch.float64
I, H, L = 4, 6, 2
#: Of the chunks of four streams; each is empty once, and they end after different numbers of steps.
LENGTHS = {"a": [1, 0, 5, 3], "b": [0, 4, 5, 1], 7: [2, 2, 5, 0], (): [3, 1, 0, 1]}
LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "RNN": rk.RNN,
    "LSTM": rk.LSTM,
    "GRU": rk.GRU,
    "LSTM projected": lambda *a, **o: rk.LSTM(*a, proj_size=3, **o),
    "LSTM truncated": lambda *a, **o: rk.LSTM(*a, truncate=(2, 3), grad_clip=1.0, **o),
    "torch_types.GRU": rk.torch_types.GRU,
    "nn.RNN": nn.RNN,
    "nn.GRU": nn.GRU,
    "nn.LSTM projected": lambda *a, **o: nn.LSTM(*a, proj_size=3, **o),
}
GOOD = torch.ones(2, I, dtype=F64)  # a chunk


def make(
    name: str = "LSTM", dtype: torch.dtype = F64, layers: int = L, **options: Any
) -> nn.RNNBase:
    torch.manual_seed(0)
    layer = LAYERS[name](I, H, num_layers=layers, dtype=dtype, **options).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2)  # so that states matter
    return layer


def streams(dtype: torch.dtype = F64) -> dict[Hashable, list[Tensor]]:
    """The chunks of each stream."""
    return {
        i: list(draw(sum(lengths), I, seed=n, dtype=dtype).split(lengths))
        for n, (i, lengths) in enumerate(LENGTHS.items())
    }


def whole(layer: nn.RNNBase, chunks: list[Tensor], hx: Any = None) -> tuple[Tensor, Any]:
    """What the layer gives for all chunks at once; [T, I] is unbatched."""
    with torch.no_grad():
        y, last = layer(torch.cat(chunks), hx)
    return y, last
