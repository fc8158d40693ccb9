"""A case made ready to run: one set of weights and inputs for all, and the right results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import device as devices
from benchmarks.cases import Case

Results = dict[str, Tensor]

#: The variant of a case whose layer takes its state, as cells do.
STEP = "step"


class Inputs(NamedTuple):
    """What a call takes, and the gradient of its first output."""

    arguments: tuple[Any, ...]  # x [T, B, I], and a state where one is taken; of a cell x [B, I]
    leaves: list[Tensor]  # the tensors among them
    dy: Tensor  # [T, B, D*H]; of a cell [B, H]


class Runner:
    """A layer as somebody implements it: a call, and the parameters it has.

    ``relayout`` takes tensors in the layout of torch.nn's parameters (their gradients) to the
    layout of ``parameters``, where that is another.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        parameters: Iterable[Tensor],
        relayout: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ) -> None:
        self.call = call
        self.parameters = list(parameters)
        self.relayout = relayout or (lambda tensors: tensors)

    def forward(self, inputs: Inputs) -> Any:
        return self.call(*inputs.arguments)

    def gradients(self, inputs: Inputs) -> Sequence[Tensor]:
        """Of all inputs and parameters, forward and backward."""
        out = self.forward(inputs)
        y = out if isinstance(out, Tensor) else out[0]
        return torch.autograd.grad(y, [*inputs.leaves, *self.parameters], inputs.dy)

    def results(self, inputs: Inputs, grad: bool) -> Results:
        """All outputs, or all gradients, by name."""
        if not grad:
            with torch.no_grad():
                outputs = flat(self.forward(inputs))
            return {f"output {i}": out for i, out in enumerate(outputs)}
        found = self.gradients(inputs)
        count = len(inputs.leaves)
        names = [f"gradient of input {i}" for i in range(count)]
        names += [f"gradient of parameter {i}" for i in range(len(found) - count)]
        return dict(zip(names, found, strict=True))

    def expected(self, right: Results) -> Results:
        """Results in torch.nn's layout, as this runner returns them."""
        mark = "gradient of parameter"
        others = {name: value for name, value in right.items() if not name.startswith(mark)}
        gradients = [value for name, value in right.items() if name.startswith(mark)]
        if not gradients:
            return right
        named = {f"{mark} {i}": grad for i, grad in enumerate(self.relayout(gradients))}
        return {**others, **named}


class Problem:
    """The weights and inputs of a case.

    ``checked`` are the inputs that results are compared on, ``timed`` those that clocks run on,
    redrawn between samples.
    """

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        self.template = self.module(case)
        self.checked = draw(case)
        nbytes = sum(t.nbytes for t in (*self.checked.leaves, self.checked.dy))
        self.timed = [draw(case) for _ in range(devices.get(case.device).rotations(nbytes))]
        self._turn = cycle(self.timed)

    @staticmethod
    def module(case: Case) -> nn.Module:
        """The layer whose weights all have."""
        return torch_nn(case)

    def next(self) -> Inputs:
        return next(self._turn)

    @torch.no_grad()
    def redraw(self) -> None:
        """Fills what is timed with new random numbers."""
        for inputs in self.timed:
            for t in (*inputs.leaves, inputs.dy):
                t.normal_()

    @cached_property
    def exact_template(self) -> nn.Module:
        """torch.nn's layer in float64 on the CPU, with the weights of all."""
        return copy.deepcopy(self.template).to("cpu", torch.float64)

    @cached_property
    def exact_inputs(self) -> Inputs:
        return exact(self.checked)

    @cached_property
    def _oracle(self) -> Runner:
        return Runner(self.exact_template, self.exact_template.parameters())

    @cached_property
    def outputs(self) -> Results:
        """The right ones."""
        return self._oracle.results(self.exact_inputs, grad=False)

    @cached_property
    def gradients(self) -> Results:
        """The right ones."""
        return self._oracle.results(self.exact_inputs, grad=True)


@lru_cache(maxsize=1)
def ready(case: Case) -> Problem:
    """The problem of a case; all modes of one case, asked for in turn, share it."""
    return Problem(case)


def torch_nn(case: Case) -> nn.Module:
    """torch.nn's module for a case, with random weights."""
    options: dict[str, Any] = {"dtype": case.torch_dtype, "device": case.device}
    if not case.single_step:
        options.update(num_layers=case.layers, bidirectional=case.directions == 2)
    make: type[nn.Module] = getattr(nn, case.cell)
    return make(case.shape.I, case.shape.H, **options)


def draw(case: Case) -> Inputs:
    """Random inputs; of a sequence x alone, of a cell or single steps their state too."""
    T, B, I, H = case.shape.T, case.shape.B, case.shape.I, case.shape.H

    def leaf(*size: int) -> Tensor:
        t = torch.randn(size, device=case.device).to(case.torch_dtype)
        return t.requires_grad_()

    x = leaf(B, I) if case.single_step else leaf(T, B, I)
    dy = leaf(*x.shape[:-1], case.directions * H).detach()
    if not case.single_step and case.variant != STEP:
        return Inputs((x,), [x], dy)
    size = (B, H) if case.single_step else (case.layers * case.directions, B, H)
    h = leaf(*size)
    if not case.cell.startswith("LSTM"):
        return Inputs((x, h), [x, h], dy)
    c = leaf(*size)
    return Inputs((x, (h, c)), [x, h, c], dy)


def exact(inputs: Inputs) -> Inputs:
    """The same numbers in float64 on the CPU."""
    made = {id(t): t.detach().to("cpu", torch.float64).requires_grad_() for t in inputs.leaves}

    def convert(value: Any) -> Any:
        return made[id(value)] if isinstance(value, Tensor) else tuple(map(convert, value))

    leaves = [made[id(t)] for t in inputs.leaves]
    return Inputs(convert(inputs.arguments), leaves, inputs.dy.to("cpu", torch.float64))


def flat(value: Any) -> list[Tensor]:
    """All tensors of nested tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in flat(part)]
