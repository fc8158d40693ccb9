"""rnnkernels.verify: every family against the reference, the table, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rnnkernels
from rnnkernels import _ops
from rnnkernels._backends.vetting import runners
from rnnkernels.diagnostics import Verification
from stand_in import GPU, on_gpu

pytest.importorskip("rnnkernels._C", reason="needs the compiled extension")


@pytest.fixture(scope="session")
def on_cpu() -> Verification:
    return rnnkernels.verify("cpu")


def test_kernels_for_the_cpu(on_cpu: Verification) -> None:
    assert on_cpu.ok
    assert on_cpu.device == torch.device("cpu")
    ran = [row for row in on_cpu.rows if row.verdict == "passed"]
    assert {row.family for row in ran} == {"cpu kernels", "reference loop"}
    kernels = {(r.direction, r.numbers) for r in ran if r.family == "cpu kernels"}
    assert kernels == {(d, n) for d in ("forward", "backward") for n in runners.Cpu.numbers}
    for row in ran:
        assert row.cases >= 10 and row.seconds > 0
        assert 0 < row.error < 0.06
        assert row.error < 1e-5 or row.numbers in ("bfloat16", "float16")


def test_families_without_a_device(on_cpu: Verification) -> None:
    absent = [row for row in on_cpu.rows if row.verdict == "not here"]
    wanted = [f"cuda {family}" for family in runners.Cuda.families]
    wanted += [f"triton {family}" for family in runners.Triton.families]
    assert [row.family for row in absent] == wanted
    assert {row.reason for row in absent} == {"no GPU is checked"}


def test_table(on_cpu: Verification, capsys: pytest.CaptureFixture[str]) -> None:
    lines = str(on_cpu).splitlines()
    assert lines[0] == "on cpu:"
    assert lines[1].split() == [
        "family",
        "pass",
        "numbers",
        "cases",
        "largest",
        "error",
        "verdict",
        "seconds",
    ]
    assert len(lines) == 2 + len(on_cpu.rows)
    assert any(line.startswith("cpu kernels") and " float32 " in line for line in lines)
    assert "cuda grid wavefront     not here: no GPU is checked" in lines
    columns = {line.index("passed") for line in lines if "passed" in line}
    assert len(columns) == 1


class Wrong(runners.Cpu):
    """One result of backward is wrong."""

    numbers = ("float32",)

    def run(self, family: str, call: Any) -> runners.Run:
        out, backward = super().run(family, call)

        def wrong() -> Any:
            results = backward()
            return results | {"dh0": results["dh0"] * 1.01}

        return out, wrong


def test_wrong_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(runners.RUNNERS, "cpu", Wrong())
    found = rnnkernels.verify("cpu")
    assert capsys.readouterr().out == f"{found}\n"
    assert not found.ok
    forward, backward = (row for row in found.rows if row.family == "cpu kernels")
    assert (forward.verdict, backward.verdict) == ("passed", "refused")
    assert backward.cases == 1 and backward.error == pytest.approx(0.01, rel=0.01)
    assert "in float32, backward: dh0 is off by 0.01 of its largest value" in backward.reason
    assert str(found).endswith(f"cpu kernels refused: {backward.reason}")


def test_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found replaces what was known, in this process and on disk."""
    monkeypatch.setattr(_ops, "kernel_devices", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(rnnkernels._backends.triton, "INSTALLED", False)
    monkeypatch.setattr(rnnkernels._backends.devices, "cannot_run", lambda device: None)
    vetting = rnnkernels._backends.vetting
    with on_gpu(tmp_path) as kernels:
        kernels.wrong["grid"] = "y", torch.zeros_like
        with pytest.warns(RuntimeWarning):
            vetting.settle("cuda", GPU, "grid", "bfloat16")
        kernels.wrong.clear()
        kernels.wrong["cluster"] = "dh0", torch.zeros_like
        kernels.absent.add("cluster wavefront")
        found = rnnkernels.verify("cuda")
        assert found.device == GPU and not found.ok
        verdicts: dict[str, set[str]] = {}
        for row in found.rows:
            verdicts.setdefault(row.family, set()).add(row.verdict)
        assert verdicts == {
            "cuda stepwise": {"passed"},
            "cuda grid": {"passed"},
            "cuda cluster": {"passed", "refused"},  # forward and backward
            "cuda grid wavefront": {"passed"},
            "cuda cluster wavefront": {"not here"},
            **{f"triton {family}": {"not here"} for family in runners.Triton.families},
            "cpu kernels": {"not here"},
            "reference loop": {"not here"},
        }
        numbers = {row.numbers for row in found.rows if row.family == "cuda grid"}
        assert numbers == {"tf32", "bfloat16", "float16", "float64"}  # as torch's settings are
        assert list(vetting.refused("cuda", GPU)) == ["cluster"]
        ran = len(kernels.ran)
        vetting.forget()
        assert vetting.settle("cuda", GPU, "grid", "bfloat16")
        assert len(kernels.ran) == ran


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ("meta", ValueError, r"device: expected a CPU or a GPU \(cuda\), got 'meta'"),
        ("cuda:64", RuntimeError, "device: expected a GPU that is here, of .*got 'cuda:64'"),
    ],
)
def test_devices_that_cannot_be_checked(device: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rnnkernels.verify(device)
