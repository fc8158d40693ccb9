"""Layers and cells as functions that torch.func transforms, and what each lane gives alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

import rnnkernels
from helpers import draw, tensors

T, B, I, H, LANES = 4, 2, 3, 4, 2
F64 = torch.float64
Tensors = dict[str, Tensor]

#: Modules by name: their class and what it takes beside the sizes.
MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "RNN": ("RNN", {"bias": False, "batch_first": True}),
    "LSTM": ("LSTM", {"num_layers": 2}),
    "LSTM-projected": (
        "LSTM",
        {"proj_size": 2, "num_layers": 2, "bidirectional": True, "merge_mode": "mul"},
    ),
    "GRU": ("GRU", {"num_layers": 2, "bidirectional": True, "bias_mode": "single"}),
    "RNNCell": ("RNNCell", {"nonlinearity": "relu"}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
}
#: Options of a call; "lane": every lane has its own.
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {"lengths": [3, T]},
    "own-lengths": {"lengths": "lane", "return_all_states": True},
    "resets": {"lengths": "lane", "reset": "lane"},
    "window": {"truncate": 2},
    "windows": {"truncate": (2, 3), "lengths": "lane"},
    "bounded": {"grad_clip": ("norm", 0.02)},
    "bounded-packed": {"grad_clip": ("value", 0.01), "lengths": [3, T]},
}


def calls_of(module: str) -> list[str]:
    """Those that a module takes."""
    kind, options = MODULES[module]
    if kind.endswith("Cell"):
        return ["plain"]
    return [c for c in CALLS if c != "windows" or not options.get("bidirectional")]


#: Every module with every call that it takes.
CASES = [(module, call) for module in MODULES for call in calls_of(module)]
#: Every module, and every call, for what costs more.
FEW_CASES = [
    *((module, "plain") for module in MODULES),
    *(("GRU", call) for call in ("own-lengths", "resets", "bounded")),
    *(("LSTM", call) for call in ("lengths", "windows")),
    *(("LSTM-projected", call) for call in ("window", "bounded-packed")),
]


class Lane(NamedTuple):
    """What each lane may have for itself."""

    x: Tensor
    lengths: Tensor  # [B]
    reset: Tensor  # [T, B], or [B, T]


class Case:
    """A module and a call of it, as functions of parameters and lanes."""

    def __init__(self, module: str, call: str = "plain") -> None:
        kind, options = MODULES[module]
        torch.manual_seed(0)
        self.module: nn.Module = getattr(rnnkernels, kind)(I, H, dtype=F64, **options)
        self.call = CALLS[call]
        self.bounded = "grad_clip" in self.call
        self.parameters = {n: p.detach() for n, p in self.module.named_parameters()}
        steps = (B, T) if options.get("batch_first") else (T, B)
        steps = (B,) if kind.endswith("Cell") else steps
        gen = torch.Generator().manual_seed(1)
        self.lanes = Lane(
            draw(LANES, *steps, I, seed=1, dtype=F64),
            torch.randint(0, T + 1, (LANES, B), generator=gen),
            torch.rand(LANES, *steps, generator=gen) < 0.3,
        )

    def lane(self, i: int) -> Lane:
        return Lane(*(t[i] for t in self.lanes))

    def __call__(self, parameters: Tensors, lane: Lane) -> list[Tensor]:
        """All outputs."""
        options = {k: getattr(lane, k) if v == "lane" else v for k, v in self.call.items()}
        return tensors(functional_call(self.module, parameters, (lane.x,), options))

    def loss(self, parameters: Tensors, lane: Lane) -> Tensor:
        """Bounds leave no more of a gradient than they allow, however many losses add up to it:
        that of a further derivative is compared where the loss adds nothing to it."""
        terms = []
        for i, out in enumerate(self(parameters, lane)):
            factor = torch.linspace(-1, 1 + 0.1 * i, out.numel(), dtype=F64).view(out.shape)
            terms.append((out * factor if self.bounded else (out * factor).square()).sum())
        return torch.stack(terms).sum()

    def gradients(self, parameters: Tensors, lane: Lane) -> tuple[Tensors, Tensor]:
        """Those of the loss in the parameters and the input, as torch.autograd gives them."""
        leaves = {n: p.clone().requires_grad_() for n, p in parameters.items()}
        x = lane.x.clone().requires_grad_()
        loss = self.loss(leaves, lane._replace(x=x))
        *found, dx = torch.autograd.grad(loss, [*leaves.values(), x])
        return dict(zip(leaves, found, strict=True)), dx

    def own_parameters(self) -> Tensors:
        """Those of as many models as there are lanes."""
        return {
            n: torch.stack([p * (1 + 0.1 * i) for i in range(LANES)])
            for n, p in self.parameters.items()
        }


def stacked(each: Iterable[Any]) -> Any:
    """What vmap makes of the results of each lane."""
    flat, (spec, *_) = zip(*map(torch.utils._pytree.tree_flatten, each), strict=True)
    together = [torch.stack(parts) for parts in zip(*flat, strict=True)]
    return torch.utils._pytree.tree_unflatten(together, spec)


def second_gradients(case: Case, lane: Lane) -> tuple[Tensors, Tensor]:
    """Those of the squares of the first ones in the parameters, by the reference."""
    leaves = {n: p.clone().requires_grad_() for n, p in case.parameters.items()}
    x = lane.x.clone().requires_grad_()
    with rnnkernels.use_backend("reference"):
        loss = case.loss(leaves, lane._replace(x=x))
        first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        total = torch.stack([g.square().sum() for g in first]).sum()
        *found, dx = torch.autograd.grad(total, [*leaves.values(), x], materialize_grads=True)
    return dict(zip(leaves, found, strict=True)), dx
