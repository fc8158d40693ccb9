"""How persistent CUDA kernels are laid out over a device: of any kind, with none at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import gpu_layouts
import op_parity
from benchmarks import gpu_estimates
from gpu_layouts import Laid
from rnnkernels._backends import cuda_plan
from rnnkernels._backends.cuda_plan import DEVICES, Device, Plan, plan

_C = pytest.importorskip("rnnkernels._C", reason="needs the compiled extension")

#: A card with fewer and smaller multiprocessors.
SMALL = Device(8, 28, 101376, 8)


@pytest.fixture(autouse=True)
def _families() -> Iterator[None]:
    yield
    _C.set_cuda_family("auto")
    _C.set_cuda_stacks("auto")


@pytest.mark.parametrize("device", [*DEVICES.values(), SMALL], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("precision", ["bfloat16", "tf32", "float32"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_plans(cell: str, precision: str, backward: bool, device: Device) -> None:
    """Whatever is planned covers the call and keeps to the device's limits."""
    found = 0
    for H in (1, 7, 64, 200, 256, 512, 768, 1024, 1500, 2048, 5000):
        for rows in (1, 16, 17, 64, 128, 1000, 70000):
            for D in (1, 2):
                p = plan(cell, backward, precision, H, rows, D, device)
                if p.reason:
                    assert p.family == "stepwise"
                    if "faster" in p.reason:
                        assert rows > 16
                        continue
                    assert H > 200
                    assert "do not fit" in p.reason
                    continue
                found += 1
                assert p.blocks * p.units >= H > (p.blocks - 1) * p.units
                assert p.units % 8 == 0
                assert p.shared_bytes <= device.shared_bytes
                assert p.pitch % 32 == 16  # eight rows in different banks
                assert p.groups * p.tiles * p.rows * p.launches >= rows
                if p.family == "cluster":
                    assert device.major >= 9
                    assert p.blocks in (1, 2, 4, 8, 16)
                    assert p.blocks <= device.most_blocks
                elif p.blocks > 1:  # all at the same time
                    assert p.blocks * p.groups * D <= device.multiprocessors
    assert found >= 40


