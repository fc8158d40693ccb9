"""Kernels are checked on a GPU before they first run there: verdicts, warnings, what runs in place
of what is refused, the cache. Kernels for the CPU stand in for those of the GPU."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from test_devices import call_on_gpu
from torch import Tensor

import rnnkernels
from helpers import run_python
from rnnkernels import _backends, _ops, verification
from rnnkernels._backends import cuda_plan, gpu, vetting
from rnnkernels._backends.cuda_plan import DEVICES, Device
from rnnkernels._backends.triton.plan import choose
from rnnkernels._backends.vetting import cases, store
from rnnkernels._backends.vetting.runners import NotHere
from rnnkernels._core.call import Call
from stand_in import CASES, GPU, StandIn, on_gpu

_C = pytest.importorskip("rnnkernels._C", reason="needs the compiled extension")
STEPS = 200  # enough for kernels that load the weights once
CPU = torch.device("cpu")
FAMILIES = ("stepwise", "grid", "cluster", "grid wavefront", "cluster wavefront")


@pytest.fixture
def kernels(tmp_path: Path) -> Iterator[StandIn]:
    with on_gpu(tmp_path) as runner:
        yield runner


def settle(family: str, numbers: str = "float32") -> bool:
    return vetting.settle("cuda", GPU, family, numbers)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.json"))


def one_more(t: Tensor) -> Tensor:
    t = t.clone()
    t.flatten()[-1] += 1
    return t


def with_nan(t: Tensor) -> Tensor:
    t = t.clone()
    t.flatten()[0] = torch.nan
    return t


# Verdicts


@pytest.mark.parametrize("numbers", ["float32", "bfloat16", "float16", "float64"])
def test_right_kernels_pass(kernels: StandIn, numbers: str) -> None:
    assert settle("grid", numbers)
    assert kernels.ran == ["grid"] * len(CASES)
    assert settle("grid", numbers)
    assert len(kernels.ran) == len(CASES)  # once in a process
    assert vetting.refused("cuda", GPU) == {}
    assert f"grid passed ({numbers})" in vetting.describe("cuda", GPU)
    assert "cluster not yet checked" in vetting.describe("cuda", GPU)


def test_each_precision_is_checked(kernels: StandIn) -> None:
    for numbers in ("float32", "bfloat16"):
        assert settle("grid", numbers)
    assert len(kernels.ran) == 2 * len(CASES)
    assert "grid passed (bfloat16, float32)" in vetting.describe("cuda", GPU)


RESULTS = ["y", "h_n", "c_n", "dgates", "dh0", "dc0", "db_ih", "db_hh"]


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("change", [one_more, with_nan, torch.zeros_like], ids=lambda f: f.__name__)
def test_a_wrong_result_refuses(kernels: StandIn, name: str, change: Any) -> None:
    kernels.wrong["grid"] = name, change
    with pytest.warns(
        RuntimeWarning, match=f"the grid kernels .* refused on cuda:0.*{name} is off"
    ):
        assert settle("grid")
    direction = "forward" if name in ("y", "h_n", "c_n") else "backward"
    reason = vetting.refused("cuda", GPU)["grid"]
    assert reason.startswith(f"{CASES[0]} in float32, {direction}: {name} is off by ")
    assert f"grid refused: {reason}" in vetting.describe("cuda", GPU)
    assert settle("grid", "bfloat16")  # known without another run, in any precision
    assert kernels.ran == ["grid"]


def test_an_error_refuses(kernels: StandIn) -> None:
    kernels.raises["grid"] = RuntimeError(
        "a kernel could not be launched: too many resources\nmore"
    )
    with pytest.warns(RuntimeWarning, match="others run in their place") as caught:
        assert settle("grid") and settle("grid")
    assert len(caught) == 1
    reason = vetting.refused("cuda", GPU)["grid"]
    assert reason.endswith("RuntimeError: a kernel could not be launched: too many resources")


def test_a_fault_refuses(kernels: StandIn) -> None:
    """A wait that reached its bound is what is said, not the results that follow from it."""
    kernels.faults["cluster"] = "block 3 waited for round 2 of tile 0 for more than 10 s"
    kernels.wrong["cluster"] = "y", torch.zeros_like
    with pytest.warns(RuntimeWarning, match="block 3 waited"):
        assert settle("cluster")
    assert vetting.refused("cuda", GPU)["cluster"].endswith(kernels.faults["cluster"])


def test_an_earlier_fault_is_raised(kernels: StandIn) -> None:
    """It belongs to a call of the user, whose results are not valid, and to no family."""
    kernels.pending = "block 3 waited for round 2"
    message = "a kernel that ran before on cuda:0 failed: block 3 waited for round 2"
    with pytest.raises(vetting.EarlierFault, match=message):
        settle("grid")
    assert not kernels.ran
    assert settle("grid") and not vetting.refused("cuda", GPU)


def test_an_error_before_the_cases_refuses(
    kernels: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In this process alone."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("cuda_device: unknown error")

    monkeypatch.setattr(kernels, "cases", broken)
    with pytest.warns(RuntimeWarning, match="cuda_device: unknown error"):
        assert settle("grid")
    assert "RuntimeError" in vetting.refused("cuda", GPU)["grid"]
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("error", "why"),
    [(torch.OutOfMemoryError("no"), "no memory left"), (None, "this card has none")],
    ids=["memory", "absent"],
)
def test_no_verdict(kernels: StandIn, error: Exception | None, why: str, tmp_path: Path) -> None:
    if error is None:
        kernels.absent.add("grid")
    else:
        kernels.raises["grid"] = error
    assert not settle("grid")
    assert why in vetting.describe("cuda", GPU)
    assert not vetting.refused("cuda", GPU) and not files(tmp_path)


def test_callers_settings_do_not_reach_a_check(kernels: StandIn) -> None:
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
    ):
        assert settle("grid", "float64")
    assert kernels.ran == ["grid"] * len(CASES)


def test_threads_check_once(kernels: StandIn) -> None:
    threads = [threading.Thread(target=settle, args=("grid",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kernels.ran == ["grid"] * len(CASES)


# When nothing may be checked


def test_not_while_a_graph_is_captured(kernels: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as capturing:
        capturing.setattr(vetting, "_capturing", lambda device: True)
        assert not settle("grid")
        assert "grid not yet checked (a CUDA graph is being captured)" in vetting.describe(
            "cuda", GPU
        )
    assert settle("grid")  # after it


def test_not_inside_a_transform(kernels: StandIn) -> None:
    found = []

    def inside(x: Tensor) -> Tensor:
        found.append((settle("grid"), vetting.not_now(GPU)))
        return x

    torch.vmap(inside)(torch.zeros(2))
    torch.func.grad(lambda x: inside(x).sum())(torch.zeros(2))
    assert found == [(False, "a transform of torch.func runs the call")] * 2
    assert not kernels.ran


def test_not_while_tracing(kernels: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not settle("grid")
    assert "not yet checked (torch.compile or torch.export" in vetting.describe("cuda", GPU)
    assert gpu.cuda_ready(call_on_gpu()) is None
    assert not kernels.ran


def test_turned_off(kernels: StandIn) -> None:
    with verification(False):
        assert not settle("grid")
        assert "grid not yet checked (the check is off)" in vetting.describe("cuda", GPU)
        with verification(True):
            assert settle("grid")
    assert kernels.ran == ["grid"] * len(CASES)
    with pytest.raises(TypeError, match="mode"), verification("no"):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize(("value", "wanted"), [("0", "False"), ("1", "True"), ("", "True")])
def test_environment(value: str, wanted: str) -> None:
    code = "from rnnkernels._backends import vetting; print(vetting._enabled)"
    child = run_python("-c", code, RNNKERNELS_VERIFY=value)
    assert (child.returncode, child.stdout.strip()) == (0, wanted), child.stderr


# The cache


def test_a_later_process_knows(kernels: StandIn, tmp_path: Path) -> None:
    kernels.wrong["grid"] = "y", one_more
    with pytest.warns(RuntimeWarning):
        settle("grid")
    settle("stepwise")
    (file,) = files(tmp_path / "rnnkernels")
    assert json.loads(file.read_text())["key"] == {"name": "cuda:0"}
    ran = len(kernels.ran)
    vetting.forget()
    with pytest.warns(RuntimeWarning, match="y is off"):  # every process says it once
        assert settle("grid")
    assert settle("stepwise")
    assert len(kernels.ran) == ran
    assert settle("stepwise", "bfloat16")  # which is not there
    assert len(kernels.ran) == ran + len(CASES)
    vetting.renew(GPU)
    assert not files(tmp_path)
    assert settle("stepwise")
    assert len(kernels.ran) == ran + 2 * len(CASES)


def test_another_build_asks_anew(kernels: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settle("grid")
    vetting.forget()
    monkeypatch.setattr(store, "key", lambda device: {"name": str(device), "build": "another"})
    assert settle("grid")
    assert len(kernels.ran) == 2 * len(CASES)


FOREIGN = {
    "empty": "",
    "half": "{",
    "list": "[]",
    "number": '{"key": {"name": "cuda:0"}, "results": 3}',
    "no key": '{"results": {"cuda grid float32": ""}}',
    "another key": '{"key": {"name": "cuda:1"}, "results": {"cuda grid float32": ""}}',
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_others(kernels: StandIn, tmp_path: Path, content: str) -> None:
    assert settle("grid")
    (file,) = files(tmp_path)
    file.write_text(content)
    vetting.forget()
    assert settle("grid")
    assert len(kernels.ran) == 2 * len(CASES)
    assert json.loads(file.read_text())["results"] == {"cuda grid float32": ""}


def test_no_folder(kernels: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be read or written below a file, by root either."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert settle("grid")
    vetting.forget()
    assert settle("grid")
    vetting.renew(GPU)
    assert len(kernels.ran) == 2 * len(CASES)


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.folder() == tmp_path / "rnnkernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.folder() == tmp_path / ".cache" / "rnnkernels"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert store.folder() == tmp_path / "local" / "rnnkernels" / "Cache"


def test_build_follows_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(store, "PACKAGE", tmp_path)
    (tmp_path / "_backends/triton").mkdir(parents=True)
    kernel, compiled = tmp_path / "_backends/triton/a.py", tmp_path / "_C.so"
    found = [store.build()]
    for path, text in ((kernel, "1"), (kernel, "2"), (compiled, "1"), (compiled, "12")):
        path.write_text(text)
        found.append(store.build())
    assert len(set(found)) == 5


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


# The call of a user


@pytest.fixture
def table(kernels: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The CUDA backend runs what is on the CPU, as if that were the first GPU."""
    monkeypatch.setattr(_backends, "_environment", None)
    monkeypatch.setattr(Device, "of", lambda _: DEVICES["H100"])
    monkeypatch.setattr(gpu, "_real", lambda call: True)
    monkeypatch.setattr(gpu.devices, "cannot_run", lambda device: None)
    monkeypatch.setattr(vetting, "take_fault", lambda device: "")

    def there(call: Call) -> Call:
        class OnGpu:
            device = GPU
            dtype = call.x.dtype
            size = staticmethod(call.x.size)
            requires_grad = call.x.requires_grad

        return call._replace(x=OnGpu())  # type: ignore[arg-type]

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
    """Past Python, which chooses the backend: lengths are nothing for the short way."""
    return module(x, lengths=[x.size(0)] * x.size(1))


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
