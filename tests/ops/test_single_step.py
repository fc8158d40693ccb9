"""A sequence of one step, which runs without packed weights, and gradients that nobody wants."""

from __future__ import annotations

import pytest
import torch

import op_calls
import op_parity
from cases import NAMES, assert_equals_reference, both, make_call
from op_calls import forward
from op_parity import CASES, DROPPED, OVER_SAVED, Case
from rnnkernels import _ops

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)

kernels = torch.ops.rnnkernels


@pytest.mark.parametrize("bias", ["double", "single", "none"])
@pytest.mark.parametrize("B", [1, 2, 5])
@pytest.mark.parametrize("cell", NAMES)
def test_equals_reference(cell: str, B: int, bias: str) -> None:
    """Whole vectors, parts of one, and both, of units and of inputs."""
    for inputs, H in ((1, 1), (3, 7), (8, 16), (19, 33), (70, 130)):
        assert_equals_reference(make_call(cell, T=1, B=B, inputs=inputs, H=H, bias=bias))


@pytest.mark.parametrize("used", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_any_results_in_the_loss(used: tuple[bool, ...]) -> None:
    for B in (1, 3):
        assert_equals_reference(make_call("lstm", T=1, B=B, H=20, all_states=True), used)
        if used[0] or used[1]:
            assert_equals_reference(make_call("gru", T=1, B=B, H=20), used[:2])


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("cell", NAMES)
def test_float32(cell: str, B: int) -> None:
    """With this seed no unit of a relu lies so near zero that rounding moves it across."""
    call = make_call(cell, T=1, B=B, inputs=50, H=70, dtype=torch.float32, seed=1)
    assert_equals_reference(call, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", NAMES)
def test_one_row_of_16_bits_is_added_in_float32(cell: str, dtype: torch.dtype) -> None:
    """The step is the one in float32 of the same numbers, rounded once when it is stored."""
    call = make_call(cell, T=1, B=1, inputs=300, H=37, dtype=dtype, grad=False)
    wide = call._replace(
        x=call.x.float(),
        **{n: [t.float() for t in getattr(call, n)] for n in ("w_ih", "w_hh", "b_ih", "b_hh")},
        h0=call.h0.float(),
        c0=None if call.c0 is None else call.c0.float(),
    )
    got, want = (forward(c) for c in (call, wide))
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w.to(dtype))


def test_strided_arguments() -> None:
    for B in (1, 4):
        call = make_call("gru", T=1, B=B, H=6, inputs=6, grad=False)
        strided = call._replace(
            x=torch.stack([call.x, call.x], -1)[..., 0],
            w_ih=[w.t().contiguous().t() for w in call.w_ih],
            w_hh=[torch.stack([w, w], -1)[..., 1] for w in call.w_hh],
            b_hh=[torch.stack([b, b], -1)[..., 1] for b in call.b_hh],
            h0=call.h0.transpose(1, 2).contiguous().transpose(1, 2),
        )
        for got, want in zip(both(strided), both(call), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cell", NAMES)
def test_threads_change_no_bit_of_a_row(cell: str) -> None:
    call = make_call(cell, T=1, B=1, inputs=500, H=420, dtype=torch.float32, grad=False)
    torch.set_num_threads(1)
    first = both(call)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(both(call), first, strict=True))


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("cell", OVER_SAVED)
def test_gates_written_over_saved_values(cell: str, B: int) -> None:
    call = op_parity.make(Case(cell, T=1, B=B, H=37), torch.float32)
    out = op_parity.forward(kernels, call)
    grads = op_parity.random_gradients(call, out)
    want = op_parity.backward(kernels, call, out, grads)
    got = op_parity.backward_over_saved(kernels, call, out, grads)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "case", [*CASES, *DROPPED, *(Case(cell, T=1, B=B) for cell in NAMES for B in (1, 3))], ids=str
)
def test_gradients_of_initial_states_that_nobody_wants(case: Case) -> None:
    """They are left out, and nothing else changes."""
    call = op_parity.make(case, torch.float64)
    out = op_parity.forward(kernels, call)
    grads = op_parity.random_gradients(call, out)
    want, got = (op_calls.backward(call, out, grads, initial=initial) for initial in (True, False))
    dgates, dh0, dc0, dproj, flow = got
    assert dh0.shape == dc0.shape == (0,)
    for one, full in ((dgates, want[0]), (dproj, want[3]), (flow, want[4])):
        assert torch.equal(one, full)