@pytest.mark.parametrize("device", [*DEVICES.values(), SMALL], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_stacks(cell: str, backward: bool, device: Device) -> None:
    """All layers that run at a time fit on the device together, and are faster so."""
    at_once = 0
    for precision in ("bfloat16", "tf32", "float32"):
        for H in (7, 64, 200, 256, 512, 1024):
            for rows in (1, 17, 64, 1000):
                sizes = cell, backward, precision, H, rows, 1, device
                one = plan(*sizes, steps=100)
                for layers in (2, 3, 6, 20):
                    p = plan(*sizes, layers=layers, steps=100)
                    if p.stages == 1:
                        assert p.all_cycles == pytest.approx(layers * one.all_cycles)
                        assert replace(p, all_cycles=one.all_cycles) == one
                        continue
                    at_once += 1
                    assert p.stages <= min(layers, 8)
                    assert p.all_cycles < layers * one.all_cycles
                    assert p.launches == 1
                    assert p.blocks * p.groups * p.stages <= device.multiprocessors
                    assert p.groups * p.tiles * p.rows >= rows
                    assert p.shared_bytes <= device.shared_bytes
    assert at_once >= 20


@pytest.mark.parametrize("precision", ["bfloat16", "tf32", "float32"])
@pytest.mark.parametrize("H", [64, 200, 256, 384, 1000])
def test_rows_lie_in_different_banks(H: int, precision: str) -> None:
    """Also with the sums of a norm behind them, of an odd number of blocks or an even one."""
    for family in ("cluster", "grid"):
        _C.set_cuda_family(family)
        p = plan("rnn_tanh", True, precision, H, 16, 1, DEVICES["H100"], norm=True)
        assert p.reason or p.pitch % 32 == 16


def test_what_a_device_refuses() -> None:
    """The next best layout runs, and says why; step by step, where there is none."""

    def none_of(*refused: tuple[str, int]) -> Plan:
        def asked(family: str, blocks: int) -> str:
            return "no room for it" if (family, blocks) in refused or not refused else ""

        return plan("lstm", False, "bfloat16", 256, 16, 1, DEVICES["H100"], refused=asked)

    best = plan_of("auto")
    assert (best.family, best.blocks, best.passed_over) == ("cluster", 16, "")
    second = none_of(("cluster", 16))
    assert (second.family, second.blocks) != ("cluster", 16)
    assert second.cycles > best.cycles
    assert second.passed_over == "no room for it"
    assert "(the device refuses no room for it)" in str(second)
    third = none_of(("cluster", 16), (second.family, second.blocks))
    assert third.cycles > second.cycles
    assert none_of(("cluster", 1)).passed_over == ""  # nobody wanted it
    nothing = none_of()
    assert nothing.family == "stepwise"
    assert nothing.reason == "no room for it"
    if hasattr(_C, "cuda_probe"):  # a build that can ask
        return
    with pytest.raises(RuntimeError, match="here: there is no device to ask, since this build"):
        cuda_plan._ops.cuda_plan(
            cell="lstm", backward=False, precision="bfloat16", projected=False, norm=False,
            recorded=False, H=256, T=1, B=16, window=0, D=1, layers=1, device=(9, 132, 232448, 16),
            here=True,
        )  # fmt: skip


def test_short_sequences_run_step_by_step() -> None:
    """Where loading the weights takes longer than it saves; unless a family was asked for."""
    assert "too few steps" in plan_of("auto", H=1024, rows=64, steps=1).reason
    assert "too few steps" in plan_of("auto", H=1024, rows=64, steps=1, layers=3).reason
    for steps in (8, 512):
        assert not plan_of("auto", H=1024, rows=64, steps=steps).reason
    for family in ("cluster", "grid"):
        assert not plan_of(family, H=256, steps=1).reason


def test_thousands_of_rows_run_step_by_step() -> None:
    assert "of the whole device" in plan_of("auto", rows=100_000).reason
    assert not plan_of("auto", rows=256).reason
    assert not plan_of("grid", rows=100_000).reason


def test_no_fault_without_a_device() -> None:
    assert _C.take_cuda_fault(0) == _C.take_cuda_fault(device_index=99) == ""


def test_what_runs_layer_by_layer() -> None:
    """A wavefront takes rounds to begin and to end."""
    assert plan_of("auto", layers=4, steps=1).stages == 1
    assert plan_of("auto", layers=4, steps=512).stages == 4
    assert "4 layers at a time" in str(plan_of("grid", layers=4, steps=512))
    _C.set_cuda_stacks("together")
    assert plan_of("auto", layers=4, steps=1).stages == 4
    assert plan_of("auto", layers=20, steps=1).stages == 8
    _C.set_cuda_stacks("in turn")
    assert plan_of("auto", layers=4, steps=512).stages == 1
    with pytest.raises(ValueError, match="name: expected auto, in turn or together, got 'x'"):
        _C.set_cuda_stacks("x")


def plan_of(family: str, device: str = "H100", **changes: Any) -> Plan:
    _C.set_cuda_family(family)
    options = {"H": 256, "rows": 16, "D": 1, **changes}
    return plan("lstm", False, "bfloat16", device=DEVICES[device], **options)


def test_families() -> None:
    for family in ("cluster", "grid"):
        found = plan_of(family)
        assert not found.reason
        assert found.family == family
    assert "compute capability 9.0" in plan_of("cluster", "A100").reason
    assert "do not fit" in plan_of("auto", H=20000).reason
    with pytest.raises(ValueError, match="name: expected auto, stepwise, cluster or grid, got 'x'"):
        _C.set_cuda_family("x")


def test_what_runs_step_by_step() -> None:
    device = DEVICES["H100"]
    for changes, reason in (
        ({"precision": "float64"}, "float64"),
        ({"projected": True}, "proj_size"),
        ({"precision": "float16", "norm": True}, "overflow"),
    ):
        options = {"precision": "bfloat16", **changes}
        found = plan("lstm", True, H=64, rows=4, D=1, device=device, **options)
        assert found.family == "stepwise"
        assert reason in found.reason
    assert "asked for" in plan_of("stepwise").reason
    with pytest.raises(
        ValueError, match="precision: expected a floating dtype or tf32, got 'int8'"
    ):
        plan("lstm", True, "int8", 64, 4, 1, device)


def test_more_work_takes_longer() -> None:
    """As far as the estimate goes by which a layout is chosen."""
    assert plan_of("auto").cycles < plan_of("auto", H=1024).cycles
    assert plan_of("auto", H=512).cycles < plan_of("auto", H=512, rows=256).cycles


@pytest.mark.parametrize("precision", ["bfloat16", "tf32", "float32"])
@pytest.mark.parametrize("family", ["cluster", "grid"])
@pytest.mark.parametrize("laid", [*gpu_layouts.LAID, *gpu_layouts.STACKS], ids=str)
def test_calls_of_gpu_tests_exchange(laid: Laid, family: str, precision: str) -> None:
    """What tests on a GPU mean to test: both passes have several blocks and several tiles."""
    case = laid.case
    _C.set_cuda_family(family)
    _C.set_cuda_stacks("together")
    with gpu_layouts.laid_out(laid):
        for backward in (False, True):
            windows = -(-case.T // case.window) if backward and case.window else 1
            found = plan(
                case.cell, backward, precision, case.H, case.B * windows, case.D,
                DEVICES["H100"], norm=case.clip.kind == "norm", layers=laid.layers, steps=case.T,
                dropped=case.drop,
            )  # fmt: skip
            assert not found.reason
            assert found.family == family
            assert found.units == laid.units
            assert found.blocks == -(-case.H // laid.units) >= 2
            assert found.tiles == laid.tiles >= 2
            assert found.stages == laid.layers
    assert plan_of("auto").tiles == 1  # what was forced is over


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("norm", [False, True], ids=["unbounded", "norm"])
def test_recurrent_dropout_takes_a_number_of_each_unit_and_row(norm: bool, backward: bool) -> None:
    """In shared memory, and nothing else: messages are those of a layer without."""
    units, tiles, rows = 16, 2, 8
    _C.force_cuda_layout(units, tiles, 1)
    try:
        plain, dropped = (
            plan("gru", backward, "bfloat16", 60, 20, 1, DEVICES["H100"], norm=norm, dropped=drop)
            for drop in (False, True)
        )
    finally:
        _C.force_cuda_layout(0, 0, 0)
    assert plain.family == "cluster"
    assert dropped.shared_bytes == plain.shared_bytes + 4 * units * tiles * rows
    assert replace(dropped, shared_bytes=0, cycles=0, all_cycles=0) == replace(
        plain, shared_bytes=0, cycles=0, all_cycles=0
    )


def test_forced_layouts_are_checked() -> None:
    for given, name in (((12, 0, 0), "units"), ((0, -1, 0), "tiles"), ((0, 0, 3), "batch")):
        with pytest.raises(ValueError, match=f"{name}: expected .*, got"):
            _C.force_cuda_layout(*given)


def test_text() -> None:
    assert str(plan_of("cluster")).startswith("a cluster of ")
    assert str(plan_of("auto", H=64)).startswith("a block by itself with 64 units, 8 per direction")
    assert "step by step: the recurrent weights do not fit" in str(plan_of("auto", H=20000))


def test_text_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes, with all windows as rows, and the layers of a stack that run at a time."""
    monkeypatch.setattr(Device, "of", lambda _: DEVICES["H100"])
    case = op_parity.Case("lstm", T=512, B=16, H=256)
    call = op_parity.make(case, torch.bfloat16).call()
    forward, backward = cuda_plan.of_call(call).split("; ")
    assert forward == f"forward in {plan('lstm', False, 'bfloat16', 256, 16, 1, DEVICES['H100'])}"
    assert backward == f"backward in {plan('lstm', True, 'bfloat16', 256, 16, 1, DEVICES['H100'])}"
    together = call._replace(layers=4)
    assert cuda_plan.of_call(together).count("4 layers at a time") == 2
    for one_by_one in ({"directions": 2}, {"projected": True}):
        assert "at a time" not in cuda_plan.of_call(together._replace(**one_by_one))
    recorded = cuda_plan.of_call(together._replace(flow=torch.zeros(0)))
    assert recorded.count("4 layers at a time") == 1  # forward
    wide = cuda_plan.of_call(op_parity.make(case, torch.float32).call())
    setting = "(torch.backends.cudnn.rnn.fp32_precision)"
    assert wide.startswith(f"float32 multiplied as tf32 {setting}; forward in a ")
    windows = cuda_plan.of_call(call._replace(window=2))
    sizes = "lstm", True, "bfloat16", 256, 4096, 1
    assert windows.endswith(str(plan(*sizes, DEVICES["H100"], steps=2)))


def test_estimates(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_estimates", "--device=A100", "--megahertz=1410"])
    assert gpu_estimates.main() == 0
    out = capsys.readouterr().out
    assert "| lstm | 16, 256 | bfloat16 | grid, " in out
    assert "| lstm | 4 | 16, 256 | bfloat16 | 4 at a time, grid, " in out
    assert "cluster" not in out  # which that card has none of
