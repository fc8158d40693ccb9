"""Calls on a GPU whose kernels are checked before they first run: what is planned, what runs in
place of what is refused, how faults are raised. Kernels for the CPU stand in for the GPU's."""

from __future__ import annotations

import threading
import warnings
from itertools import product
from typing import Any

import pytest
import torch
from test_devices import call_on_gpu
from torch import Tensor

import rnnkernels
from rnnkernels import _backends, _ops, verification
from rnnkernels._backends import cuda_plan, gpu, vetting
from rnnkernels._backends.cuda_plan import DEVICES, Device
from rnnkernels._backends.triton.plan import choose
from rnnkernels._backends.vetting import cases
from rnnkernels._backends.vetting.runners import NotHere
from rnnkernels._core.call import Call
from rnnkernels.nn import gated
from stand_in import CASES, GPU, StandIn, one_more, settle

_C = pytest.importorskip("rnnkernels._C", reason="needs the compiled extension")
STEPS = 200  # enough for kernels that load the weights once
CPU = torch.device("cpu")
FAMILIES = ("stepwise", "grid", "cluster", "grid wavefront", "cluster wavefront")


def test_cases_of_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each family, of the sizes that its case is planned with on a card, is what would run; of
    several blocks, where there are blocks."""
    runner = vetting.RUNNERS["cuda"]
    for name, device in DEVICES.items():
        monkeypatch.setattr(Device, "of", lambda _, device=device: device)
        for family, numbers in product(FAMILIES, ("float32", "bfloat16", "float16")):
            if name == "A100" and "cluster" in family:
                with pytest.raises(NotHere, match="clusters need a GPU"):
                    runner.cases(family, numbers, GPU)
                continue
            found = runner.cases(family, numbers, GPU)
            dtype = getattr(torch, numbers)
            calls = [cases.converted(cases.make(case), dtype, CPU) for case in found]
            assert all(runner.takes(family, call) for call in calls)
            _C.force_cuda_kernels(family)
            try:
                blocks = [cuda_plan.of_pass(call, False).blocks for call in calls]
            finally:
                _C.force_cuda_kernels("")
            if family != "stepwise":
                assert max(blocks) > 1 == min(blocks)
    monkeypatch.setattr(Device, "of", lambda _: DEVICES["A100"])
    assert not runner.takes("cluster", cases.make(CASES[0]))


# What the compiled part asks: the planner of the CUDA backend, as if on the first GPU


def plan(family_of: str = "", **changes: Any) -> cuda_plan.Plan:
    sizes: dict[str, Any] = {
        "cell": "lstm", "backward": False, "precision": "bfloat16", "projected": False,
        "norm": False, "recorded": False, "H": 256, "T": 512, "B": 16, "window": 0, "D": 1,
        "layers": 1, "device": (9, 132, 232448, 16), "index": 0,
    }  # fmt: skip
    return cuda_plan.Plan(**_C.cuda_plan(**sizes | changes))


def test_why_a_layer_runs_step_by_step() -> None:
    wanted = {
        "heads have no kernels for whole sequences": {"heads": True},
        "layer_norm has no kernels for whole sequences": {"cell": "layer_norm_gru"},
        "a cell that is written, or has zoneout, has no kernels for whole sequences": {
            "cell": gated.slstm.name
        },
    }
    for reason, changes in wanted.items():
        found = plan(index=-1, **changes)
        assert (found.family, found.reason) == ("stepwise", reason)
    assert plan(index=-1, dropped=True).kernels == plan(index=-1).kernels != "stepwise"


def test_a_plan_asks_for_new_kernels(kernels: StandIn) -> None:
    first = plan().kernels
    assert kernels.ran == [first] * len(CASES)
    assert plan(backward=True).kernels == plan(H=250).kernels == first  # known
    assert plan(index=-1).kernels == first  # without a device nothing is asked
    assert len(kernels.ran) == len(CASES)
    assert plan(precision="tf32").kernels in kernels.ran[len(CASES) :]


@pytest.mark.parametrize("layers", [1, 4])
def test_refused_families_make_room_for_others(kernels: StandIn, layers: int) -> None:
    """One after the other, down to what takes everything; each warns once."""
    seen = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while (found := plan(layers=layers)).kernels != "stepwise":
            seen.append(found.kernels)
            assert len(seen) <= len(FAMILIES)
            kernels.wrong[found.kernels] = "y", one_more
            vetting.renew(GPU)
    assert len(set(seen)) == len(seen)
    assert set(seen) == (set(FAMILIES[1:]) if layers > 1 else {"grid", "cluster"})
    assert "found wrong on this device" in found.reason
    assert len(caught) == sum(range(1, len(seen) + 1))  # a round for each that is wrong


def test_a_refused_wavefront_leaves_its_layers(kernels: StandIn) -> None:
    together = plan(layers=4)
    assert together.stages == 4
    for name in FAMILIES[3:]:
        kernels.wrong[name] = "dh0", one_more
    vetting.forget()
    vetting.renew(GPU)
    with pytest.warns(RuntimeWarning, match="wavefront kernels"):
        in_turn = plan(layers=4)
    assert in_turn.stages == 1 and in_turn.kernels in ("grid", "cluster")


def test_forced_kernels_are_seen_as_they_are(kernels: StandIn) -> None:
    kernels.wrong["grid"] = "y", one_more
    with pytest.warns(RuntimeWarning):
        settle("grid")
    try:
        _C.set_cuda_family("grid")
        assert plan().kernels == "grid"
    finally:
        _C.set_cuda_family("auto")
    for name in FAMILIES:
        _C.force_cuda_kernels(name)
        try:
            assert plan(layers=3).kernels == name
        finally:
            _C.force_cuda_kernels("")
    assert kernels.ran == ["grid"]
    with pytest.raises(ValueError, match=r"name: expected one of .*got 'x'"):
        _C.force_cuda_kernels("x")


def test_nothing_left(kernels: StandIn) -> None:
    """What takes everything stays in plans; who runs them says that it is refused."""
    kernels.wrong["stepwise"] = "y", one_more
    with pytest.warns(RuntimeWarning, match="the stepwise kernels"):
        assert plan(H=20000).kernels == "stepwise"
    ran = list(kernels.ran)
    for precision in ("tf32", "bfloat16", "float64"):
        assert plan(H=20000, precision=precision).kernels == "stepwise"
    assert kernels.ran == ran == ["stepwise"]


def test_forced_in_one_thread() -> None:
    found = []
    _C.force_cuda_kernels("grid")
    try:
        thread = threading.Thread(target=lambda: found.append(plan(index=-1).kernels))
        thread.start()
        thread.join()
        assert plan(index=-1).kernels == "grid"
    finally:
        _C.force_cuda_kernels("")
    assert found == [plan(index=-1).kernels] != ["grid"]


@pytest.mark.parametrize(("H", "norm"), [(16, False), (72, True)])
def test_triton_layouts_without_some(H: int, norm: bool) -> None:
    sizes: dict[str, Any] = {"gpu": "cuda", "numbers": "half", "H": H, "rows": 18, "D": 1}
    sizes |= {"norm": norm, "processors": 132}
    everything = choose(**sizes)
    assert everything.kind == ("grid" if norm else "resident")
    assert choose(**sizes, without={"step"}) == everything
    assert choose(**sizes, without={"resident"}).kind == "grid"
    step = choose(**sizes, without={"resident", "grid"})
    assert (step.kind, step.row_blocks * step.block_b >= 18) == ("step", True)


def test_triton_layouts_of_other_cells() -> None:
    """Where nothing comes of other units, no program waits but for a norm; where more is kept at a
    time, pieces are smaller."""
    sizes: dict[str, Any] = {"gpu": "cuda", "H": 200, "rows": 18, "D": 1, "processors": 132}
    alone = choose(**sizes, numbers="half", norm=False, recurrent=False)
    assert (alone.kind, alone.parts * alone.block_h >= 200, alone.held) == ("resident", True, False)
    assert choose(**sizes, numbers="half", norm=True, recurrent=False).kind == "grid"
    pieces = [
        choose(**sizes, numbers="tf32x3", norm=False, crowded=crowded).block_k
        for crowded in (False, True)
    ]
    assert pieces[1] < pieces[0]
    sizes |= {"gpu": "rdna", "H": 16, "numbers": "half", "norm": False}
    kinds = [choose(**sizes, crowded=crowded).kind for crowded in (False, True)]
    assert kinds == ["resident", "step"]


# The call of a user


@pytest.fixture
def table(kernels: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The CUDA backend runs what is on the CPU, as if that were the first GPU."""
    monkeypatch.setattr(_backends, "_environment", None)
    monkeypatch.setattr(Device, "of", lambda _: DEVICES["H100"])
    monkeypatch.setattr(gpu, "_real", lambda call: True)
    monkeypatch.setattr(gpu.devices, "cannot_run", lambda device: None)
    monkeypatch.setattr(vetting, "take_fault", lambda device: "")

    class OnGpu(Tensor):
        device = GPU

    def there(call: Call) -> Call:
        return call._replace(x=call.x.as_subclass(OnGpu))

    backend = _backends.Backend(
        "cuda",
        lambda call: gpu.cuda_refusal(there(call)),
        _ops.run,
        detail=lambda call: gpu.cuda_detail(there(call)),
        ready=lambda call: gpu.cuda_ready(there(call)),
        checked=lambda call: vetting.describe("cuda", GPU),
    )
    monkeypatch.setitem(_backends.BACKENDS, "cuda", backend)
    return kernels


