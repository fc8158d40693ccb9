"""The loops and kernel bodies of the CUDA backend, compiled for the CPU and run there."""

from __future__ import annotations

import pytest
import torch

import nonfinite
import on_host
import op_calls
import op_parity
from op_parity import CASES, DROPPED, HEADED, NORMED_CASES, Case
from rnnkernels._core.call import Clip
from rnnkernels.cells import NORMED


@pytest.fixture(scope="session")
def ops():
    return on_host.load()


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """What is read before it was written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", [*CASES, *DROPPED, *HEADED, *NORMED_CASES], ids=str)
def test_matches_reference(ops, case, dtype, tolerance):
    call = op_parity.make(case, dtype)
    out = op_parity.forward(ops, call)
    assert op_parity.forward_error(call, out) <= tolerance
    for given in ("all", "y", "h_n", "c_n", "c") if call.c0 is not None else ("all", "y", "h_n"):
        grads = op_parity.random_gradients(call, out, given)
        back = op_parity.backward(ops, call, out, grads)
        assert op_parity.backward_error(call, out, back, grads) <= tolerance
        assert op_parity.padding_is_zero(call, [out[0], *out[3:], back[0], *back[3:5]])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("case", [*CASES, *HEADED, *NORMED_CASES], ids=str)
def test_storage_of_16_bits(ops, case, dtype, tolerance):
    """Backward is held against itself in float64 on the same y, c and saved values."""
    call = op_parity.make(case, dtype)
    out = op_parity.forward(ops, call)
    assert op_parity.forward_error(call, out) <= tolerance
    grads = op_parity.random_gradients(call, out)
    exact = [op_parity.converted(t, torch.float64) for t in (call, out, grads)]
    got, want = op_parity.backward(ops, call, out, grads), op_parity.backward(ops, *exact)
    assert max(map(op_parity.error, got, want)) <= tolerance


def test_c_is_carried_in_float32(ops):
    """Many small steps that would all be lost in a bfloat16 c near 1."""
    case = Case("lstm", T=64, B=1, H=1, I=1, bias=False)
    call = op_parity.make(case, torch.bfloat16)
    for t in (call.x, *call.w_ih, *call.w_hh, call.h0):
        t.zero_()
    call.x.fill_(1)
    call.w_ih[0][:, 0] = torch.tensor([-7.0, 12.0, 7.0, 0.0])  # c grows by sigmoid(-7) a step
    call.c0.fill_(1)
    c_n = op_parity.forward(ops, call)[2]
    assert c_n.item() == pytest.approx(1 + 64 * torch.tensor(-7.0).sigmoid().item(), rel=1e-2)


@pytest.mark.parametrize("case", [*CASES, *NORMED_CASES], ids=str)
def test_without_saving(ops, case):
    """The same results, and nothing kept but what was asked for."""
    call = op_parity.make(case, torch.float64)
    kept = op_parity.forward(ops, call)
    for all_states in (True, False) if call.c0 is not None else (False,):
        out = op_parity.forward(ops, call._replace(all_states=all_states), save=False)
        wanted = [*kept[:3], kept[3] if all_states else kept[3].new_empty(0)]
        assert all(torch.equal(a, b) for a, b in zip(out[:4], wanted, strict=True))
        assert out[4].shape == out[5].shape == (0,)


@pytest.mark.parametrize("case", [*CASES, *NORMED_CASES], ids=str)
def test_matches_cpu_backend(ops, case):
    """Every output of both ops, also what only backward reads."""
    pytest.importorskip("rnnkernels._C")
    call = op_parity.make(case, torch.float64)
    out, want = (op_parity.forward(o, call) for o in (ops, torch.ops.rnnkernels))
    assert max(map(op_parity.error, out, want)) <= 1e-12
    grads = op_parity.random_gradients(call, out)
    back, want = (op_parity.backward(o, call, out, grads) for o in (ops, torch.ops.rnnkernels))
    assert max(map(op_parity.error, back, want)) <= 1e-12


@pytest.mark.parametrize("case", [c for c in CASES if c.cell in op_parity.OVER_SAVED], ids=str)
def test_gates_written_over_saved_values(ops, case):
    """The same bits as in memory of their own."""
    call = op_parity.make(case, torch.float32)
    out = op_parity.forward(ops, call)
    grads = op_parity.random_gradients(call, out)
    want = op_parity.backward(ops, call, out, grads)
    got = op_parity.backward_over_saved(ops, call, out, grads)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("case", [*CASES, *NORMED_CASES], ids=str)
def test_gradients_of_initial_states_that_nobody_wants(ops, case):
    call = op_parity.make(case, torch.float64)
    out = op_parity.forward(ops, call)
    grads = op_parity.random_gradients(call, out)
    want, got = (
        op_calls.backward(call, out, grads, ops, initial=initial) for initial in (True, False)
    )
    assert got[1].shape == got[2].shape == (0,)
    assert all(torch.equal(got[i], want[i]) for i in (0, 3, 4))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_norms_of_any_size(ops, scale):
    """Squares of these gradients are no numbers of float32; gradients grow as the loss does."""
    bound = 0.3
    case = Case("gru", 2, window=2, clip=Clip("norm", bound), **op_parity.ALL)
    call = op_parity.make(case, torch.float32)
    out = op_parity.forward(ops, call)
    grads = op_parity.random_gradients(call, out)
    want = op_parity.backward(ops, call, out, grads)
    grads = [g if g is None else g * scale for g in grads]
    got = op_parity.backward(ops, call._replace(clip=Clip("norm", bound * scale)), out, grads)
    assert max(op_parity.error(g / scale, w) for g, w in zip(got, want, strict=True)) < 1e-5


@pytest.mark.parametrize("clip", [Clip(), *op_parity.CLIPS], ids=lambda c: c.kind)
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("cell", ["lstm", "layer_norm_lstm"])
def test_nan_stays_in_its_row(ops, cell, window, clip):
    case = Case(cell, 2, T=6, R=3, window=window, clip=clip, **op_parity.ALL)
    call = op_parity.make(case, torch.float64)._replace(reset=None)
    out = op_parity.forward(ops, call)
    grads = op_parity.random_gradients(call, out)
    want = op_parity.backward(ops, call, out, grads)
    assert call.lengths[2] == 6
    grads[0][3, 2] = torch.nan
    got = op_parity.backward(ops, call, out, grads)
    others = torch.tensor([0, 1, 3])
    for places in zip(got[:5], want[:5], strict=True):
        assert torch.equal(*(t[:, others] for t in places))
    for sums in zip(got[5:], want[5:], strict=True):  # of the parameters, by rows of windows
        assert torch.equal(*(t.unflatten(0, (-1, 4))[:, others] for t in sums))
    of_row = got[0][:, 2].isnan().flatten(1).any(1)
    assert of_row.tolist() == [not window, not window, True, True, not window, not window]


@nonfinite.some
def test_nan_and_infinity(ops, case, title):
    nonfinite.check(ops, case, title, torch.float32)
    nonfinite.check(ops, case, title, torch.float64)


@pytest.mark.parametrize("cell", ["gru", *NORMED])
def test_state_does_not_cross_a_cut(ops, cell):
    """A NaN in the state before a reset does not reach what follows it, nor its gradients."""
    call = op_parity.make(Case(cell, T=4, B=1), torch.float64)
    call = call._replace(reset=torch.tensor([[False], [False], [True], [False]]))
    call.x[1] = torch.nan
    out = op_parity.forward(ops, call)
    assert out[0][1].isnan().all()
    assert out[0][2:].isfinite().all()
    back = op_parity.backward(ops, call, out, op_parity.random_gradients(call, out))
    assert back[0][2:].isfinite().all()
