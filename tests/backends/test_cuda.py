"""The sequence ops on a GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
import torch

import cells_in_one
import gpu_layouts
import noise
import op_parity
import stack_parity
import written_cells
from gpu_layouts import LAID, Laid
from op_parity import ALL, CASES, CLIPS, DROPPED, HEADED, NORMED_CASES, Case
from rnnkernels import verification
from rnnkernels._backends import cuda_plan, triton

if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch can use", allow_module_level=True)
_C = pytest.importorskip("rnnkernels._C", reason="needs the compiled extension")
CUDA = _C.build_info()["cuda_archs"] is not None

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LARGE = [
    *(Case(cell, 2, T=12, B=17, H=130, I=65, lengths=True, reset=True) for cell in ("lstm", "gru")),
    Case("lstm", 2, T=12, B=17, H=130, R=70, I=65, lengths=True, reset=True),
    Case("gru", 2, T=2, B=140_000, H=2, I=1),  # more rows than one grid covers
    Case("gru", 2, T=3, B=47_000, H=2, I=1, window=1, flow=True),  # once more, of windows
    *(Case("lstm", 2, T=12, B=17, H=130, R=70, I=65, window=5, clip=clip, **ALL) for clip in CLIPS),
    *(Case("gru", 2, T=12, B=17, H=130, I=65, window=5, clip=clip, **ALL) for clip in CLIPS),
]
LARGE_NORMED = [
    Case("layer_norm_lstm", 2, T=12, B=17, H=130, R=70, window=5, clip=CLIPS[1], **ALL),
    Case("layer_norm_gru", 2, T=12, B=17, H=130, lengths=True, reset=True),
    Case("layer_norm_gru", 2, T=2, B=140_000, H=2),  # more rows than one grid covers
]
#: Compiled by nvcc where they are first met, or by Triton.
WRITTEN = [
    Case(cell.name, 2, window=2, **ALL)
    for cell in (*cells_in_one.BROUGHT, written_cells.crowd, noise.ZONED_NOISY)
]
FULL = Case("lstm", 2, T=9, B=6, H=33, R=20, lengths=True, reset=True)
each_dtype = pytest.mark.parametrize(
    "dtype", TOLERANCE, ids=lambda t: str(t).removeprefix("torch.")
)


def replayed(both, call):
    """What a captured graph of `both` gives after the inputs of the call have changed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the libraries' first call may not be captured
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    call.x.mul_(-0.5)
    call.lengths.sub_(1).clamp_(min=0)
    call.reset.logical_not_()
    graph.replay()
    return captured


def run(ops, call):
    """What both ops return for this call and fixed gradients."""
    out = op_parity.forward(ops, call)
    return [*out, *op_parity.backward(ops, call, out, op_parity.random_gradients(call, out))]


@pytest.fixture(autouse=True)
def unchecked():
    """Kernels are seen as they are: none is replaced by another that a check has found right."""
    with verification(False):
        yield


@pytest.fixture(autouse=True)
def full_precision():
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.fixture(params=["stepwise", "cluster", "grid", "triton"])
def ops(request):
    """The ops, on Triton or with one family of CUDA kernels; what that cannot run goes step by
    step, as without a choice."""
    if request.param == "triton":
        if not triton.INSTALLED:
            pytest.skip("needs Triton")
        case, dtype = (request.node.callspec.params.get(name) for name in ("case", "dtype"))
        if dtype == torch.float64 or (case is not None and case.R):
            pytest.skip("Triton's kernels take neither float64 nor a projection")
        yield torch.ops.rnnkernels_triton
        return
    if not CUDA:
        pytest.skip("needs an extension built with its CUDA kernels")
    _C.set_cuda_family(request.param)
    yield torch.ops.rnnkernels
    _C.set_cuda_family("auto")


@pytest.fixture
def full(ops):
    """All options, as far as these ops have them."""
    return replace(FULL, R=0) if ops is torch.ops.rnnkernels_triton else FULL


