"""Layers of bfloat16 on the CPU: their products by instructions for bfloat16, of tiles (AMX) or of
pairs (AVX512-BF16), and without such."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkernels
from helpers import bfloat16_instructions, require_backend, run_python
from op_parity import (
    CLIPS,
    Case,
    backward,
    backward_error,
    forward,
    forward_error,
    make,
    random_gradients,
)
from rnnkernels.cells import CELLS
from rnnkernels.testing import RTOL, assert_close

kernels = torch.ops.rnnkernels
LIMIT = RTOL[torch.bfloat16]
ALL: dict[str, Any] = {"lengths": True, "reset": True, "flow": True}
#: Rows that tiles of 16 do not divide; odd K; a K that is split; every option.
CASES = [
    *(Case(cell, D=2, B=B, H=37, I=33) for cell in CELLS for B in (1, 16, 35)),
    *(Case(cell, T=3, B=B, H=300, I=270) for cell in ("lstm", "gru") for B in (32, 37)),
    *(Case(cell, B=35, H=33, window=2, clip=clip, **ALL) for cell in CELLS for clip in CLIPS),
    *(Case("lstm", D=2, B=B, H=37, R=R, clip=CLIPS[1], **ALL) for B, R in ((17, 35), (3, 70))),
]


@pytest.fixture(autouse=True)
def _kernels() -> None:
    require_backend("cpu")


def results(case: Case) -> list[Tensor]:
    call = make(case, torch.bfloat16)
    out = forward(kernels, call)
    return [*out, *backward(kernels, call, out, random_gradients(call, out))]


@pytest.mark.skipif(
    "RNNKERNELS_CPU_CAPABILITY" in os.environ, reason="an instruction set is asked for"
)
def test_the_best_instructions_are_used() -> None:
    known = bfloat16_instructions()
    used = rnnkernels.build_info()["cpu_capability"]
    assert used == known[-1] if known else used not in ("avx512_bf16", "amx")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case) -> None:
    call = make(case, torch.bfloat16)
    out = forward(kernels, call)
    grads = random_gradients(call, out)
    assert forward_error(call, out) < LIMIT
    if case.cell != "rnn_relu":  # the kink falls on either side of a rounding
        assert backward_error(call, out, backward(kernels, call, out, grads), grads) < LIMIT


#: Where this file is, and what it imports.
PLACES = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]


def test_without_such_instructions(tmp_path: Path) -> None:
    """Another instruction set gives the same numbers but for roundings, and not the same bits."""
    if rnnkernels.build_info()["cpu_capability"] not in bfloat16_instructions():
        pytest.skip("this process uses no instructions for bfloat16")
    cases = [case for case in CASES if case.cell != "rnn_relu"]
    code = (
        f"import sys; sys.path[:0] = {PLACES}\n"
        "import torch, rnnkernels, test_bfloat16 as t\n"
        f"assert rnnkernels.__file__ == {rnnkernels.__file__!r}\n"
        "assert rnnkernels.build_info()['cpu_capability'] == 'avx512'\n"
        "cases = [case for case in t.CASES if case.cell != 'rnn_relu']\n"
        f"torch.save([t.results(case) for case in cases], {str(tmp_path / 'other')!r})\n"
    )
    child = run_python("-c", code, RNNKERNELS_CPU_CAPABILITY="avx512")
    assert child.returncode == 0, child.stderr
    for case, other in zip(cases, torch.load(tmp_path / "other"), strict=True):
        ours = results(case)
        assert_close(ours, other, name=str(case), rtol=LIMIT)
        assert not torch.equal(ours[0], other[0]), case


#: With these, each step moves the state by less than half of what bfloat16 could show.
SLOW = {"lstm": (-7.0, 8.0, 8.0, 8.0), "gru": (8.0, 8.0, 3.0)}


@pytest.mark.parametrize("cell", SLOW)
def test_the_state_is_not_rounded(cell: str) -> None:
    call = make(Case(cell, T=800, B=2, H=16, I=1), torch.bfloat16)
    for t in call.tensors:
        t.zero_()
    call.b_ih[0].view(-1, 16).copy_(torch.tensor(SLOW[cell])[:, None])
    out = forward(kernels, call)
    assert out[0][-1].min() > 0.2
    assert forward_error(call, out) < 2**-8


def test_what_pads_a_state_stays_zero() -> None:
    """Infinity times the zeros that pad the weights would make it, and then all units, NaN."""
    call = make(Case("rnn_relu", T=4, B=3, H=17, bias=False), torch.bfloat16)
    call.w_ih[0].zero_()
    call.w_hh[0].fill_(2**-5)
    call.h0.fill_(1)
    call.h0[0, 1, 2] = torch.inf
    y = forward(kernels, call)[0]
    assert (y[:, 1] == torch.inf).all()
    assert y[:, [0, 2]].isfinite().all()
