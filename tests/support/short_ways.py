"""What the tests of the short ways of layers share: layers, what they are called with, and runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import rnnkernels
from helpers import draw, tensors

T, B, I, H = 4, 3, 5, 6
LAYERS: dict[str, dict[str, Any]] = {
    "RNN": {},
    "LSTM": {},
    "GRU": {},
    "RNN relu, 2 layers": {"nonlinearity": "relu", "num_layers": 2},
    "LSTM projected, both ways": {"proj_size": 2, "bidirectional": True, "num_layers": 2},
    "LSTM projected without bias": {"proj_size": 3, "bias": False},
    "GRU one bias, batch first": {"bias_mode": "single", "batch_first": True, "num_layers": 3},
    "GRU both ways, batch first": {"bidirectional": True, "batch_first": True},
    "LSTM both ways": {"bidirectional": True},
}


def build(name: str = "LSTM", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    kind = getattr(rnnkernels, name.split()[0])
    return kind(I, H, dtype=dtype, **LAYERS.get(name, {}), **options)


def arguments(module: Any, steps: int = T, rows: int = B) -> tuple[Tensor, Any]:
    dtype = module.weight_hh_l0.dtype
    shape = (rows, steps, I) if module.batch_first else (steps, rows, I)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or H, *([H] if module.mode == "LSTM" else [])]
    h = [draw(layers, rows, n, seed=i, dtype=dtype).requires_grad_() for i, n in enumerate(widths)]
    x = draw(*shape, seed=9, dtype=dtype).requires_grad_()
    return x, tuple(h) if len(h) > 1 else h[0]


def run(module: Any, args: tuple[Any, Any], hx: bool, **call: Any) -> list[Tensor]:
    """Outputs, and their gradients in everything."""
    x, state = args
    out = tensors(module(x, state, **call) if hx else module(x, **call))
    leaves = [*tensors(x), *(tensors(state) if hx else []), *module.parameters()]
    loss = sum((o * draw(*o.shape, seed=i, dtype=o.dtype)).sum() for i, o in enumerate(out))
    return [*out, *torch.autograd.grad(loss, leaves)]
