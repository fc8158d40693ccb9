"""The benchmarks at tiny sizes: that they run, catch what is wrong and refuse bad arguments."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm")

import rnnkernels as rk
from benchmarks import (
    cases,
    concurrent,
    contest,
    correctness,
    device,
    problem,
    providers,
    report,
    run,
    suites,
    timing,
)
from benchmarks.cases import Case, Shape
from benchmarks.correctness import WrongResult
from benchmarks.problem import Inputs, Runner

SHAPE = Shape(10, 2, 3, 4)
QUICK = ["--repeats=2", "--threads=1"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short samples and small floors; no problem left from a test before."""
    monkeypatch.setattr(timing, "SAMPLE_MS", 0.1)
    monkeypatch.setattr(concurrent, "SECONDS", 0.0)
    monkeypatch.setattr(device.Cpu, "gemm_size", 32)
    monkeypatch.setattr(device.Cpu, "copy_bytes", 2**12)
    problem.ready.cache_clear()
    suites._runners.cache_clear()
    yield
    problem.ready.cache_clear()
    suites._runners.cache_clear()


def record_of(tmp_path: Path, *arguments: str, status: int = 0) -> Any:
    out = tmp_path / "records" / "run.json"
    assert run.main([*QUICK, *arguments, "--out", str(out)]) == status
    return json.loads(out.read_text())


# The command line


def test_run_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modes = ["--mode=inference", "--mode=forward", "--mode=training"]
    record = record_of(tmp_path, "--cell=GRU", "--shape=5,2,3,4", *modes)
    printed = capsys.readouterr().out
    assert record["threads"] == 1 and record["command"].startswith("python -m benchmarks.run")
    assert [row["mode"] for row in record["rows"]] == ["inference", "forward", "training"]
    for row in record["rows"]:
        assert set(row["results"]) == {"torch.nn", "rnnkernels"} and not row["refused"]
        assert all(0 < len(found["samples_ms"]) == 2 for found in row["results"].values())
        assert row["floors"]["gemm"]["rate"] > 0
    assert report.main([str(tmp_path / "records" / "run.json")]) == 0
    assert capsys.readouterr().out == printed
    assert "| geometric mean |" in printed and "## suite-times" in printed


