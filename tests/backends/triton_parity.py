"""The Triton kernels against the reference, in Triton's interpreter: cells, options, layouts.

Run by test_triton.py, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nonfinite
import op_parity
import triton_programs
from op_parity import ALL, CASES, OVER_SAVED, Case
from rnnkernels._backends import vetting
from rnnkernels._backends.triton import launch, sequence
from rnnkernels._backends.triton.plan import Layout
from rnnkernels._core import reference
from rnnkernels._core.call import Clip
from rnnkernels.cells import CELLS
from stand_in import GPU, on_gpu
from triton_interpreted import KINDS, Forced, chosen, laid_out, number_of, ops, run, same

ELMAN = [name for name, cell in CELLS.items() if cell.G == 1]
TAKEN = [case for case in CASES if not case.R]  # there are no projections
#: Largest errors. Products of float32 are exact enough; the 16-bit types have 8 and 11 bits.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
each_kind = pytest.mark.parametrize("kind", KINDS)
#: Each cell on one kind, each kind with a cell at least.
each_cell = pytest.mark.parametrize(("cell", "kind"), list(zip(CELLS, cycle(KINDS), strict=False)))


def in_turn() -> Iterator[Any]:
    """Every case in one of the three ways in which programs depend on each other: the cases of a
    cell take turns, and no two cells begin alike, so that what several of them have, such as a
    window or a bound, meets every way. The Elman cells share all but a function of one number: a
    window has one of them. What is `full` has every case in every way."""
    turns = {cell: cycle([*KINDS[n % 3 :], *KINDS[: n % 3]]) for n, cell in enumerate(CELLS)}
    for case in TAKEN:
        of_another = case.window and case.cell in ELMAN and case.cell != ELMAN[case.window % 3]
        plain = "" if of_another else next(turns[case.cell])
        for kind in KINDS:
            marks = () if kind == plain else pytest.mark.full
            yield pytest.param(case, kind, id=f"{case}-{kind}", marks=marks)


@pytest.mark.parametrize(("case", "kind"), list(in_turn()))
def test_matches_reference(case: Case, kind: str) -> None:
    results = run(case, chosen(case, kind), seed=number_of(case))
    assert results.padding_is_zero()
    assert max(results.errors()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("case", TAKEN[::3], ids=str)
def test_16_bits(case: Case) -> None:
    """Gradients are held against those in float64 on the same y, c and saved."""
    number = number_of(case)
    dtype = (torch.bfloat16, torch.float16)[number // 3 % 2]
    results = run(case, chosen(case, KINDS[number % 3]), dtype, seed=number)
    assert results.padding_is_zero()
    assert op_parity.forward_error(results.call, results.out) <= TOLERANCE[dtype]
    given = (results.call, results.out, results.grads)
    exact = [op_parity.converted(t, torch.float64) for t in given]
    want = op_parity.backward(torch.ops.rnnkernels, *exact)
    assert max(map(op_parity.error, results.back, want)) <= TOLERANCE[dtype]


SIZES = [
    (Case("lstm", 1, T=2, B=1, H=1), Forced("resident")),
    (Case("lstm", 1, T=3, B=17, H=33, **ALL), Forced("resident")),
    (Case("lstm", 1, T=3, B=17, H=33, **ALL), Forced("grid", 16, 16, 32)),
    (Case("gru", 2, T=2, B=17, H=33, **ALL), Forced("step", 16, 16, 8, held=False)),
    (Case("rnn_tanh", 2, T=2, B=17, H=7), Forced("grid", 4, 4, 8, launches=3)),
    (Case("gru", 1, T=4, B=9, H=20, window=2, flow=True), Forced("step", 4, 16, 4, launches=2)),
    (
        Case("lstm", 1, T=4, B=5, H=20, window=2, clip=Clip("norm", 0.3)),
        Forced("grid", 4, launches=2),
    ),
    (Case("rnn_relu", 1, T=3, B=9, H=7, lengths=True), Forced("resident", 4, launches=2)),
]


@each_kind
def test_c_is_never_rounded(kind: str) -> None:
    """Steps of c too small for bfloat16 to add one by one arrive all the same."""
    T = 40

    def change(call: Any) -> Any:
        for t in call.tensors:
            t.zero_()
        call.c0.fill_(1)
        _, f, g, _ = call.b_ih[0].chunk(4)
        f.fill_(20)  # keeps all
        g.fill_(0.006)  # half of that comes in
        return call

    results = run(Case("lstm", T=T, B=2, H=5), Forced(kind), torch.bfloat16, change=change)
    c_n = results.out[2]
    assert (c_n - (1 + T * 0.003)).abs().max() < 1 / 128  # unit in the last place


@pytest.mark.parametrize(("case", "forced"), SIZES, ids=str)
def test_layouts(case: Case, forced: Forced) -> None:
    """Rows, units and pieces of a product that fill no block, and several launches."""
    results = run(case, forced)
    assert results.padding_is_zero()
    assert max(results.errors()) <= TOLERANCE[torch.float32]


OTHERS = [
    Forced("grid", 4, 8, 16),
    Forced("grid", 4, 8, 16, held=False, launches=2),
    Forced("step", 4, 8, 16, launches=2),
    Forced("step", 4, 16, 16, held=False),
    Forced("resident", 16),
]


@pytest.mark.parametrize(
    ("cell", "dtype"),
    [("lstm", torch.float32), ("gru", torch.bfloat16), ("rnn_relu", torch.float16)],
    ids=str,
)
def test_same_bits_in_every_layout(cell: str, dtype: torch.dtype) -> None:
    """As long as products are cut into the same pieces."""
    case = Case(cell, 1, T=3, B=5, H=11, lengths=True, reset=True)
    wanted = run(case, Forced("resident", 4), dtype)
    for layout in OTHERS:
        assert same(run(case, layout, dtype).all, wanted.all), layout


@each_kind
def test_same_bits_each_time(kind: str) -> None:
    case = Case("lstm", 1, T=4, H=11, window=2, clip=Clip("norm", 0.3), **ALL)
    wanted = run(case, Forced(kind))
    assert all(same(run(case, Forced(kind), seed=seed).all, wanted.all) for seed in (0, 1))


@each_kind
def test_a_row_has_the_same_bits_in_any_batch(kind: str) -> None:
    def alone(call: Any) -> Any:
        return op_parity.rows(op_parity.with_exact_projection(call), slice(5, 6))

    case = Case("gru", 1, T=3, B=11, H=20)
    whole = run(case, Forced(kind, 4), change=op_parity.with_exact_projection).out[0]
    assert torch.equal(run(case, Forced(kind, 4), change=alone).out[0], whole[:, 5:6])


@each_cell
def test_without_saving(cell: str, kind: str) -> None:
    case = Case(cell, 2, lengths=True, reset=True)
    kept = run(case, Forced(kind))
    with laid_out(Forced(kind)):
        out = op_parity.forward(ops, kept.call, save=False)
    assert same(out[:4], kept.out[:4])


@each_kind
@pytest.mark.parametrize("cell", OVER_SAVED)
def test_gradients_over_saved(cell: str, kind: str) -> None:
    """dgates in the memory of what forward saved: the same bits."""
    case = Case(cell, 2, T=3, **ALL)
    apart = run(case, Forced(kind))
    over = run(case, Forced(kind), backward=op_parity.backward_over_saved)
    assert same(over.back, apart.back)


@each_cell
def test_padding_is_not_read(cell: str, kind: str) -> None:
    """NaN in it changes no bit."""
    case = Case(cell, 2, T=4, window=3, **ALL)

    def poisoned(call: Any) -> Any:
        past = torch.arange(case.T)[:, None] >= call.lengths
        return call._replace(x=call.x.masked_fill(past[..., None], torch.nan))

    def poison(call: Any, grads: list[Tensor | None]) -> None:
        past = torch.arange(case.T)[:, None] >= call.lengths
        for grad in (grads[0], grads[3]):
            if grad is not None:
                grad[past] = torch.nan

    clean = run(case, Forced(kind))
    assert clean.padding_is_zero()
    dirty = run(case, Forced(kind), change=poisoned, change_gradients=poison)
    assert same(dirty.all, clean.all)


@pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")  # of numpy
@nonfinite.some
def test_nan_and_infinity(case: Case, title: str, pytestconfig: pytest.Config) -> None:
    """They reach what they should, and through what pads units and rows nothing else."""
    turn = KINDS[nonfinite.SOME.index((case, title)) % 3]
    for kind in KINDS if pytestconfig.getoption("full") else (turn,):
        with laid_out(chosen(case, kind)):
            nonfinite.check(ops, case, title)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_goes_on(cell: str) -> None:
    """To the steps that follow and nowhere else, as in the reference."""

    def poisoned(call: Any) -> Any:
        x = call.x.clone()
        x[2, 1, 0] = torch.nan
        return call._replace(x=x)

    results = run(Case(cell, 1), Forced("resident"), change=poisoned)
    wanted = reference.run_layer(results.call)
    nan = wanted[0].isnan()
    assert nan.any()
    assert not nan.all()
    assert torch.equal(results.out[0].isnan(), nan)


@pytest.mark.parametrize(
    ("given", "kind"), [("y", "resident"), ("h_n", "grid"), ("c_n", "step"), ("c", "resident")]
)
def test_one_gradient_alone(given: str, kind: str) -> None:
    """The others are absent, not zero."""
    results = run(Case("lstm", 2, **ALL), Forced(kind), given=given)
    assert max(results.errors()) <= TOLERANCE[torch.float32]


@each_kind
def test_check_on_first_use(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases that a GPU runs first, by each family; and one of them with a fault."""
    monkeypatch.setattr(launch, "device_of", lambda like: ("cuda", 16))
    with triton_programs.at_once():
        found = vetting.check("triton", kind, "float32", torch.device("cpu"))
    assert (found.reason, found.cases) == ("", 1)
    assert 0 < max(found.errors) < 1e-5


