"""Written cells and regularised layers: beside a loop over time in torch operations, the same loop
with a compiled step, and an LSTM of ours of the same sizes.

Loops have the input's product in front, and the cell's formula as the package states it in torch.
Results are compared in evaluation, where nothing is drawn, and times are those of training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rnnkernels
from benchmarks import contest, providers
from benchmarks.cases import Case, Shape
from benchmarks.contest import Contest, Row, Setup, Way
from benchmarks.problem import Inputs, Problem, Results, Runner
from rnnkernels.cells import DefinedCell, stated

Named = dict[str, Tensor]

SHAPE = Shape(128, 16, 256, 256)
#: By the name of a variant, the options of its layer.
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "zoneout": {"zoneout": 0.1},
    "recurrent dropout": {"recurrent_dropout": 0.2},
    "weight drop": {"weight_drop": 0.3},
    "input dropout": {"input_dropout": 0.2},
    "layer norm": {"layer_norm": True},
}
CASES = (
    *(Case(cell, SHAPE) for cell in ("MGU", "CIFG", "PeepholeLSTM", "IndRNN", "SLSTM")),
    Case("SLSTM", SHAPE, heads=4),
    *(Case(cell, SHAPE, variant="zoneout") for cell in ("RNN", "LSTM", "GRU")),
    *(Case("LSTM", SHAPE, variant=v) for v in OPTIONS if v not in ("", "zoneout")),
    Case("GRU", SHAPE, variant="layer norm"),
)


def make(case: Case, **options: Any) -> nn.Module:
    """Our layer of a case."""
    kind: type[nn.Module] = getattr(rnnkernels, case.cell)
    options = {"heads": case.heads} | OPTIONS[case.variant] | options
    layer = kind(case.shape.I, case.shape.H, dtype=case.torch_dtype, **options)
    if case.variant == "layer norm":
        # At its first value, 1, what rounding leaves grows from step to step, in any way to compute
        # it, until gradients in float32 have few digits that could be compared.
        nn.init.constant_(layer.get_parameter("weight_norm_hh_l0"), 0.1)
    return layer


class Loop(nn.Module):
    """What a layer of one direction computes, step by step, on its parameters."""

    def __init__(self, layer: Any, compiled: bool = False) -> None:
        super().__init__()
        self.layer = layer
        own: DefinedCell | None = getattr(layer, "definition", None)
        self.cell = own or stated(layer.cell)
        self.zoneout: tuple[float, ...] = layer._zoneout(layer.zoneout) or (0.0,) * self.cell.S
        self.compiled = compiled

    @cached_property
    def step(self) -> Callable[..., list[Tensor]]:
        step: Callable[..., list[Tensor]] = self._step
        return torch.compile(step) if self.compiled else step

    def _step(
        self,
        gx: Tensor,
        states: list[Tensor],
        w_hh: Tensor | None,
        b_hh: Tensor | None,
        params: list[Tensor],
        mask: Tensor | None,
    ) -> list[Tensor]:
        """The next states [B, heads, H/heads] from gx [B, heads, G*H/heads]."""
        h = states[0] if mask is None else states[0] * mask
        if w_hh is None:
            gh = torch.zeros_like(gx)
        elif w_hh.dim() == 2:
            gh = F.linear(h, w_hh, b_hh)
        else:  # a block for each head
            gh = torch.einsum("bhk,hgk->bhg", h, w_hh)
            gh = gh if b_hh is None else gh + b_hh
        prev = [*states, *(p.expand_as(states[0]) for p in params)]
        found, _ = self.cell.forward(gx.chunk(self.cell.G, -1), gh.chunk(self.cell.G, -1), prev)
        return [
            self._zoned(p, before, after) if p else after
            for p, before, after in zip(self.zoneout, states, found, strict=True)
        ]

    def _zoned(self, p: float, before: Tensor, after: Tensor) -> Tensor:
        d = torch.bernoulli(torch.full_like(after, p)) if self.training else p
        return d * before + (1 - d) * after

    def forward(self, x: Tensor) -> Tensor:
        layer, heads = self.layer, self.layer.heads
        named = {n.removesuffix("_l0"): p for n, p in layer.named_parameters()}
        if layer.input_dropout and self.training:
            x = x * F.dropout(torch.ones_like(x[:1]), layer.input_dropout)
        w_hh, b_hh = named.get("weight_hh"), named.get("bias_hh")
        if layer.weight_drop and w_hh is not None:
            w_hh = F.dropout(w_hh, layer.weight_drop, self.training)
        if heads > 1 and w_hh is not None:
            w_hh = w_hh.view(heads, -1, w_hh.size(-1))
            b_hh = None if b_hh is None else b_hh.view(heads, -1)
        gx = F.linear(x, named["weight_ih"], named.get("bias_ih"))
        gx = gx.view(*x.shape[:2], heads, -1)
        first = gx.new_zeros(x.size(1), heads, layer.hidden_size // heads)
        params = [named[f"weight_{p}"].view(heads, -1) for p in self.cell.params]
        mask = None
        if layer.recurrent_dropout and self.training:
            mask = F.dropout(torch.ones_like(first), layer.recurrent_dropout)
        states, outputs = [first] * self.cell.S, []
        for each in gx.unbind():
            states = self.step(each, states, w_hh, b_hh, params, mask)
            outputs.append(states[0])
        return torch.stack(outputs).flatten(-2)


class NormedLoop(nn.Module):
    """The same of a layer whose products are normalised, after Ba et al. 2016."""

    def __init__(self, layer: Any, compiled: bool = False) -> None:
        super().__init__()
        self.layer = layer
        step = self._lstm if layer.mode == "LSTM" else self._gru
        self.step: Callable[..., list[Tensor]] = torch.compile(step) if compiled else step
        H = layer.hidden_size
        self.parts = [4 * H] if layer.mode == "LSTM" else [2 * H, H]

    def _normed(self, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """Of all gates of an LSTM, or of the first two and the last one of a GRU."""
        if len(self.parts) == 1:
            return [F.layer_norm(x, weight.shape, weight, bias)]
        parts = zip(*(torch.split(t, self.parts, -1) for t in (x, weight, bias)), strict=True)
        return [F.layer_norm(x, w.shape, w, b) for x, w, b in parts]

    def _lstm(self, gx: list[Tensor], states: list[Tensor], named: Named) -> list[Tensor]:
        (gh,) = self._normed(F.linear(states[0], named["weight_hh"]), *affine(named, "hh"))
        i, f, g, o = (gx[0] + gh + named["bias_hh"]).chunk(4, -1)
        c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
        weight, bias = affine(named, "c")
        return [torch.sigmoid(o) * torch.tanh(F.layer_norm(c, weight.shape, weight, bias)), c]

    def _gru(self, gx: list[Tensor], states: list[Tensor], named: Named) -> list[Tensor]:
        gates, n = self._normed(F.linear(states[0], named["weight_hh"]), *affine(named, "hh"))
        of_gates, of_n = torch.split(named["bias_hh"], self.parts)
        r, z = torch.sigmoid(gx[0] + gates + of_gates).chunk(2, -1)
        n = torch.tanh(gx[1] + r * (n + of_n))
        return [n + z * (states[0] - n)]

    def forward(self, x: Tensor) -> Tensor:
        named = {n.removesuffix("_l0"): p for n, p in self.layer.named_parameters()}
        gx = self._normed(F.linear(x, named["weight_ih"]), *affine(named, "ih"))
        gx = [g + b for g, b in zip(gx, torch.split(named["bias_ih"], self.parts), strict=True)]
        states = [x.new_zeros(x.size(1), self.layer.hidden_size)] * (3 - len(self.parts))
        outputs = []
        for each in zip(*(g.unbind() for g in gx), strict=True):
            states = self.step(list(each), states, named)
            outputs.append(states[0])
        return torch.stack(outputs)


def affine(named: Named, place: str) -> tuple[Tensor, Tensor]:
    return named[f"weight_norm_{place}"], named[f"bias_norm_{place}"]


def loop_over(layer: Any, compiled: bool = False) -> nn.Module:
    """The loop that computes what a layer does."""
    return (NormedLoop if layer.layer_norm else Loop)(layer, compiled)


class WrittenProblem(Problem):
    """A case whose right results are those of the loop."""

    @staticmethod
    def module(case: Case) -> nn.Module:
        return make(case)

    @cached_property
    def _oracle(self) -> Runner:
        loop = loop_over(self.exact_template).eval()
        return Runner(loop, self.exact_template.parameters())


class InTraining(Runner):
    """Compared in evaluation, where nothing is drawn. Of the outputs the first counts."""

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor]) -> None:
        super().__init__(module, parameters)
        self.module = module

    def results(self, inputs: Inputs, grad: bool) -> Results:
        self.module.eval()
        found = super().results(inputs, grad)
        self.module.train()
        return found


@lru_cache(maxsize=1)
def ready(case: Case) -> WrittenProblem:
    return WrittenProblem(case)


def compete(case: Case, mode: str, setup: Setup) -> Contest:
    """The loops, ours, and our LSTM, which computes something else."""
    problem = ready(case)
    ours: Any = problem.template
    ours.backend = setup.backends[0]
    providers.require(ours, problem.checked.arguments[0][:1])
    parameters = list(ours.parameters())
    runners = {
        "torch loop": InTraining(loop_over(ours), parameters),
        "compiled step": InTraining(loop_over(ours, compiled=True), parameters),
        "rnnkernels": InTraining(ours, parameters),
    }
    found = contest.of_runners(problem, mode, runners)
    lstm = rnnkernels.LSTM(case.shape.I, case.shape.H, dtype=case.torch_dtype)
    other = Runner(lstm, lstm.parameters())
    found.ways["rnnkernels.LSTM"] = Way(partial(_train, other, problem))
    return found


def _train(runner: Runner, problem: Problem) -> object:
    return runner.gradients(problem.next())


def finish(case: Case, mode: str, row: Row) -> None:
    """How much our LSTM's products are."""
    row["lstm gflop"] = Case("LSTM", case.shape).gflop(mode)
