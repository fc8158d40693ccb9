"""The Triton kernels of cells whose products are normalised against the reference, in Triton's
interpreter.

Run by test_triton.py, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import op_calls
import op_parity
import rnnkernels
from op_parity import ALL, NORMED_CASES, Case
from rnnkernels._backends import vetting
from rnnkernels._backends.triton import ROWS, normed, normed_launch
from rnnkernels._backends.triton.plan import Rows
from rnnkernels._core.call import Clip
from rnnkernels.cells import NORMED
from stand_in import GPU, on_gpu
from triton_interpreted import Results, number_of, ops, same

TAKEN = [case for case in NORMED_CASES if not case.R]  # there are no projections
#: Largest errors. Products of float32 are exact enough; the 16-bit types have 8 and 11 bits.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
#: Rows of a program, and units in a block, of which small layers have one or two.
LAYOUTS = (Rows(16, 8, 4), Rows(4, 8, 4), Rows(32, 4, 4))
WIDE = Rows(4, 32, 4)
each_normed = pytest.mark.parametrize("cell", NORMED)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Any:
    """What is read before it was written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


class GpuState:
    """What the layout asks of initial states."""

    dtype, is_cuda, device = torch.float32, True, GPU

    def size(self, dim: int) -> int:
        return (1, 4, 64)[dim]


@contextmanager
def laid_out(layout: Rows) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normed_launch, "layout_of", lambda h0: layout)
        yield


def run(
    case: Case,
    layout: Rows | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    change: Callable[[Any], Any] = lambda call: call,
    given: str = "all",
    backward: Callable[..., list[Tensor]] = op_parity.backward,
) -> Results:
    """Both ops on a case, laid out as a number of it says or as told."""
    if layout is None:
        layout = LAYOUTS[number_of(case) % len(LAYOUTS)] if case.H < 10 else WIDE
    call = change(op_parity.make(case, dtype))
    with laid_out(layout):
        out = op_parity.forward(ops, call)
        grads = op_parity.random_gradients(call, out, given)
        return Results(call, out, grads, backward(ops, call, out, grads))


def each() -> Iterator[Any]:
    """Bounds of single numbers with one cell each; what is `full` has all with both."""
    of_one = {"value": "layer_norm_lstm", "tanh": "layer_norm_gru"}
    for case in TAKEN:
        plain = of_one.get(case.clip.kind, case.cell) == case.cell
        yield pytest.param(case, id=str(case), marks=() if plain else pytest.mark.full)


@pytest.mark.parametrize("case", list(each()))
def test_matches_reference(case: Case) -> None:
    results = run(case)
    assert results.padding_is_zero()
    assert max(results.errors()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("case", "dtype"),
    list(zip(TAKEN[::6], cycle([torch.bfloat16, torch.float16]), strict=False)),
    ids=str,
)
def test_16_bits(case: Case, dtype: torch.dtype) -> None:
    """Gradients are held against those in float64 on the same y, c and saved."""
    results = run(case, dtype=dtype)
    assert results.padding_is_zero()
    assert op_parity.forward_error(results.call, results.out) <= TOLERANCE[dtype]
    given = (results.call, results.out, results.grads)
    exact = [op_parity.converted(t, torch.float64) for t in given]
    want = op_parity.backward(torch.ops.rnnkernels, *exact)
    assert max(map(op_parity.error, results.back, want)) <= TOLERANCE[dtype]


def test_c_is_never_rounded() -> None:
    """Steps of c too small for bfloat16 to add one by one arrive all the same."""
    call = op_parity.make(Case("layer_norm_lstm", T=40, B=2, H=5), torch.bfloat16)
    for t in call.tensors:
        t.zero_()  # the gains among them
    assert call.c0 is not None
    call.c0.fill_(1)
    _, f, g, _ = call.b_ih[0].chunk(4)
    f.fill_(20)  # keeps all
    g.fill_(0.006)  # half of that comes in
    with laid_out(LAYOUTS[0]):
        c_n = op_parity.forward(ops, call, save=False)[2]
    assert (c_n - (1 + 40 * 0.003)).abs().max() < 1 / 128  # unit in the last place


