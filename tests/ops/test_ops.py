"""The compiled ops against the reference: results, gradients, the contract with torch, threads."""

from __future__ import annotations

import ctypes
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import op_parity
from cases import NAMES, assert_equals_reference, both, make_call, random_like
from helpers import same_bits
from op_calls import backward, backward_arguments, forward, forward_arguments, run
from rnnkernels._core import reference
from rnnkernels.cells import CELLS

kernels = torch.ops.rnnkernels


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"D": 2},
    "lengths": {"D": 2, "lengths": [5, 0, 2]},
    "reset": {"D": 2, "reset": True},
    "lengths-reset": {"D": 2, "lengths": [3, 5, 0], "reset": True},
    "single-bias": {"bias": "single"},
    "no-bias": {"D": 2, "bias": "none", "lengths": True},
    "projection": {"D": 2, "proj": 3, "H": 5, "lengths": [2, 0, 5], "reset": True},
    "projection-plain": {"proj": 18, "H": 33, "B": 9},
    "all-c": {"D": 2, "all_states": True, "lengths": [1, 5, 4], "reset": True},
}
#: Cells with every option they take; a projection and c need a cell with a c.
OPTION_CASES = [
    pytest.param(cell, options, id=f"{cell}-{name}")
    for cell in NAMES
    for name, options in OPTIONS.items()
    if CELLS[cell].S > 1 or not name.startswith(("projection", "all-c"))
]


