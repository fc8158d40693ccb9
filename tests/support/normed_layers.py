"""Layers whose products are normalised, of random numbers, and their results and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import rnnkernels
from helpers import draw, tensors

F64 = torch.float64
T, B, I, H = 6, 5, 4, 7
KINDS = ("LSTM", "GRU")
X = draw(T, B, I, seed=1, dtype=F64)


def make(kind: str, sizes: tuple[int, int] = (I, H), **options: Any) -> Any:
    """A layer, or a cell, with norms that do something."""
    torch.manual_seed(3)
    module = getattr(rnnkernels, kind)(*sizes, **{"dtype": F64} | options, layer_norm=True)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p += 0.3 * torch.randn_like(p) if "norm" in name else 0
    return module


def given(module: Any, batch: int = B) -> list[Tensor]:
    """Random first states of a layer."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [module.proj_size or module.hidden_size]
    sizes += [module.hidden_size] * (module.mode == "LSTM")
    dtype = module.weight_ih_l0.dtype
    states = [draw(rows, batch, n, seed=20 + k, dtype=dtype) for k, n in enumerate(sizes)]
    return [s.requires_grad_() for s in states]


def called(module: Any, x: Tensor, states: list[Tensor], **call: Any) -> list[Tensor]:
    return tensors(module(x, tuple(states) if len(states) > 1 else states[0], **call))


def pulled(outputs: list[Tensor], asked: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of a fixed random loss."""
    grads = [draw(*o.shape, seed=40 + k, dtype=F64).to(o) for k, o in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, asked, grads)]


def everything(module: Any, seed: int = 5, **call: Any) -> list[Tensor]:
    """Outputs, states and all gradients."""
    x = X.transpose(0, 1) if module.batch_first else X
    x = x.to(module.weight_ih_l0.dtype).detach().requires_grad_()
    states = given(module)
    torch.manual_seed(seed)
    outputs = called(module, x, states, **call)
    return pulled(outputs, [x, *states, *module.parameters()])