def slow_way(module: torch.nn.Module, x: Tensor) -> Any:
    """Through Python, which chooses the backend: all states are nothing for the short way."""
    return module(x, return_all_states=True)


def test_first_call(table: StandIn) -> None:
    """Checks the kernels of both passes and what stands in for them, once; then opens the way."""
    gru, x = rnnkernels.GRU(3, 256), torch.randn(STEPS, 2, 3)
    want = gru(x)[0]
    assert not _C.short_ways_open(0)
    torch.testing.assert_close(slow_way(gru, x)[0], want)
    assert set(table.ran) >= {"stepwise"} and len(set(table.ran)) >= 2
    assert _C.short_ways_open(0)
    ran = len(table.ran)
    slow_way(gru, x)
    assert len(table.ran) == ran
    vetting.forget()
    assert not _C.short_ways_open(0)


def test_the_next_family_runs(table: StandIn) -> None:
    gru, x = rnnkernels.GRU(3, 256), torch.randn(STEPS, 2, 3)
    table.wrong |= {"cluster": ("dgates", one_more)}
    with pytest.warns(RuntimeWarning, match="the cluster kernels") as caught:
        torch.testing.assert_close(slow_way(gru, x)[0], gru(x)[0])
        explained = rnnkernels.explain(gru, x)
    assert len(caught) == 1
    (choice,) = explained.choices
    assert choice.backend == "cuda"
    assert "cluster refused: " in choice.checked and "dgates is off" in choice.checked
    assert "stepwise passed (" in choice.checked
    assert "cluster" not in choice.detail
    assert f"    check on first use: {choice.checked}" in str(explained).splitlines()


