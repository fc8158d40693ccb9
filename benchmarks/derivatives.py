"""Derivatives of gradients: a step with a penalty on the gradient of the input, as in WGAN-GP
(Gulrajani et al. 2017); the derivative of all gradients, as in meta-learning; and torch.func.grad.

``plain`` is an ordinary training step of the same case.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import contest, providers
from benchmarks.cases import LAYERS, Case, Shape
from benchmarks.contest import Contest, Setup
from benchmarks.problem import Inputs, Results, Runner, ready

SHAPES = (Shape(128, 16, 256, 256), Shape(64, 32, 128, 128))
VARIANTS = ("plain", "penalty", "all gradients", "torch.func.grad")

CASES = tuple(
    Case(cell, shape, variant=variant)
    for shape in SHAPES
    for cell in LAYERS
    for variant in VARIANTS
)


class Derivative(Runner):
    """A module whose ``gradients`` are those of a variant."""

    def __init__(self, module: nn.Module, variant: str) -> None:
        super().__init__(module, module.parameters())
        self.module, self.variant = module, variant
        self.names = [name for name, _ in module.named_parameters()]

    def gradients(self, inputs: Inputs) -> Sequence[Tensor]:
        sources = [*inputs.leaves, *self.parameters]
        if self.variant == "plain":
            return super().gradients(inputs)
        if self.variant == "torch.func.grad":
            return self._by_func(inputs)
        y = self.module(*inputs.arguments)[0]
        first = sources[:1] if self.variant == "penalty" else sources
        found = torch.autograd.grad(y, first, inputs.dy, create_graph=True)
        # Of the sum of their squares, halved, and of y for the penalty.
        outputs, along = [*found], [t.detach() for t in found]
        if self.variant == "penalty":
            outputs, along = [y, *outputs], [inputs.dy, *along]
        return torch.autograd.grad(outputs, sources, along, materialize_grads=True)

    def _by_func(self, inputs: Inputs) -> Sequence[Tensor]:
        n = len(inputs.leaves)

        def loss(*sources: Tensor) -> Tensor:
            named = dict(zip(self.names, sources[n:], strict=True))
            y: Tensor = functional_call(self.module, named, sources[:n])[0]
            return (y * inputs.dy).sum()

        sources = [t.detach() for t in (*inputs.leaves, *self.parameters)]
        found: tuple[Tensor, ...] = torch.func.grad(loss, tuple(range(len(sources))))(*sources)
        return found


def compete(case: Case, mode: str, setup: Setup) -> Contest:
    """torch.nn's layer and ours."""
    problem = ready(case)
    modules = {
        "torch.nn": problem.template,
        "rnnkernels": providers.our_module(problem, setup.backends[0]),
    }
    runners = {name: Derivative(module, case.variant) for name, module in modules.items()}

    def right(_: str) -> Results:
        exact = Derivative(problem.exact_template, case.variant)
        return exact.results(problem.exact_inputs, grad=True)

    return contest.of_runners(problem, mode, runners, right=right)
