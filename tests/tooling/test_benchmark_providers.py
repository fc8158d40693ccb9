"""How weights and gradients are handed to libraries that need a GPU.

Stand-ins with the layouts that those libraries document, as plain loops on the CPU, take their
place: gates, biases and gradients that were mixed up would give other numbers than torch.nn's.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tqdm")

from benchmarks import contest, problem, providers
from benchmarks.cases import Case, Shape


def flashrnn(gx: Tensor, r: Tensor, b: Tensor, function: str) -> tuple[Any, Any]:
    """gx [B, T, G, 1, H], r [G, 1, H, H] with gh_g = r_g h, b [G, 1, H] (gru: 4 for its 3 gates).

    States [S, B, T, 1, H] and the last of each [S, B, 1, 1, H].
    """
    B, T, _, _, H = gx.shape
    h = c = gx.new_zeros(B, H)
    all_h, all_states = [], []
    for t in range(T):
        gh = torch.einsum("gij,bj->bgi", r[:, 0], h)
        raw = gx[:, t, :, 0] + gh + b[:, 0] if function != "gru" else gx[:, t, :, 0]
        if function == "elman":
            h = raw[:, 0].tanh()
        elif function == "lstm":
            i, f, o = (raw[:, k].sigmoid() for k in (0, 1, 3))
            c = f * c + i * raw[:, 2].tanh()
            h = o * c.tanh()
        else:
            g = gh[:, 0] + b[0, 0]
            reset, z = ((raw[:, k] + gh[:, k + 1] + b[k + 1, 0]).sigmoid() for k in (0, 1))
            h = z * h + (1 - z) * (raw[:, 2] + b[3, 0] + reset * g).tanh()
        all_h.append(h)
        all_states.append(c)
    states = [torch.stack(s, 1)[:, :, None] for s in (all_h, all_states)]
    states = states[: 2 if function == "lstm" else 1]
    return torch.stack(states), torch.stack([s[:, -1:] for s in states])


class Haste(nn.Module):
    """kernel [I, G*H], recurrent_kernel [H, G*H], bias and recurrent_bias [G*H]."""

    gates: tuple[str, ...]

    def __init__(self, I: int, H: int) -> None:
        super().__init__()
        width = len(self.gates) * H
        self.kernel = nn.Parameter(torch.empty(I, width))
        self.recurrent_kernel = nn.Parameter(torch.empty(H, width))
        self.bias = nn.Parameter(torch.empty(width))
        self.recurrent_bias = nn.Parameter(torch.empty(width))

    def parts(self, x: Tensor, h: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        gx, gh = x @ self.kernel + self.bias, h @ self.recurrent_kernel
        n = len(self.gates)
        return tuple(dict(zip(self.gates, g.chunk(n, 1), strict=True)) for g in (gx, gh))  # type: ignore[return-value]


class HasteLSTM(Haste):
    gates = ("i", "g", "f", "o")

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h = c = x.new_zeros(x.size(1), self.recurrent_kernel.size(0))
        out = []
        for step in x:
            gx, gh = self.parts(step, h)
            sum_of = {name: gx[name] + gh[name] for name in self.gates}
            c = sum_of["f"].sigmoid() * c + sum_of["i"].sigmoid() * sum_of["g"].tanh()
            h = sum_of["o"].sigmoid() * c.tanh()
            out.append(h)
        return torch.stack(out), (h[None], c[None])


class HasteGRU(Haste):
    gates = ("z", "r", "n")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.size(1), self.recurrent_kernel.size(0))
        out = []
        for step in x:
            gx, gh = self.parts(step, h)
            gh = dict(
                zip(
                    self.gates,
                    (torch.cat([*gh.values()], 1) + self.recurrent_bias).chunk(3, 1),
                    strict=True,
                )
            )
            z, r = (gx["z"] + gh["z"]).sigmoid(), (gx["r"] + gh["r"]).sigmoid()
            h = z * h + (1 - z) * (gx["n"] + r * gh["n"]).tanh()
            out.append(h)
        return torch.stack(out), h[None]


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "NEEDED", "cpu")
    monkeypatch.setitem(sys.modules, "flashrnn", SimpleNamespace(flashrnn=flashrnn))  # type: ignore[arg-type]
    fake = SimpleNamespace(LSTM=HasteLSTM, GRU=HasteGRU)
    monkeypatch.setitem(sys.modules, "haste_pytorch", fake)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("flashrnn", "RNN"),
        ("flashrnn", "LSTM"),
        ("flashrnn", "GRU"),
        ("haste", "LSTM"),
        ("haste", "GRU"),
    ],
)
def test_weights_and_gradients_are_those_of_torch_nn(name: str, cell: str) -> None:
    ready = problem.Problem(Case(cell, Shape(6, 2, 3, 4), dtype="float64"))
    runner = providers.build(name, ready)
    for mode in ("inference", "training"):
        errors, wrong = contest.judge(contest.of_runners(ready, mode, {name: runner}))
        assert not wrong and errors[name] < 1e-12


@pytest.mark.parametrize(
    ("name", "case", "reason"),
    [
        ("haste", Case("RNN", Shape(6, 2, 3, 4)), "it has no RNN"),
        ("haste", Case("GRU", Shape(6, 2, 3, 4), dtype="bfloat16"), "it has no bfloat16"),
        ("flashrnn", Case("GRU", Shape(6, 2, 3, 4), layers=2), "one layer of one direction"),
        ("flashrnn", Case("GRUCell", Shape(1, 2, 3, 4)), "one layer of one direction"),
    ],
)
def test_what_they_do_not_have_is_refused(name: str, case: Case, reason: str) -> None:
    with pytest.raises(providers.Refused, match=reason):
        providers.build(name, problem.Problem(case))