def test_the_next_backend_runs(table: StandIn) -> None:
    """Where the last family is refused; asked for by name, the backend is an error."""
    gru, x = rnnkernels.GRU(3, 256), torch.randn(STEPS, 2, 3)
    table.raises["stepwise"] = RuntimeError("broken")
    with pytest.warns(RuntimeWarning, match="the stepwise kernels") as caught:
        torch.testing.assert_close(slow_way(gru, x)[0], gru(x)[0])
        (choice,) = rnnkernels.explain(gru, x).choices
    assert len(caught) == 1
    assert choice.backend == "cpu"
    reason = choice.refusals["cuda"]
    assert reason.startswith("a check on this device refused its stepwise kernels: ")
    assert reason.endswith("forward: RuntimeError: broken")
    assert not _C.short_ways_open(0)
    with (
        rnnkernels.use_backend("cuda"),
        pytest.raises(RuntimeError, match="stepwise kernels: lstm"),
    ):
        gru(x)


def test_without_the_check(table: StandIn) -> None:
    gru, x = rnnkernels.GRU(3, 256), torch.randn(STEPS, 2, 3)
    with verification(False):
        slow_way(gru, x)
        (choice,) = rnnkernels.explain(gru, x).choices
    assert choice.backend == "cuda" and "the check is off" in choice.checked
    assert not table.ran and _C.short_ways_open(0)


def test_first_call_in_a_capture(table: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs unchecked, and leaves the check to a later one."""
    gru, x = rnnkernels.GRU(3, 256), torch.randn(STEPS, 2, 3)
    with monkeypatch.context() as capturing:
        capturing.setattr(vetting, "_capturing", lambda device: True)
        slow_way(gru, x)
    assert not table.ran and not _C.short_ways_open(0)
    slow_way(gru, x)
    assert table.ran and _C.short_ways_open(0)


def test_a_fault_is_raised_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ["block 3 waited for ever", ""]
    asked: list[int] = []

    def take(index: int) -> str:
        asked.append(index)
        return found.pop(0)

    monkeypatch.setattr(_ops, "kernel_devices", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(_ops, "take_cuda_fault", take)
    monkeypatch.setattr(gpu, "_real", lambda call: True)
    monkeypatch.setattr(_ops, "run", lambda call: "ran")
    call = call_on_gpu()
    with pytest.raises(RuntimeError, match="ran before on cuda:0 failed: block 3 waited for ever"):
        gpu.cuda_run(call)
    assert gpu.cuda_run(call) == "ran"
    assert asked == [0, 0]


def test_faults_are_asked_for_where_there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build with CUDA kernels has to tell of them; another has nothing to tell."""
    if "cuda" not in _ops.kernel_devices:
        assert vetting.take_fault(GPU) == ""
    monkeypatch.setattr(_ops, "kernel_devices", frozenset({"cpu", "cuda"}))
    assert vetting.take_fault(torch.device("cpu")) == ""
    if not hasattr(_C, "take_cuda_fault"):
        with pytest.raises(AttributeError, match="take_cuda_fault"):
            vetting.take_fault(GPU)