@pytest.mark.parametrize(("cell", "options"), OPTION_CASES)
def test_equals_reference(cell: str, options: dict[str, Any]) -> None:
    assert_equals_reference(make_call(cell, **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", op_parity.DROPPED, ids=str)
def test_recurrent_dropout(case: op_parity.Case, dtype: torch.dtype) -> None:
    """All outputs and gradients of both ops, whose products take another h than cells do."""
    call = op_parity.make(case, dtype)
    out = op_parity.forward(kernels, call)
    grads = op_parity.random_gradients(call, out)
    back = op_parity.backward(kernels, call, out, grads)
    bound = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 0.1)
    assert op_parity.forward_error(call, out) < bound
    assert op_parity.backward_error(call, out, back, grads) < bound
    assert op_parity.padding_is_zero(call, [out[0], back[0]])


@pytest.mark.parametrize("case", op_parity.DROPPED, ids=str)
def test_gradients_of_masked_states(case: op_parity.Case) -> None:
    """By the autograd formula, whose product for dW_hh takes the masked h."""
    call = op_parity.make(case, torch.float64)._replace(flow=None)
    for t in call.tensors:
        t.requires_grad_()
    assert_equals_reference(call)


#: T, B, inputs, H
SIZES = [
    (0, 3, 4, 5),
    (4, 0, 4, 5),
    (0, 0, 1, 1),
    (1, 1, 1, 1),
    (3, 2, 1, 8),
    (2, 17, 3, 19),
    (7, 4, 5, 16),
    (3, 5, 9, 33),
    (2, 8, 4, 64),
    (5, 13, 2, 31),
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
@pytest.mark.parametrize("cell", NAMES)
def test_sizes(cell: str, sizes: tuple[int, int, int, int]) -> None:
    assert_equals_reference(make_call(cell, *sizes, D=2, lengths=True, reset=True))


@pytest.mark.parametrize("B", range(1, 18))
def test_every_batch_size(B: int) -> None:
    """Register tiles of every height, with and without a rest."""
    assert_equals_reference(make_call("lstm", T=3, B=B, H=9, proj=7, lengths=True))
    assert_equals_reference(make_call("gru", T=3, B=B, H=9))


TOLERANCES = {
    torch.float32: (2e-5, 2e-5),
    torch.float64: (1e-9, 1e-11),
    torch.bfloat16: (5e-2, 5e-2),
    torch.float16: (7e-3, 7e-3),
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("cell", NAMES)
def test_dtypes(cell: str, dtype: torch.dtype) -> None:
    """Storage in each dtype, with arithmetic in float32 or float64.

    With this seed no unit of a relu lies so near zero that rounding moves it to the other side.
    """
    rtol, atol = TOLERANCES[dtype]
    for D, H in ((1, 21), (2, 5)):
        options: dict[str, Any] = {"lengths": True, "reset": True, "dtype": dtype, "seed": 1}
        call = make_call(cell, T=4, B=6, H=H, D=D, **options)
        assert_equals_reference(call, rtol=rtol, atol=atol)
    if CELLS[cell].S > 1:
        call = make_call(cell, T=4, B=6, H=21, proj=10, D=2, lengths=True, dtype=dtype)
        assert_equals_reference(call, rtol=rtol, atol=atol)


USED = [u for u in itertools.product([True, False], repeat=4) if any(u)]


@pytest.mark.parametrize(
    "used",
    USED,
    ids=lambda u: "-".join(n for n, use in zip(("y", "h_n", "c_n", "c"), u, strict=True) if use),
)
def test_any_results_in_the_loss(used: tuple[bool, ...]) -> None:
    """Each of dy, dh_n, dc_n and dc may be missing."""
    assert_equals_reference(make_call(D=2, all_states=True, lengths=[5, 0, 3], reset=True), used)
    if used[0] or used[1]:
        assert_equals_reference(make_call("gru", D=2, lengths=[5, 0, 3]), used[:2])
        assert_equals_reference(make_call(H=5, proj=2, all_states=True, reset=True), used)


@pytest.mark.parametrize("cell", NAMES)
def test_no_gradient_at_all(cell: str) -> None:
    """Without dy, dh_n, dc_n and dc every gradient is zero."""
    call = make_call(cell, D=2, lengths=[5, 0, 3], grad=False)
    out = forward(call)
    for t in backward(call, out, [None] * 4):
        assert torch.equal(t, torch.zeros_like(t))


@pytest.mark.parametrize("part", ["x", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "h0", "c0"])
def test_one_part_asks_for_its_gradient(part: str) -> None:
    """Only one kind of input needs a gradient; it is the one that it gets among all."""
    call = make_call(D=2, H=5, proj=3, lengths=[5, 0, 3], reset=True)
    every = torch.autograd.grad(run(call).y.sum(), call.tensors)
    want = {id(t): g for t, g in zip(call.tensors, every, strict=True)}
    chosen = getattr(call, part)
    chosen = chosen if isinstance(chosen, list) else [chosen]
    expected = [want[id(t)] for t in chosen]
    for t in call.tensors:
        t.requires_grad_(any(t is c for c in chosen))
    for got, e in zip(torch.autograd.grad(run(call).y.sum(), chosen), expected, strict=True):
        torch.testing.assert_close(got, e)


@pytest.mark.parametrize("cell", NAMES)
def test_without_save(cell: str) -> None:
    """save=False gives the same results and keeps nothing, unless a gradient may be asked for."""
    call = make_call(cell, D=2)
    kept = forward(call)
    with torch.no_grad():
        bare = forward(call, save=False)
    assert same_bits(kept[:3], bare[:3])
    assert all(t.numel() == 0 for t in bare[3:])
    asked = forward(call, save=False)
    assert same_bits(kept, asked)
    gradients = [torch.autograd.grad(out[0].sum(), call.tensors) for out in (kept, asked)]
    assert same_bits(*gradients)


def test_strided_arguments() -> None:
    """Transposed, expanded and sliced tensors give what their contiguous copies give."""
    call = make_call(T=4, B=6, H=6, inputs=6, D=2, lengths=True, reset=True, grad=False)
    h = torch.randn(6, dtype=torch.float64)
    assert call.c0 is not None and call.lengths is not None and call.reset is not None
    strided = call._replace(
        x=call.x.transpose(0, 1).contiguous().transpose(0, 1),
        w_ih=[w.t().contiguous().t() for w in call.w_ih],
        w_hh=[torch.stack([w, w], -1)[..., 0] for w in call.w_hh],
        b_hh=[torch.stack([b, b], -1)[..., 1] for b in call.b_hh],
        h0=h.expand(2, 6, 6),
        c0=call.c0.transpose(0, 2).contiguous().transpose(0, 2),
        lengths=torch.stack([call.lengths] * 2, 1)[:, 0],
        reset=call.reset.t().contiguous().t(),
    )
    plain = call._replace(h0=h.repeat(2, 6, 1))
    for got, want in zip(both(strided), both(plain), strict=True):
        torch.testing.assert_close(got, want)


OPCHECKS = [
    pytest.param("lstm", {"D": 2, "lengths": [5, 0, 2], "reset": True}, id="lstm"),
    pytest.param("lstm", {"proj": 3, "all_states": True}, id="lstm-projection-all-c"),
    pytest.param("gru", {"D": 2, "reset": True, "bias": "single"}, id="gru"),
    pytest.param("rnn_tanh", {"bias": "none", "lengths": [1, 2, 5]}, id="rnn_tanh"),
]


@pytest.mark.parametrize(("cell", "options"), OPCHECKS)
def test_opcheck_forward(cell: str, options: dict[str, Any]) -> None:
    call = make_call(cell, **options)
    torch.library.opcheck(kernels.sequence_forward.default, tuple(forward_arguments(call)))
    bare = make_call(cell, **options, grad=False)
    torch.library.opcheck(
        kernels.sequence_forward.default, tuple(forward_arguments(bare, save=False))
    )


@pytest.mark.parametrize(("cell", "options"), OPCHECKS)
def test_opcheck_backward(cell: str, options: dict[str, Any]) -> None:
    call = make_call(cell, **options, grad=False)
    outs = forward(call)
    dy, dh_n, dc_n, _ = random_like(outs[:4])
    for douts in ([dy, dh_n, dc_n, None], [None, dh_n, None, None]):
        if call.c0 is None:
            douts[2] = None
        arguments = backward_arguments(call, outs, douts)
        torch.library.opcheck(kernels.sequence_backward.default, tuple(arguments))


#: Big enough that every split of rows and units over threads is taken.
THREADED = [
    pytest.param({"B": 1, "H": 200, "D": 2}, id="units"),
    pytest.param({"B": 17, "H": 40, "D": 1}, id="rows"),
    pytest.param({"B": 19, "H": 130, "D": 2, "lengths": True, "reset": True}, id="both"),
]


@pytest.mark.parametrize("options", THREADED)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu", "projected"])
def test_threads_change_no_bit(cell: str, options: dict[str, Any]) -> None:
    """Any number of threads, and any run, gives the same bits, forward and backward."""
    extra: dict[str, Any] = {"proj": 24} if cell == "projected" else {}
    name = "lstm" if cell == "projected" else cell
    call = make_call(name, T=4, inputs=8, dtype=torch.float32, grad=False, **options, **extra)
    torch.set_num_threads(1)
    first = both(call)
    for threads in (1, 2, 3, 4, 7):
        torch.set_num_threads(threads)
        assert same_bits(both(call), first), f"{threads} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", NAMES)
def test_a_row_does_not_depend_on_its_batch(cell: str, dtype: torch.dtype) -> None:
    """A row has the same bits alone and among 16 others: the kernels project the input too."""
    batch = make_call(cell, T=5, B=17, inputs=19, H=37, D=2, reset=True, dtype=dtype, grad=False)
    together = both(batch)
    outs = together[:6]
    douts = random_like(outs[:4])
    for b in (0, 7, 16):
        row = slice(b, b + 1)
        alone = batch._replace(
            x=batch.x[:, row],
            h0=batch.h0[:, row],
            c0=None if batch.c0 is None else batch.c0[:, row],
            reset=None if batch.reset is None else batch.reset[:, row],
        )
        one = forward(alone)
        mine = [d[:, row] if d.numel() else None for d in douts]
        single = [*one, *backward(alone, one, mine)]
        assert same_bits([t[:, row] if t.numel() else t for t in together], single)


def test_concurrent_callers() -> None:
    """Several Python threads at once, each with its own call."""
    calls = [make_call(NAMES[i % len(NAMES)], T=9, B=5, H=40, D=2, seed=i) for i in range(8)]
    alone = [both(call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            together = list(pool.map(both, calls))
            assert all(same_bits(a, t) for a, t in zip(alone, together, strict=True))


def test_inside_a_parallel_region() -> None:
    """Called by the threads of a parallel region, as from ``at::parallel_for``, each runs alone."""
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libgomp" in line}
    if len(paths) != 1:
        pytest.skip("needs torch and the kernels on the same OpenMP of GCC")
    call = make_call("lstm", T=5, B=8, H=130, dtype=torch.float32, grad=False)
    want, found, lock = both(call), [], threading.Lock()

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_: int) -> None:
        outs = both(call)
        with lock:
            found.append(outs)

    ctypes.CDLL(paths.pop()).GOMP_parallel(body, None, 3, 0)
    assert len(found) == 3
    assert all(same_bits(outs, want) for outs in found)


def test_reference_is_what_the_layer_computes() -> None:
    """The judge itself against ``torch.nn.LSTM`` with projection, in both directions."""
    call = make_call(D=2, H=5, proj=3, grad=False)
    lstm = torch.nn.LSTM(4, 5, bidirectional=True, proj_size=3, dtype=torch.float64)
    with torch.no_grad():
        for d, suffix in enumerate(("", "_reverse")):
            for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr"):
                full = name.replace("w_", "weight_").replace("b_", "bias_")
                getattr(lstm, f"{full}_l0{suffix}").copy_(getattr(call, name)[d])
    y, (h_n, c_n) = lstm(call.x, (call.h0, call.c0))
    got = reference.run_layer(call)
    for ours, theirs in ((got.y, y), (got.h_n, h_n), (got.c_n, c_n)):
        torch.testing.assert_close(ours, theirs)
