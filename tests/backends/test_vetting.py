"""Kernels are checked on a GPU before they first run there: verdicts, warnings, the cache.
Kernels for the CPU stand in for those of the GPU."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_devices import call_on_gpu
from torch import Tensor

from helpers import run_python
from rnnkernels import verification
from rnnkernels._backends import cache, gpu, vetting
from rnnkernels._backends.vetting import store
from stand_in import CASES, GPU, StandIn, one_more, settle

_C = pytest.importorskip("rnnkernels._C", reason="needs the compiled extension")
CPU = torch.device("cpu")


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.json"))


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
    assert cache.folder() == tmp_path / "rnnkernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "rnnkernels"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache.folder() == tmp_path / "local" / "rnnkernels" / "Cache"


def test_build_follows_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(store, "PACKAGE", tmp_path)
    (tmp_path / "_backends/triton").mkdir(parents=True)
    kernel, compiled = tmp_path / "_backends/triton/a.py", tmp_path / "_C.so"
    below = tmp_path / "_bindings/torch2.13/librnnkernels.so"
    below.parent.mkdir(parents=True)
    found = [store.build()]
    for path, text in (
        (kernel, "1"), (kernel, "2"), (compiled, "1"), (compiled, "12"), (below, "1"),
        (below, "12"),
    ):  # fmt: skip
        path.write_text(text)
        found.append(store.build())
    assert len(set(found)) == 7
