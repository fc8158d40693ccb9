"""What lengths and resets cost over the plain call, and what they save over loops on torch.nn."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks import contest, providers
from benchmarks.cases import LAYERS, Case, shapes
from benchmarks.contest import Contest, Setup
from benchmarks.problem import Results, Runner, ready

COSTS = shapes("128,16,256,256", "256,8,128,256", "64,32,64,128")
EPISODES = shapes("128,16,256,256")
RATE = 0.03  # of steps that start a new episode

CASES = tuple(
    Case(cell, shape, variant=variant)
    for cell in LAYERS
    for variant, listed in (("cost", COSTS), ("episodes", EPISODES))
    for shape in listed
)


def marks(case: Case) -> tuple[Tensor, Tensor]:
    """Random lengths from T/2 to T, one row at least full, and resets: on the CPU."""
    T, B = case.shape.T, case.shape.B
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint((T + 1) // 2, T + 1, (B,), generator=generator)
    lengths[0] = T
    return lengths, torch.rand(T, B, generator=generator) < RATE


def packed(module: nn.Module, lengths: Tensor, x: Tensor) -> Any:
    """Padded input through a PackedSequence and back."""
    y, state = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return pad_packed_sequence(y, total_length=x.size(0))[0], state


def pieces(starts: Tensor) -> list[int]:
    """The sizes of the pieces of a sequence that is cut before every marked step: [T] bool."""
    cuts = [0, *(t for t in starts.nonzero()[:, 0].tolist() if t > 0), len(starts)]
    return [b - a for a, b in pairwise(cuts)]


def loop_over_rows(module: nn.Module, sizes: list[list[int]], x: Tensor) -> Tensor:
    """Every row by itself, episode by episode, each from a state of zero."""
    rows = []
    for row, parts in zip(x.unbind(1), sizes, strict=True):  # unbind and split: cheap backward
        rows.append(torch.cat([module(part[:, None])[0] for part in torch.split(row, parts)])[:, 0])
    return torch.stack(rows, 1)


def loop_over_cuts(module: nn.Module, sizes: list[int], reset: Tensor, x: Tensor) -> Tensor:
    """The whole batch, cut wherever any row resets; the states of those rows are zeroed there."""
    outputs, state, t = [], None, 0
    for part in torch.split(x, sizes):
        if state is not None:
            state = _zeroed(state, reset[t, :, None])
        y, state = module(part, state)
        outputs.append(y)
        t += part.size(0)
    return torch.cat(outputs)


def _zeroed(state: Any, rows: Tensor) -> Any:
    if isinstance(state, Tensor):
        return state.masked_fill(rows, 0)
    return tuple(part.masked_fill(rows, 0) for part in state)


def compete(case: Case, mode: str, setup: Setup) -> Contest:
    """``cost``: the plain call against those with lengths or resets, ours, and a PackedSequence
    on torch.nn. ``episodes``: resets in one call of ours against two loops on torch.nn."""
    problem = ready(case)
    theirs, ours = problem.template, providers.our_module(problem, setup.backends[0])
    lengths, reset = marks(case)
    rows, cuts = [pieces(column) for column in reset.unbind(1)], pieces(reset.any(1))
    there = reset.to(case.device)

    def resetting(x: Tensor) -> Tensor:
        y: Tensor = ours(x, reset=there)[0]
        return y

    if case.variant == "cost":
        full = torch.full_like(lengths, case.shape.T)
        calls: dict[str, tuple[nn.Module, Any]] = {
            "plain": (ours, ours),
            "lengths, all T": (ours, partial(ours, lengths=full)),
            "lengths, T/2 to T": (ours, partial(ours, lengths=lengths)),
            "torch.nn packed, T/2 to T": (theirs, partial(packed, theirs, lengths)),
            "reset, 3 %": (ours, resetting),
        }
    else:
        calls = {
            "reset": (ours, resetting),
            "torch.nn by row": (theirs, partial(loop_over_rows, theirs, rows)),
            "torch.nn by cut": (theirs, partial(loop_over_cuts, theirs, cuts, there)),
        }

    def right(name: str) -> Results:
        exact, gradients = problem.exact_template, mode in ("training", "memory")
        call: Any = exact
        if name.endswith("T/2 to T"):
            call = partial(packed, exact, lengths)
        elif case.variant == "episodes" or name.startswith("reset"):
            call = partial(loop_over_cuts, exact, cuts, reset)
        return Runner(call, exact.parameters()).results(problem.exact_inputs, gradients)

    runners = {name: Runner(call, who.parameters()) for name, (who, call) in calls.items()}
    return contest.of_runners(problem, mode, runners, right=right)
