"""Truncated BPTT in one call, against a loop over chunks on torch.nn that detaches the state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import contest, providers
from benchmarks.cases import LAYERS, Case, Shape
from benchmarks.contest import Contest, Setup
from benchmarks.problem import Inputs, Results, Runner, ready
from rnnkernels import streaming

#: Rows B and window k: the main case, then other windows, then other batches.
SIZES = ((8, 32), (8, 8), (8, 128), (1, 32), (64, 32))
WINDOW = 32

CASES = tuple(Case(cell, Shape(1024, B, 256, 256), window=k) for cell in LAYERS for B, k in SIZES)


class ChunkLoop(Runner):
    """A layer of torch.nn taken forward and backward chunk by chunk."""

    def __init__(self, module: nn.Module, k: int) -> None:
        super().__init__(module, module.parameters())
        self.module, self.k = module, k

    def gradients(self, inputs: Inputs) -> Sequence[Tensor]:
        self.module.zero_grad()
        x = inputs.leaves[0].detach()
        dx, hx = torch.empty_like(x), None
        for part, dy, target in streaming.chunks((x, inputs.dy, dx), self.k):
            y, hx = self.call(part.requires_grad_(), hx)
            torch.autograd.backward(y, dy)
            assert part.grad is not None
            target.copy_(part.grad)
            hx = streaming.detach(hx)
        return [dx, *(p.grad for p in self.parameters if p.grad is not None)]


def compete(case: Case, mode: str, setup: Setup) -> Contest:
    """The loop, ours in one call, and ours without truncation, which computes something else."""
    problem = ready(case)
    ours = providers.our_module(problem, setup.backends[0])
    runners = {
        "torch.nn loop": ChunkLoop(problem.template, case.window),
        "rnnkernels": Runner(partial(ours, truncate=case.window), ours.parameters()),
        "rnnkernels, full BPTT": Runner(ours, ours.parameters()),
    }

    def right(name: str) -> Results:
        if name == "rnnkernels, full BPTT":
            return problem.gradients
        oracle = ChunkLoop(problem.exact_template, case.window)
        return oracle.results(problem.exact_inputs, grad=True)

    return contest.of_runners(problem, mode, runners, right=right)
