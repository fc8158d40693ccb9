"""Prints how far our layers and cells are from torch.nn's; exits with 1 where that is too far.

For every layer and cell it runs both libraries on the same numbers, with random gradients for all
outputs and final states, and prints the worst max|ours - theirs| / max|theirs| over the outputs and
over the gradients of input, states and parameters.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rnnkernels
from rnnkernels.testing import relative_error, tolerance

MODULES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")

#: Outputs, then gradients, each with a name.
Found = tuple[dict[str, Tensor], dict[str, Tensor]]


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in tensors(part)]


class Comparison:
    """One layer or cell of both libraries in float32, with its arguments."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        T, B, I, H = options.time, options.batch, options.input, options.hidden
        self.layers = not name.endswith("Cell")
        more: dict[str, Any] = {"num_layers": 2, "bidirectional": True} if self.layers else {}
        self.theirs = getattr(nn, name)(I, H, **more)
        self.ours = getattr(rnnkernels, name)(I, H, backend=options.backend, **more)
        self.ours.load_state_dict(self.theirs.state_dict())
        rows = [4] if self.layers else []
        self.input = torch.randn(*([T] if self.layers else []), B, I)
        self.states = [torch.randn(*rows, B, H) for _ in range(2 if "LSTM" in name else 1)]
        with torch.no_grad():
            outputs = tensors(self.theirs(self.input, self.hx(self.states)))
        self.grads = [torch.randn_like(o) for o in outputs]

    @staticmethod
    def hx(states: Sequence[Tensor]) -> Any:
        return tuple(states) if len(states) > 1 else states[0]

    def run(self, module: nn.Module, dtype: torch.dtype) -> Found:
        """Runs one of the modules in this dtype on the same numbers."""
        module = copy.deepcopy(module).to(dtype)
        given = (self.input, *self.states)
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in given]
        outputs = tensors(module(leaves[0], self.hx(leaves[1:])))
        torch.autograd.backward(outputs, [g.to(dtype) for g in self.grads])
        inputs = {"input": leaves[0]} | {f"state {i}": t for i, t in enumerate(leaves[1:])}
        return (
            {f"output {i}": t.detach() for i, t in enumerate(outputs)},
            {n: t.grad for n, t in (inputs | dict(module.named_parameters())).items()},  # type: ignore[misc]
        )


def errors(actual: Found, expected: Found) -> tuple[float, float]:
    """The worst relative error over outputs and over gradients."""
    outputs, gradients = (
        max(relative_error(a[key], e[key]) for key in e)
        for a, e in zip(actual, expected, strict=True)
    )
    return outputs, gradients


def report(options: argparse.Namespace) -> Iterator[tuple[str, str, float, float, float]]:
    """Rows of name, comparison, errors of outputs and gradients, and the limit for both."""
    for name in MODULES:
        c = Comparison(name, options)
        exact = c.run(c.theirs, torch.float64)
        ours, theirs = c.run(c.ours, torch.float32), c.run(c.theirs, torch.float32)
        single, double = tolerance(torch.float32), tolerance(torch.float64)
        yield name, "float64", *errors(c.run(c.ours, torch.float64), exact), double
        yield name, "float32 against float64", *errors(ours, exact), single
        yield name, "float32", *errors(ours, theirs), single


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for size, default in (("time", 32), ("batch", 8), ("input", 32), ("hidden", 64)):
        parser.add_argument(f"--{size}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--backend", help="of our side; by default the automatic choice")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)

    print(f"{'module':9} {'ours - torch.nn in':24} {'outputs':>9} {'gradients':>9} {'limit':>9}")
    failed = 0
    for name, comparison, outputs, gradients, limit in report(options):
        passed = max(outputs, gradients) <= limit
        failed += not passed
        numbers = " ".join(f"{n:9.2e}" for n in (outputs, gradients, limit))
        print(f"{name:9} {comparison:24} {numbers}{'' if passed else '  TOO FAR'}")
    print(f"{failed} comparisons are too far" if failed else "all comparisons are within limits")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