@pytest.mark.parametrize(("cell", "given"), [*((cell, "h_n") for cell in NORMED),
                                             ("layer_norm_lstm", "c_n")])  # fmt: skip
def test_one_gradient_alone(cell: str, given: str) -> None:
    """The others are absent, not zero."""
    results = run(Case(cell, 2, T=3, reset=True), given=given)
    assert max(results.errors()) <= TOLERANCE[torch.float32]


@each_normed
def test_outputs_that_nobody_wants(cell: str) -> None:
    """Without saving, and without gradients of the initial states: the same bits of all else."""
    case = Case(cell, T=3, **ALL)
    kept = run(case, LAYOUTS[0])
    rest = run(
        case,
        LAYOUTS[0],
        backward=lambda ops, call, out, grads: op_calls.backward(
            call, out, grads, ops, initial=False
        ),
    )
    assert rest.back[1].shape == rest.back[2].shape == (0,)
    assert same([rest.back[i] for i in (0, 4, 5)], [kept.back[i] for i in (0, 4, 5)])
    with laid_out(LAYOUTS[0]):
        out = op_parity.forward(ops, kept.call, save=False)
    assert same(out[:4], kept.out[:4])


@pytest.mark.parametrize(
    ("cell", "clip"), list(zip(NORMED, [Clip(), Clip("norm", 0.3)], strict=True))
)
def test_gradients_over_saved(cell: str, clip: Clip) -> None:
    """dgates in the memory of what forward saved: the same bits."""
    case = Case(cell, T=3, clip=clip, **ALL)
    apart = run(case, LAYOUTS[2])
    over = run(case, LAYOUTS[2], backward=op_parity.backward_over_saved)
    assert same(over.back, apart.back)


@each_normed
def test_same_bits_whatever_rows_share_a_program(cell: str) -> None:
    case = Case(cell, T=2, B=5, clip=Clip("norm", 0.3), **ALL)
    assert same(run(case, Rows(2, 8, 4)).all, run(case, Rows(16, 8, 4)).all)


@each_normed
def test_a_large_mean(cell: str) -> None:
    """Beside which the numbers of a product hardly differ: their squares would hide that."""

    def change(call: Any) -> Any:
        exact = op_parity.with_exact_projection(call)
        w_hh = [w[:, :1].sign().abs() * 256 + (w * 64).round() / 64 for w in call.w_hh]
        return exact._replace(w_hh=w_hh, h0=call.h0.sign())

    results = run(Case(cell, T=1, H=16), Rows(16, 4, 4), change=change)
    assert op_parity.forward_error(results.call, results.out) <= TOLERANCE[torch.float32]


@each_normed
def test_padding_is_not_read(cell: str) -> None:
    """NaN in it changes no bit."""
    case = Case(cell, 2, T=3, window=2, **ALL)

    def past(call: Any) -> Tensor:
        return torch.arange(case.T)[:, None] >= call.lengths

    def poisoned(call: Any) -> Any:
        return call._replace(x=call.x.masked_fill(past(call)[..., None], torch.nan))

    def of_poisoned(
        ops: Any, call: Any, out: list[Tensor], grads: list[Tensor | None]
    ) -> list[Tensor]:
        for grad in (grads[0], grads[3]):
            if grad is not None:
                grad[past(call)] = torch.nan
        return op_parity.backward(ops, call, out, grads)

    clean = run(case, LAYOUTS[0])
    dirty = run(case, LAYOUTS[0], change=poisoned, backward=of_poisoned)
    assert clean.padding_is_zero()
    assert same(dirty.all, clean.all)