@each_dtype
@pytest.mark.parametrize(
    "case", [*CASES, *LARGE, *DROPPED, *HEADED, *NORMED_CASES, *LARGE_NORMED, *WRITTEN], ids=str
)
def test_matches_reference(ops, case, dtype):
    """Gradients of 16 bits are held against the CPU's in float64 on the same y, c and saved."""
    call = op_parity.make(case, dtype, "cuda")
    call = noise.drawing(call) if call.cell.noise else call
    out = op_parity.forward(ops, call)
    assert op_parity.forward_error(call, out) <= TOLERANCE[dtype]
    grads = op_parity.random_gradients(call, out)
    back = op_parity.backward(ops, call, out, grads)
    assert op_parity.padding_is_zero(call, [out[0], *out[3:], back[0], *back[3:5]])
    if dtype.itemsize > 2:
        assert op_parity.backward_error(call, out, back, grads) <= TOLERANCE[dtype]
    else:
        exact = [op_parity.converted(t, torch.float64, "cpu") for t in (call, out, grads)]
        want = op_parity.backward(torch.ops.rnnkernels, *exact)
        assert max(map(op_parity.error, back, want)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("case", [case for case in [*CASES, *LARGE] if not case.R], ids=str)
def test_tf32(ops, case):
    torch.backends.cudnn.allow_tf32 = True
    call = op_parity.make(case, torch.float32, "cuda")
    out = op_parity.forward(ops, call)
    assert op_parity.forward_error(call, out) <= 2e-3
    grads = op_parity.random_gradients(call, out)
    back = op_parity.backward(ops, call, out, grads)
    assert op_parity.backward_error(call, out, back, grads) <= 2e-3


@pytest.fixture(params=["cluster", "grid"])
def exchanging(request):
    """The ops, with one family of persistent kernels."""
    if not CUDA:
        pytest.skip("needs an extension built with its CUDA kernels")
    if request.param == "cluster" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs a GPU with clusters")
    _C.set_cuda_family(request.param)
    yield torch.ops.rnnkernels
    _C.set_cuda_family("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("laid", LAID, ids=str)
def test_several_blocks_and_tiles(exchanging, laid, dtype):
    """The exchange itself, against the reference; and the same bits each time."""
    with gpu_layouts.laid_out(laid):
        test_matches_reference(exchanging, laid.case, dtype)
        call = op_parity.make(laid.case, dtype, "cuda")
        want = run(exchanging, call)
        assert all(torch.equal(a, b) for a, b in zip(run(exchanging, call), want, strict=True))


@pytest.mark.parametrize("laid", LAID, ids=str)
def test_several_blocks_and_tiles_in_tf32(exchanging, laid):
    with gpu_layouts.laid_out(laid):
        test_tf32(exchanging, laid.case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_saving(ops, case):
    call = op_parity.make(case, torch.float32, "cuda")
    kept, out = op_parity.forward(ops, call), op_parity.forward(ops, call, save=False)
    assert all(torch.equal(a, b) for a, b in zip(kept[:4], out[:4], strict=True))


STACKS = [
    *(Case(cell, T=12, B=6, H=33, lengths=True, reset=True) for cell in op_parity.CELLS),
    *(Case(cell, T=12, B=18, H=136, I=65, window=5, clip=CLIPS[1]) for cell in ("lstm", "gru")),
    Case("lstm", T=300, B=16, H=256, I=40),
]


@pytest.fixture(params=["cluster", "grid"])
def stacks(request):
    """The ops of a stack, as many layers at a time as fit on the device."""
    if not CUDA:
        pytest.skip("needs an extension built with its CUDA kernels")
    _C.set_cuda_family(request.param)
    _C.set_cuda_stacks("together")
    yield torch.ops.rnnkernels
    _C.set_cuda_family("auto")
    _C.set_cuda_stacks("auto")


@pytest.mark.parametrize("dtype", list(TOLERANCE)[1:], ids=str)
@pytest.mark.parametrize("case", STACKS, ids=str)
def test_stack_matches_reference(stacks, case, dtype):
    calls = stack_parity.make(case, 3, dtype, "cuda")
    outs = stack_parity.forward(stacks, calls, 0.5)
    assert stack_parity.forward_error(calls, outs, 0.5) <= TOLERANCE[dtype]
    grads = stack_parity.random_gradients(calls, outs)
    backs = stack_parity.backward(stacks, calls, outs, grads, 0.5)
    if dtype.itemsize > 2:
        assert stack_parity.backward_error(calls, outs, backs, grads, 0.5) <= TOLERANCE[dtype]
    else:
        exact = [op_parity.converted(t, torch.float64, "cpu") for t in (calls, outs, grads)]
        want = stack_parity.backward(torch.ops.rnnkernels, *exact, 0.5)
        assert max(map(op_parity.error, chain(*backs), chain(*want))) <= TOLERANCE[dtype]
    again = stack_parity.backward(stacks, calls, outs, grads, 0.5)
    assert all(map(torch.equal, chain(*again), chain(*backs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("laid", gpu_layouts.STACKS, ids=str)
def test_stack_of_several_blocks_and_tiles(stacks, laid: Laid, dtype):
    with gpu_layouts.laid_out(laid):
        test_stack_matches_reference(stacks, laid.case, dtype)


def test_stacks_run_at_a_time(stacks):
    """What the tests of stacks mean to test."""
    device = cuda_plan.Device.of(torch.device("cuda"))
    for case in STACKS:
        for backward in (False, True):
            plan = cuda_plan.plan(
                case.cell, backward, "bfloat16", case.H, case.B, 1, device, layers=3, steps=case.T
            )
            if "compute capability" in plan.reason:
                pytest.skip(plan.reason)
            assert plan.stages == 3, case


@pytest.mark.parametrize("cell", op_parity.CELLS)
def test_graph_capture_of_a_stack(stacks, cell):
    case = Case(cell, T=9, B=6, H=33, lengths=True, reset=True)
    calls = stack_parity.make(case, 3, torch.float32, "cuda")
    grads = stack_parity.random_gradients(calls, stack_parity.forward(stacks, calls))

    def both():
        outs = stack_parity.forward(stacks, calls)
        return [*chain(*outs), *chain(*stack_parity.backward(stacks, calls, outs, grads))]

    captured = replayed(both, calls[0])
    assert all(torch.equal(a, b) for a, b in zip(captured, both(), strict=True))


@each_dtype
@pytest.mark.parametrize("case", [FULL, *LARGE], ids=str)
def test_same_bits_each_time(ops, case, dtype):
    call = op_parity.make(case, dtype, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(run(ops, call), run(ops, call), strict=True))


def test_current_stream(ops, full):
    """Inputs that the current stream brings late are waited for, without any synchronisation."""
    call = op_parity.make(full, torch.float32, "cuda")
    want = run(ops, call)
    late = call._replace(x=torch.zeros_like(call.x), h0=torch.zeros_like(call.h0))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        late.x.copy_(call.x)
        late.h0.copy_(call.h0)
        got = run(ops, late)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_current(ops, full):
    on_first, on_second = (op_parity.make(full, torch.float32, f"cuda:{i}") for i in (0, 1))
    with torch.cuda.device(0):
        got = run(ops, on_second)
    assert all(t.device.index == 1 for t in got)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, run(ops, on_first), strict=True))


@pytest.mark.parametrize("options", [{}, {"window": 4, "clip": CLIPS[1], "flow": True}], ids=str)
@pytest.mark.parametrize("cell", op_parity.CELLS)
def test_graph_capture(ops, cell, options):
    """A captured call follows its inputs; so it neither synchronises nor reads them on the host."""
    case = Case(cell, 2, T=9, B=6, H=33, lengths=True, reset=True, **options)
    call = op_parity.make(case, torch.float32, "cuda")
    out = op_parity.forward(ops, call)
    grads = op_parity.random_gradients(call, out)

    def both():
        out = op_parity.forward(ops, call)
        return [*out, *op_parity.backward(ops, call, out, grads)]

    captured = replayed(both, call)
    assert all(torch.equal(a, b) for a, b in zip(captured, both(), strict=True))
