"""Small layers with some options as functions of their input, states and parameters, for numerical
derivatives in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkernels
from helpers import tensors
from rnnkernels.cells import CELLS

T, B, INPUTS, H = 3, 2, 2, 3

#: Options by name: what the constructor takes.
CONSTRUCTOR: dict[str, dict[str, Any]] = {
    "bidirectional": {"bidirectional": True},
    "projection": {"proj_size": 2},
    "no-bias": {"bias": False},
    "single-bias": {"bias_mode": "single"},
    "sum": {"bidirectional": True, "merge_mode": "sum"},
    "mean": {"bidirectional": True, "merge_mode": "mean"},
    "mul": {"bidirectional": True, "merge_mode": "mul"},
    "dropout": {"num_layers": 2, "dropout": 0.4},
    "two-layers": {"num_layers": 2},
    "recurrent-dropout": {"recurrent_dropout": 0.4},
    "input-dropout": {"input_dropout": 0.4, "num_layers": 2},
    "batch-first": {"batch_first": True},
}
#: What regularises a layer or changes its cell. `heads` come with a hidden size that they divide.
CHANGES: dict[str, dict[str, Any]] = {
    "recurrent-dropout": CONSTRUCTOR["recurrent-dropout"],
    "input-dropout": CONSTRUCTOR["input-dropout"],
    "weight-drop": {"weight_drop": 0.4},
    "zoneout": {"zoneout": 0.4},
    "layer-norm": {"layer_norm": True},
    "heads": {"heads": 2, "hidden_size": 4},
}
#: Options of the call.
CALL = ("hx", "lengths", "reset", "all-states", "packed", "unbatched")
EXCLUDED = [
    {"no-bias", "single-bias"},
    {"sum", "mean"},
    {"sum", "mul"},
    {"mean", "mul"},
    {"packed", "lengths"},
    {"packed", "unbatched"},
    {"heads", "projection"},
    {"heads", "layer-norm"},
    {"zoneout", "layer-norm"},
]


def make_layer(kind: str, **arguments: Any) -> Any:
    """A built-in cell by its name, or a class of the package."""
    torch.manual_seed(3)
    sizes = INPUTS, arguments.pop("hidden_size", H)
    of_layer = {"dtype": torch.float64, "backend": "cpu"} | arguments
    if kind in CELLS:
        layer: Any = rnnkernels.nn.base.RNNBase(kind.upper(), *sizes, **of_layer)
    else:
        layer = getattr(rnnkernels, kind)(*sizes, **of_layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(1.5)
    return layer


def function_of_inputs(
    kind: str, options: tuple[str, ...]
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """A layer with these options as a function of x, its states and its parameters."""
    every = CONSTRUCTOR | CHANGES
    arguments = {k: v for name in options for k, v in every.get(name, {}).items()}
    if {"zoneout", "projection"} <= set(options):
        arguments["zoneout"] = (0.0, *(0.4,) * (len(state_sizes(make_layer(kind))) - 1))
    layer = make_layer(kind, **arguments)
    names = [name for name, _ in layer.named_parameters()]
    gen = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64).requires_grad_()

    batch = () if "unbatched" in options else (B,)
    batch_first = "batch-first" in options and batch
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    inputs = [random(*((*batch, T) if batch_first else (T, *batch)), INPUTS)]
    if "hx" in options:
        inputs += [random(rows, *batch, size) for size in state_sizes(layer)]
        for normaliser in inputs[3:]:  # of an sLSTM, and its stabiliser: a normaliser is no zero
            normaliser.data.abs_().add_(0.5)
    states = len(inputs) - 1
    lengths = torch.tensor([2, 3] if "packed" in options else [2, 0])[: B if batch else 1]
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[1, 0] = mask[2, 1] = mask[0, 1] = True
    mask = mask if batch else mask[:, 0]
    call: dict[str, Any] = {"return_all_states": "all-states" in options}
    if "lengths" in options:
        call["lengths"] = lengths
    if "reset" in options:
        call["reset"] = mask.t() if batch_first else mask

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(7)  # dropout draws the same mask at every evaluation
        hx = rest[:states]
        parameters = dict(zip(names, rest[states:], strict=True))
        given: Any = x
        if "packed" in options:
            given = pack_padded_sequence(x, lengths, bool(batch_first), enforce_sorted=False)
        state: Any = (hx if len(hx) > 1 else hx[0]) if hx else None
        result = functional_call(layer, parameters, (given, state), call)
        return tuple(t for t in tensors_of(result) if t.requires_grad)

    return run, inputs + [p.detach().requires_grad_() for p in layer.parameters()]


def state_sizes(layer: Any) -> list[int]:
    """Of h, and of the states beside it."""
    last = tensors(layer(torch.zeros(1, 1, INPUTS, dtype=torch.float64))[1])
    return [state.size(-1) for state in last]


def tensors_of(result: Any) -> list[Tensor]:
    """Every tensor inside the results of a layer."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [] if result is None else [t for part in result for t in tensors_of(part)]


def fits(kind: str, *options: str) -> bool:
    """Does a layer of this kind take all of these options?"""
    if "projection" in options and kind not in ("lstm", "CIFG", "PeepholeLSTM", "SLSTM"):
        return False
    if "layer-norm" in options and kind not in ("lstm", "gru"):
        return False
    if kind == "IndRNN" and {"recurrent-dropout", "weight-drop"} & set(options):
        return False
    return not any(pair <= set(options) for pair in EXCLUDED)