@pytest.mark.parametrize(
    ("suite", "shape", "view"),
    [
        ("off-suite", "5,2,3,4", "off-suite"),
        ("cells", "1,2,3,4", "cells"),
        ("sequences", "40,3,3,4", "sequences"),
        ("ragged", "9,3,3,4", "ragged"),
        ("serving", "1,2,3,4", "serving"),
        ("serving-weights", "5,2,3,4", "serving-weights"),
        ("serving-weights", "1,2,3,4", "serving-weights"),
        ("concurrent", "5,2,3,4", "concurrent"),
        ("bfloat16", "5,2,3,4", "bfloat16"),
        ("peak", "5,2,3,4", "peak"),
        ("scaling", "5,2,3,4", "scaling"),
        ("breakdown", "5,2,3,4", "breakdown"),
        ("truncated", "70,2,3,4", "truncated"),
        ("recompute", "20,2,3,4", "recompute"),
        ("derivatives", "5,2,3,4", "derivatives"),
        ("flow", "5,2,3,4", "flow"),
    ],
)
def test_every_suite_runs(
    suite: str, shape: str, view: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = [mode for mode in suites.SUITES[suite].modes if mode != "memory"]
    options = [f"--mode={mode}" for mode in modes]
    record = record_of(tmp_path, f"--suite={suite}", f"--shape={shape}", *options)
    assert f"## {view}\n" in capsys.readouterr().out
    assert {row["mode"] for row in record["rows"]} == set(modes)
    for row in record["rows"]:
        assert row["results"] and row["wrong"] == {}
        assert all("not installed" in reason for reason in row["refused"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats=1"], "argument --repeats: expected a whole number of at least 2, got '1'"),
        (["--threads=0"], "argument --threads: expected a whole number of at least 1, got '0'"),
        (["--shape=1,2,3"], "argument --shape: expected four sizes above zero as T,B,I,H"),
        (["--shape=1,2,3,0"], "argument --shape: expected four sizes above zero as T,B,I,H"),
        (["--cell=MGU"], "argument --cell: invalid choice: 'MGU'"),
        (["--suite=sweet"], "argument --suite: invalid choice: 'sweet'"),
        (["--suite=flow", "--mode=inference"], "suite flow takes training, got inference"),
        (["--suite=cells", "--cell=GRU"], "argument --cell: suite cells has RNNCell"),
        (["--suite=cells", "--shape=2,1,3,4"], "a cell takes one step, T=1, got 2,1,3,4"),
        (
            ["--suite=flow", "--layers=2"],
            "for suites suite, off-suite, bfloat16, peak, gpu, gpu-stacks, recompute, got",
        ),
        (["--suite=flow", "--compare=haste"], "suite flow compares its own ways"),
        (["--suite=flow", "--backend=cpu", "--backend=reference"], "compares its own ways"),
        (["--suite=gpu"], "argument --device: suite gpu runs on cuda alone"),
        (
            ["--window=4"],
            "argument --window: only for suites truncated, recompute, got suite suite",
        ),
        (["--suite=truncated", "--shape=8,1,2,3", "--window=9"], "expected at most T=8 of 8,1,2,3"),
    ],
)
def test_bad_arguments_are_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(run, "measure", lambda args: pytest.fail("it starts to measure"))
    with pytest.raises(SystemExit) as exit:
        run.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run.main(["--device=cuda"])
    assert exit.value.code == 2
    assert "argument --device: cuda: torch sees no CUDA device" in capsys.readouterr().err


def selected(*arguments: str) -> list[Case]:
    args = run.arguments(list(arguments))
    return [case for name in args.suite for case in run.selected(suites.SUITES[name], args)]


def test_what_is_selected() -> None:
    assert len(selected()) == 24 and len(selected("--suite=cells")) == 9
    off = selected("--suite=off-suite", "--cell=LSTM")
    assert len({case.shape for case in off} - set(cases.SUITE)) == len(off) >= 10
    assert {case.directions for case in off} == {case.layers for case in off} == {1, 2}
    assert selected("--cell=GRU", "--shape=10,2,3,4", "--directions=2", "--dtype=float64") == [
        Case("GRU", SHAPE, directions=2, dtype="float64")
    ]
    windows = selected("--suite=truncated", "--cell=RNN", "--shape=64,2,3,4", "--window=8")
    assert windows == [Case("RNN", Shape(64, 2, 3, 4), window=8)]


def test_work_of_a_case() -> None:
    for cell, gates in {"RNN": 1, "GRU": 3, "LSTM": 4, "LSTMCell": 4}.items():
        flop = Case(cell, SHAPE).gflop("training") * 1e9
        assert flop == pytest.approx(2 * 3 * 10 * 2 * gates * (3 * 4 + 4 * 4))
        assert Case(cell, SHAPE).gflop("forward") * 3e9 == pytest.approx(flop)
    stack = Case("RNN", SHAPE, directions=2, layers=2).gflop("inference") * 1e9
    first, second = 2 * (3 * 4 + 4 * 4), 2 * (8 * 4 + 4 * 4)
    assert stack == pytest.approx(2 * 10 * 2 * (first + second))


# Timing


def test_samples_are_taken_in_turns() -> None:
    order: list[str] = []

    def sample(name: str) -> float:
        order.append(name)
        return float(len(order))

    samplers = {name: partial(sample, name) for name in "abc"}
    times = timing.in_turns(samplers, 4, lambda: order.append("redraw"))
    assert "".join(order).split("redraw") == ["", "abc", "bca", "cab", "abc"]
    assert times["a"] == [2.0, 8.0, 11.0, 14.0] and len(times["c"]) == 4


class Clock(device.Cpu):
    """Every call takes half a millisecond."""

    def time(self, run: Any, calls: int) -> float:
        for _ in range(calls):
            run()
        return 0.5


def test_short_calls_are_timed_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SAMPLE_MS", 5.0)
    calls: list[None] = []
    sample = timing.sampler(lambda: calls.append(None), Clock())
    assert len(calls) == 2  # one to warm up, one to find the number of calls
    assert sample() == 0.5 and len(calls) == 2 + 1 + 10
    monkeypatch.setattr(timing, "SAMPLE_MS", 0.4)
    calls.clear()
    sample = timing.sampler(lambda: calls.append(None), Clock())
    assert sample() == 0.5 and len(calls) == 3


def test_summary_is_median_and_quartiles() -> None:
    assert timing.summary([1.0, 9.0, 4.0, 2.0, 3.0]) == {"ms": 3.0, "spread": 5.0 / 3.0}


def test_inputs_are_drawn_anew() -> None:
    ready = problem.Problem(Case("LSTM", SHAPE))
    before = [t.clone() for t in (*ready.timed[0].leaves, ready.timed[0].dy)]
    fixed = ready.checked.leaves[0].clone()
    ready.redraw()
    for old, new in zip(before, (*ready.timed[0].leaves, ready.timed[0].dy), strict=True):
        assert new.abs().max() > 0 and not torch.equal(old, new)
    assert torch.equal(fixed, ready.checked.leaves[0])  # what results were computed from


# Correctness


def test_a_wrong_output_is_caught_before_timing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = rk.GRU.forward

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        y, h_n = forward(self, *args, **kwargs)
        return y * 1.001, h_n

    timed: list[Any] = []
    monkeypatch.setattr(rk.GRU, "forward", wrong)
    real = timing.sampler
    monkeypatch.setattr(
        timing, "sampler", lambda run, where: (timed.append(run), real(run, where))[1]
    )
    modes = ["--mode=inference", "--mode=training"]
    record = record_of(tmp_path, "--suite=off-suite", "--cell=GRU", "--shape=5,2,3,4", "--layers=1",
                       "--directions=1", *modes, status=1)  # fmt: skip
    captured = capsys.readouterr()
    assert len(timed) == 2  # torch.nn in two modes
    for row in record["rows"]:
        assert list(row["results"]) == ["torch.nn"] and list(row["wrong"]) == ["rnnkernels"]
        assert "where float32 may be off by 2e-05" in row["wrong"]["rnnkernels"]
    assert "rnnkernels is WRONG, and was not timed: output 0 is off by" in captured.err
    assert "rnnkernels is WRONG" in captured.out


def test_a_wrong_gradient_is_caught_where_outputs_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Off(Runner):
        def gradients(self, inputs: Inputs) -> Sequence[torch.Tensor]:
            *others, last = super().gradients(inputs)
            return [*others, last * 1.01]

    monkeypatch.setitem(
        providers._BUILDERS, "haste", lambda p: Off(p.template, p.template.parameters())
    )
    arguments = ["--cell=LSTM", "--shape=5,2,3,4", "--compare=haste"]
    record = record_of(tmp_path, *arguments, "--mode=inference", "--mode=training", status=1)
    inference, training = record["rows"]
    assert set(inference["results"]) == {"haste", "rnnkernels"}
    assert "gradient of parameter 3 is off by" in training["wrong"]["haste"]


def test_errors_have_names() -> None:
    right = {"output 0": torch.ones(2, 2, dtype=torch.float64)}
    assert correctness.largest_error({"output 0": torch.ones(2, 2)}, right, "float32") == 0
    with pytest.raises(WrongResult, match=r"expected shape \[2, 2\], got \[2\]"):
        correctness.largest_error({"output 0": torch.ones(2)}, right, "float32")
    with pytest.raises(WrongResult, match="output 0 is off by inf"):
        nan = {"output 0": torch.full((2, 2), float("nan"))}
        correctness.largest_error(nan, right, "float32")
    with pytest.raises(WrongResult, match="expected output 0; got"):
        correctness.largest_error({}, right, "float32")


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("cell", ["LSTM", "GRUCell"])
def test_all_dtypes_are_right_and_none_is_a_copy_of_the_oracle(cell: str, dtype: str) -> None:
    shape = Shape(1 if cell == "GRUCell" else 10, 2, 3, 4)
    ready = problem.Problem(Case(cell, shape, dtype=dtype))
    found = contest.of_runners(ready, "training", {"ours": providers.build("rnnkernels", ready)})
    errors, wrong = contest.judge(found)
    assert not wrong and (errors["ours"] > 0 or dtype == "float64")


# Providers


@pytest.mark.parametrize(
    ("option", "name", "reason"),
    [
        ("--compare=flashrnn", "flashrnn", "it runs on CUDA devices alone"),
        ("--compare=haste", "haste", "it runs on CUDA devices alone"),
        ("--compare=torch.compile", "torch.compile", "does not support RNN, GRU, or LSTM"),
        ("--backend=cuda", "rnnkernels:cuda", "cuda"),
    ],
)
def test_who_refuses_is_reported(
    option: str, name: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--cell=LSTM", "--shape=5,2,3,4", "--mode=inference", option]
    (row,) = record_of(tmp_path, *arguments)["rows"]
    assert reason in row["refused"][name] and name not in row["results"]
    assert f"{name} refuses: {row['refused'][name]} (suite: LSTM 5,2,3,4" in capsys.readouterr().out


@pytest.mark.parametrize("suite", [s.name for s in suites.SUITES.values() if "cpu" in s.devices])
def test_a_record_may_hold_nothing_but_refusals(
    suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = "70,2,3,4" if suite != "cells" else "1,2,3,4"
    others = ["--compare=haste"] if suites.SUITES[suite].providers else []
    mode = f"--mode={suites.SUITES[suite].modes[0]}"
    arguments = [f"--suite={suite}", f"--shape={shape}", mode, "--backend=cuda", *others]
    for row in record_of(tmp_path, *arguments)["rows"]:
        assert row["results"] == row["wrong"] == {} and "rnnkernels:cuda" in row["refused"]
    out = capsys.readouterr().out
    assert "* rnnkernels:cuda refuses: " in out and f"## {suite}" not in out


def test_a_provider_that_is_not_installed_says_so() -> None:
    ready = problem.Problem(Case("LSTM", SHAPE))
    object.__setattr__(ready.case, "device", "cuda")
    with pytest.raises(providers.Refused, match="not installed"):
        providers.build("haste", ready)


def test_backends_of_ours_are_told_apart(tmp_path: Path) -> None:
    arguments = ["--cell=RNN", "--shape=5,2,3,4", "--mode=inference"]
    (row,) = record_of(tmp_path, *arguments, "--backend=reference", "--backend=torch")["rows"]
    assert list(row["results"]) == ["torch.nn", "rnnkernels:reference", "rnnkernels:torch"]