def test_check_finds_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that do not wait for each other read what is not there yet."""
    monkeypatch.setattr(launch, "device_of", lambda like: ("cuda", 16))
    monkeypatch.setattr(sequence, "_wait", lambda count, steps, fault, word, patience: patience)
    with triton_programs.at_once():
        found = vetting.check("triton", "grid", "float32", torch.device("cpu"))
    assert "lstm [T=5, B=18, D=1, H=72, L=1] lengths reset in float32, forward: " in found.reason
    assert "Error" not in found.reason  # but a wrong result


def test_check_takes_the_fault_that_it_provokes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that gave up refuses the family; no later call hears of it."""

    def gives_up(count: Any, steps: Any, fault: Any, word: Any, patience: Any) -> Any:
        sequence.tl.store(fault, word)
        return patience

    monkeypatch.setattr(launch, "device_of", lambda like: ("cuda", 16))
    monkeypatch.setattr(sequence, "_wait", gives_up)
    device = torch.device("cpu")
    with triton_programs.at_once():
        found = vetting.check("triton", "grid", "float32", device)
    assert "rnnkernels_triton::sequence_forward" in found.reason and "gave up" in found.reason
    assert launch.take_fault(device) == ""


def test_refused_kinds_make_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to the one that takes everything; with that the backend has nothing left."""
    monkeypatch.setattr(launch, "device_of", lambda like: ("cuda", 16))

    class Weights:
        shape, dtype, is_cuda, device = (1, 64, 16), torch.bfloat16, True, GPU

    with on_gpu(tmp_path, "triton") as kernels, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kind in ("resident", "grid", "step"):
            assert launch.layout_of(Weights(), 18, False, CELLS["lstm"]).kind == kind  # type: ignore[arg-type]
            kernels.wrong[kind] = "dh0", torch.zeros_like
            vetting.renew(GPU)
        with pytest.raises(RuntimeError, match="triton: a check on this device refused its step"):
            launch.layout_of(Weights(), 18, False, CELLS["lstm"])  # type: ignore[arg-type]
        reason = vetting.refusal("triton", GPU)
        assert reason is not None and "dh0 is off" in reason
    assert [str(w.message).split()[2] for w in caught] == [
        "resident", *("resident", "grid"), *("resident", "grid", "step")
    ]  # fmt: skip


def test_layout_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anything forced, a small layer runs resident."""
    found: list[Layout] = []
    choose = launch.choose

    def noted(**sizes: Any) -> Layout:
        found.append(choose(**sizes))
        return found[-1]

    monkeypatch.setattr(launch, "choose", noted)
    call = op_parity.make(Case("gru", 2), torch.float32)
    out = op_parity.forward(ops, call)
    assert op_parity.forward_error(call, out) <= TOLERANCE[torch.float32]
    assert [layout.kind for layout in found] == ["resident"]


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        (Case("lstm", R=3), torch.float32, "no projections"),
        (Case("lstm"), torch.float64, "float64"),
    ],
    ids=["projection", "float64"],
)
def test_refused(case: Case, dtype: torch.dtype, message: str) -> None:
    call = op_parity.make(case, dtype)
    with pytest.raises(NotImplementedError, match=message):
        op_parity.forward(ops, call)
    out = op_parity.forward(torch.ops.rnnkernels, call)
    with pytest.raises(NotImplementedError, match=message):
        op_parity.backward(ops, call, out, op_parity.random_gradients(call, out))


@pytest.mark.parametrize(
    ("tf32", "matmul", "gpu", "wanted"),
    [
        (True, "highest", "cuda", "tf32"),
        (False, "high", "cuda", "tf32x3"),
        (False, "highest", "cuda", "ieee"),
        (True, "highest", "cdna", "tf32"),
        (False, "high", "cdna", "ieee"),
        (True, "high", "rdna", "ieee"),
    ],
)
def test_precision(
    tf32: bool, matmul: str, gpu: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        assert launch.precision(torch.float32, gpu) == wanted
        assert launch.precision(torch.bfloat16, gpu) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
