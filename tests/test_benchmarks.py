"""The benchmarks at tiny sizes: that they run, agree with themselves and refuse bad arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm")

from benchmarks import cases, report, run, timing, truncated

SHAPE = cases.Shape(10, 2, 3, 4)


@pytest.fixture(autouse=True)
def keep_threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_run_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "records" / "run.json"
    arguments = ["--layer=GRU", "--shape=5,2,3,4", "--repeats=2", "--threads=1"]
    assert run.main([*arguments, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["threads"] == 1 and record["command"].startswith("python -m benchmarks.run")
    assert report.times(record["rows"]) in capsys.readouterr().out
    assert report.main([str(out)]) == 0
    assert "| geometric mean |" in capsys.readouterr().out


def test_truncated_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truncated, "PEAK_SIZE", 64)
    out = tmp_path / "truncated.json"
    arguments = ["--cell=LSTM", "--batch=2", "--window=3", "--steps=10", "--hidden=8"]
    assert truncated.main([*arguments, "--repeats=2", "--threads=1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["shape"], row["window"]) == ("10,2,8,8", 3)
    assert row["ratio"] == row["loop"]["ms"] / row["ours"]["ms"]
    assert row["ratio_at_peak"] == pytest.approx(
        row["loop"]["ms"] / (row["gflop"] / row["peak"]["gflop_per_s"] * 1e3)
    )
    assert report.main([str(out)]) == 0
    assert capsys.readouterr().out in printed


def test_the_loop_gives_the_gradients_of_all_chunks() -> None:
    """With a window of the whole sequence, those of one call; with less, others."""
    pair = cases.build("GRU", SHAPE, torch.float64)
    whole = timing.forward_backward(pair.theirs, pair)
    timing.agree(truncated.chunk_loop(pair.theirs, pair, SHAPE.T), whole, 1e-12)
    with pytest.raises(AssertionError, match="results differ by"):
        timing.agree(truncated.chunk_loop(pair.theirs, pair, 4), whole, 1e-3)


def test_work_of_a_case() -> None:
    for cell, gates in {"RNN": 1, "GRU": 3, "LSTM": 4}.items():
        flop = truncated.Case(cell, SHAPE, 2).gflop * 1e9
        assert flop == pytest.approx(2 * 3 * 10 * 2 * gates * (3 * 4 + 4 * 4))


def test_peak_memory_is_that_of_the_run() -> None:
    """4096 steps of 4 rows keep 16 MiB in y and as much in dx, which no allocator can hide."""
    case = truncated.Case("RNN", cases.Shape(4096, 4, 256, 256), 64)
    assert 30 < truncated.peak_memory("full", case, threads=1) < 200


def test_the_suite_and_what_is_asked_for() -> None:
    def selected(*arguments: str) -> list[tuple[str, int, int]]:
        found = truncated.selected(truncated.arguments(list(arguments)))
        return [(case.cell, case.shape.B, case.k) for case in found]

    assert len(selected()) == 15 and ("LSTM", 64, 32) in selected()
    assert selected("--cell=GRU", "--batch=3", "--batch=5") == [("GRU", 3, 32), ("GRU", 5, 32)]
    assert selected("--cell=RNN", "--window=4") == [("RNN", 8, 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "1"], "argument --repeats: expected a whole number of at least 2, got '1'"),
        (["--threads", "0"], "argument --threads: expected a whole number of at least 1, got '0'"),
        (["--window", "-3"], "argument --window: expected a whole number of at least 1, got '-3'"),
        (["--batch", "x"], "argument --batch: expected a whole number of at least 1, got 'x'"),
        (["--window=9", "--steps=8"], "argument --window: expected at most --steps 8, got 9"),
        (["--cell", "MGU"], "argument --cell: invalid choice: 'MGU'"),
    ],
)
def test_bad_arguments_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        truncated.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
