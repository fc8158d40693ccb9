"""``python -m rnnkernels``: what it tells, what it checks, its exit codes."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import rnnkernels
from helpers import run_python
from rnnkernels import _ops
from rnnkernels.__main__ import main
from rnnkernels.diagnostics import Row, Verification
from rnnkernels.diagnostics._report import report

pytest.importorskip("rnnkernels._C", reason="needs the compiled extension")


def test_what_a_report_needs() -> None:
    done = run_python("-m", "rnnkernels", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    rows = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in done.stdout.splitlines()}
    assert rows["torch"] == torch.__version__
    assert rows["rnnkernels"].startswith(rnnkernels.__version__)
    assert rows["kernels for the CPU"].startswith(_ops.build_info()["cpu_capability"])
    assert rows["OMP_NUM_THREADS"] == "1"
    assert rows["An LSTM on cpu:"] and rows["bfloat16"] == "run by cpu"
    here = importlib.util.find_spec("triton") is not None
    assert ("input is on cpu" if here else "Triton is not installed") in rows["not triton"]


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ops, "missing", "undefined symbol")
    assert "kernels  missing: undefined symbol" in report("1.0")


@pytest.mark.parametrize(("verdict", "code"), [("passed", 0), ("refused", 1)])
def test_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verdict: str, code: int
) -> None:
    asked = []

    def verify(device: Any) -> Verification:
        asked.append(device)
        row = Row("cpu kernels", "forward", "float32", 1, 0.0, verdict, 0.0, "wrong")
        return Verification(torch.device(device), (row,))

    monkeypatch.setattr(rnnkernels, "verify", verify)
    assert main(["--check"]) == code
    assert asked[0] == "cpu" and len(asked) == 1 + torch.cuda.device_count()
    assert main([]) == 0 and len(asked) == 1 + torch.cuda.device_count()
    assert "An LSTM on cpu" in capsys.readouterr().out


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--what"])
    assert left.value.code == 2
    assert "unrecognized arguments: --what" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"{rnnkernels.__version__}\n"
