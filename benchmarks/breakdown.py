"""Where the time of an LSTM goes: every part timed by itself, beside its floor and the total.

The parts are the real ones: the ops that a step runs, and ``torch.mm`` on matrices of the same
sizes and layouts for the products in front of and behind them.

* The loop is the op on an input of one feature. The input projection, which the op does between
  the steps, is what the op takes longer on all features.
* The recurrent product is the loop of an RNN with relu and 2H units. That has the 4 H^2
  multiply-adds per row and step that an LSTM of H units has, as many weights, the same barriers,
  and next to no cell. The cell is the rest of the LSTM's loop.
* Products write to memory that is there; the ops ask for fresh memory, and its page faults count
  with the loop. In a whole training step backward writes over what forward saved; here it does not.
* The overhead is a whole call on two steps of one row with 8 units: Python, autograd, dispatch.

Their sum is held against the measured total: what they leave unexplained is part of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import contest, providers
from benchmarks.cases import Case, Shape, shapes
from benchmarks.contest import Contest, Row, Setup, Way
from benchmarks.problem import Problem, Runner, ready
from rnnkernels._core.call import ARGUMENTS, Layer

CASES = tuple(
    Case("LSTM", shape) for shape in shapes("128,32,256,256", "512,16,40,192", "1000,2,64,64")
)

#: The parts add up where they explain the total to within this share of it.
MARGIN = 0.15

GATES = 4

Run = Callable[[], object]


@dataclass
class Loop:
    """One layer's loop over time through the ops, on random weights and an input of I features."""

    name: str
    shape: Shape
    like: Tensor

    def __post_init__(self) -> None:
        T, B, I, H = self.shape.T, self.shape.B, self.shape.I, self.shape.H
        rows = H * (GATES if self.name == "lstm" else 1)
        bound = 1 / math.sqrt(H)
        self.w_ih = self.like.new_empty(rows, I).uniform_(-bound, bound)
        self.w_hh = self.like.new_empty(rows, H).uniform_(-bound, bound)
        self.bias = [self.like.new_empty(rows).uniform_(-bound, bound) for _ in range(2)]
        self.x = torch.randn_like(self.like.new_empty(T, B, I))
        self.dy = torch.randn_like(self.like.new_empty(T, B, H))
        h0 = self.like.new_zeros(1, B, H)
        self.call = Layer(
            self.name,
            self.x,
            [self.w_ih],
            [self.w_hh],
            [self.bias[0]],
            [self.bias[1]],
            [],
            h0,
            h0 if self.name == "lstm" else None,
            lengths=None,
            reset=None,
            number=0,
        ).call()

    def forward(self, save: bool) -> tuple[Tensor, ...]:
        call = self.call._replace(save=save)
        found: tuple[Tensor, ...] = torch.ops.rnnkernels.sequence_forward(*call[:ARGUMENTS])
        return found

    def backward(self, kept: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y, _, _, ys, c, _, saved = kept
        call = self.call
        given = {
            "cell": call.cell_name,
            **{"dy": self.dy, "y": y, "ys": ys, "c": c, "saved": saved},
            **{"record": False, "initial": True, "invariant": False},
        }
        op = torch.ops.rnnkernels.sequence_backward
        names = [argument.name for argument in op.default._schema.arguments]
        values = [given[n] if n in given else getattr(call, n, None) for n in names]
        found: tuple[Tensor, ...] = op(*values)
        return found

    @torch.no_grad()
    def redraw(self) -> None:
        self.x.normal_()
        self.dy.normal_()


@torch.no_grad()
def compete(case: Case, mode: str, setup: Setup) -> Contest:
    """All that is timed; :func:`finish` turns it into parts."""
    problem, save = ready(case), mode == "training"
    whole = contest.of_runners(problem, mode, {"total": _runner(problem, setup)})
    ways = dict(whole.ways)
    like = problem.checked.dy
    T, B, H = case.shape.T, case.shape.B, case.shape.H
    op = Loop("lstm", case.shape, like)
    loop = Loop("lstm", replace(case.shape, I=1), like)
    product = Loop("rnn_relu", Shape(T, B, 1, 2 * H), like)
    tiny = ready.__wrapped__(replace(case, shape=Shape(2, 1, 8, 8)))

    ways |= contest.of_runners(tiny, mode, {"overhead": _runner(tiny, setup)}).ways
    runs: dict[str, Run] = {
        name: partial(part.forward, save)
        for name, part in (("op", op), ("loop", loop), ("product", product))
    }
    if save:
        kept = op.forward(save)
        dgates = op.backward(kept)[0][0, :, :, 0].flatten(0, 1)  # [T*B, 4H]
        h = kept[0].flatten(0, 1)
        runs["loop backward"] = partial(op.backward, kept)
        runs["product backward"] = partial(product.backward, product.forward(save))
        x, dx = op.x.flatten(0, 1), torch.empty_like(op.x.flatten(0, 1))
        runs["dW_ih"] = lambda: dgates.t() @ x
        runs["dW_hh"] = lambda: dgates[B:].t() @ h[:-B]
        runs["biases"] = lambda: dgates.sum(0).clone()
        runs["dx"] = lambda: torch.mm(dgates, op.w_ih, out=dx)
    ways |= {name: Way(torch.no_grad()(run)) for name, run in runs.items()}

    def redraw() -> None:
        whole.redraw()
        tiny.redraw()
        for part in (op, loop, product):
            part.redraw()

    return Contest(ways, redraw, whole.grad)


def _runner(problem: Problem, setup: Setup) -> Runner:
    return providers.build(providers.ours_on(setup.backends[0]), problem)


def finish(case: Case, mode: str, row: Row) -> None:
    """Adds the parts to a row, with floors, and what they leave unexplained of the total."""
    if "total" not in row["results"]:
        return
    ms = {name: found["ms"] for name, found in row["results"].items()}
    T, B, I, H = case.shape.T, case.shape.B, case.shape.I, case.shape.H
    units, size = T * B * H, case.torch_dtype.itemsize
    flop = {"x": 2 * units * GATES * I, "h": 2 * units * GATES * H}
    parts: list[tuple[str, float, float, float]] = []  # name, ms, flop, bytes

    def loop(name: str, whole: float, product: float, moved: int) -> None:
        parts.append((f"{name} recurrent product", product, flop["h"], 0))
        parts.append((f"{name} cell", whole - product, 0, moved * units * size))

    parts.append(("input projection", ms["op"] - ms["loop"], flop["x"], 0))
    # Write y, and where backward is to come c and the saved gates.
    loop("forward", ms["loop"], ms["product"], 2 + GATES if mode == "training" else 1)
    if mode == "training":
        # Read saved gates, c and dy; write the gates' gradients.
        loop("backward", ms["loop backward"], ms["product backward"], 2 * GATES + 2)
        weights = ms["dW_ih"] + ms["dW_hh"] + ms["biases"]
        parts.append(("weight gradients", weights, flop["x"] + flop["h"], 0))
        parts.append(("dx", ms["dx"], flop["x"], 0))
    parts.append(("overhead", ms["overhead"], 0, 0))
    gemm, copy = row["floors"]["gemm"]["rate"], row["floors"]["copy"]["rate"]
    row["parts"] = [
        _part(name, taken, flops / gemm / 1e6, moved / copy / 1e6)
        for name, taken, flops, moved in parts
    ]
    unexplained = ms["total"] - sum(taken for _, taken, _, _ in parts)
    row["unexplained_ms"] = unexplained
    if abs(unexplained) > MARGIN * ms["total"]:
        row["warning"] = (
            f"the parts leave {unexplained / ms['total']:+.0%} of the total unexplained, more than "
            f"the margin of {MARGIN:.0%}"
        )


def _part(name: str, ms: float, flops_ms: float, bytes_ms: float) -> dict[str, Any]:
    bound = "arithmetic" if flops_ms > bytes_ms else "memory" if bytes_ms else ""
    return {"name": name, "ms": ms, "floor_ms": max(flops_ms, bytes_ms), "bound": bound}