@each_normed
def test_state_does_not_cross_a_cut(cell: str) -> None:
    """A NaN in the state before a reset does not reach what follows it, nor another row, nor their
    gradients."""

    def poisoned(call: Any) -> Any:
        x = call.x.clone()
        x[1, 0] = torch.nan
        reset = torch.zeros(4, 2, dtype=torch.bool)
        reset[2, 0] = True
        return call._replace(x=x, reset=reset)

    results = run(Case(cell, T=4, B=2), LAYOUTS[0], change=poisoned)
    y, dgates = results.out[0], results.back[0]
    assert y[1, 0].isnan().all() and y[2:].isfinite().all() and y[:, 1].isfinite().all()
    assert dgates[2:].isfinite().all() and dgates[:, 1].isfinite().all()


@pytest.mark.parametrize(
    ("H", "wanted"),
    [(1, Rows(16, 1, 4)), (7, Rows(16, 8, 4)), (64, Rows(4, 64, 4)), (10_240, Rows(1, 256, 4))],
)
def test_layout(H: int, wanted: Rows) -> None:
    assert normed_launch.layout_of(torch.empty(1, 33, H)) == wanted
    assert wanted.programs(33) == -(-33 // wanted.block_b)


LAYERS = [
    (rnnkernels.LSTM, {"bidirectional": True, "truncate": 3, "grad_clip": 0.5}),
    (rnnkernels.GRU, {"num_layers": 2, "recompute": 2, "recurrent_dropout": 0.4}),
]


@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=["LSTM", "GRU"])
def test_layers(kind: Any, options: dict[str, Any]) -> None:
    """With every gain and bias of the norms, as the reference has it; and what is told of it."""

    def pulled(backend: str) -> list[Tensor]:
        torch.manual_seed(0)
        layer = kind(3, 6, layer_norm=True, backend=backend, **options)
        for p in layer.parameters():
            torch.nn.init.normal_(p, std=0.5)
        x = torch.randn(5, 4, 3, requires_grad=True)
        y, _ = layer(x, lengths=[5, 2, 0, 3])
        (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
        grads = [p.grad for p in layer.parameters()]
        assert all(grad is not None for grad in grads)
        return [y, x.grad, *grads]  # type: ignore[list-item]

    got, want = pulled("triton"), pulled("reference")
    assert max(map(op_parity.error, got, want)) <= 2 * TOLERANCE[torch.float32]
    layer = kind(3, 6, layer_norm=True, backend="triton")
    told = str(rnnkernels.explain(layer, torch.zeros(5, 4, 3)))
    assert "a product by torch, then a program per 16 rows" in told


def test_check_on_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases that a GPU runs first; and gradients of gains and biases that are left out."""
    with laid_out(Rows(16, 256, 4)):
        found = vetting.check("triton", ROWS, "float32", torch.device("cpu"))
        assert (found.reason, found.cases) == ("", 2)
        assert 0 < max(found.errors) < 1e-5
        monkeypatch.setattr(normed, "_add", lambda to, *more: None)
        found = vetting.check("triton", ROWS, "float32", torch.device("cpu"))
    at = "layer_norm_gru [T=5, B=18, D=1, H=24, L=1] in float32, backward: dparams is off by "
    assert at in found.reason


def test_refused_on_a_gpu(tmp_path: Path) -> None:
    """What no other kernels stand in for is refused, and the others are not."""
    h0: Any = GpuState()
    with on_gpu(tmp_path, "triton") as kernels:
        assert normed_launch.layout_of(h0) == Rows(4, 64, 4)
        assert set(kernels.ran) == {ROWS}
        kernels.wrong[ROWS] = "dh0", torch.zeros_like
        vetting.renew(GPU)
        with (
            pytest.warns(RuntimeWarning, match="the rows kernels of the triton backend are"),
            pytest.raises(RuntimeError, match="triton: a check on this device refused its rows"),
        ):
            normed_launch.layout_of(h0)
        assert vetting.refusal("triton", GPU, "step") is None
