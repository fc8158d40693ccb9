"""The suites of benchmarks with ways of their own, and the measurement of memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm")

from benchmarks import (
    breakdown,
    cases,
    concurrent,
    contest,
    correctness,
    device,
    flow,
    memory,
    problem,
    providers,
    record,
    run,
    sequences,
    truncated,
    written,
)
from benchmarks.cases import Case, Shape
from benchmarks.correctness import WrongResult
from benchmarks.problem import Inputs, Runner

SHAPE = Shape(10, 2, 3, 4)


def test_the_chunk_loop_gives_the_gradients_of_all_chunks() -> None:
    """With a window of the whole sequence, those of one call; with less, others."""
    ready = problem.Problem(Case("GRU", SHAPE, dtype="float64"))
    for window, equal in ((SHAPE.T, True), (4, False)):
        found = truncated.ChunkLoop(ready.template, window).results(ready.checked, grad=True)
        if equal:
            assert correctness.largest_error(found, ready.gradients, "float64") < 1e-12
        else:
            with pytest.raises(WrongResult, match="gradient of input 0 is off"):
                correctness.largest_error(found, ready.gradients, "float64")


@pytest.mark.parametrize("case", written.CASES, ids=str)
def test_the_loops_over_written_cells(case: Case) -> None:
    """Ours and the loop, in evaluation; in training the loop draws."""
    small = replace(case, shape=Shape(5, 2, 3, 8), dtype="float64")
    ready = written.WrittenProblem(small)
    ours = written.InTraining(ready.template, list(ready.template.parameters()))
    found = ours.results(ready.checked, grad=True)
    assert correctness.largest_error(found, ready.gradients, "float64") < 1e-12
    loop = written.loop_over(ready.template).train()
    x = ready.checked.arguments[0]
    assert torch.equal(loop(x), loop(x)) == (small.variant in ("", "layer norm"))


def test_products_of_written_cells() -> None:
    """Beside an LSTM's of four gates, with as many inputs as units."""
    lstm = Case("LSTM", SHAPE)
    half = replace(lstm, shape=replace(SHAPE, I=SHAPE.H))
    for case, share in (
        (replace(half, cell="MGU"), 2 / 4),
        (replace(half, cell="IndRNN"), 1 / 8),
        (replace(half, cell="SLSTM", heads=4), 5 / 8),
    ):
        assert case.gflop("training") == pytest.approx(share * half.gflop("training"))


@pytest.mark.parametrize("cell", cases.LAYERS)
def test_the_loops_over_episodes_are_those_of_resets(cell: str) -> None:
    ready = problem.Problem(Case(cell, Shape(12, 3, 2, 4), dtype="float64"))
    reset = torch.zeros(12, 3, dtype=torch.bool)
    reset[[0, 3, 3, 11], [1, 0, 2, 0]] = True
    rows, cuts = [sequences.pieces(r) for r in reset.unbind(1)], sequences.pieces(reset.any(1))
    assert rows == [[3, 8, 1], [12], [3, 9]] and cuts == [3, 8, 1]
    x, module = ready.checked.leaves[0], ready.template
    by_row = sequences.loop_over_rows(module, rows, x)
    torch.testing.assert_close(by_row, sequences.loop_over_cuts(module, cuts, reset, x))
    ours = providers.our_module(ready, "auto")
    torch.testing.assert_close(by_row, ours(x, reset=reset)[0])
    assert not torch.allclose(by_row, ours(x)[0])


def test_a_caller_that_fails_stops_all() -> None:
    failing = threading.local()

    def call(x: torch.Tensor) -> torch.Tensor:
        if not hasattr(failing, "seen"):
            raise RuntimeError("out of order")
        return x

    inputs = problem.Problem(Case("RNN", SHAPE)).checked
    with pytest.raises(RuntimeError, match="out of order"):
        concurrent.run_at_once(Runner(call, []), inputs, 3, 1, 0.0)


def test_results_of_every_caller_are_checked() -> None:
    ready = problem.Problem(Case("RNN", SHAPE))
    lock, calls = threading.Lock(), [0]

    def call(x: torch.Tensor) -> Any:
        with lock:
            calls[0] += 1
            wrong = calls[0] == 5  # each caller warms up first: one of the results that count
        y, h_n = ready.template(x)
        return (y + 1 if wrong else y), h_n

    runner = Runner(call, ready.template.parameters())
    with pytest.raises(WrongResult, match="output 0 is off"):
        concurrent.check(ready, runner, callers=4, threads=1)
    assert concurrent.check(ready, runner, callers=4, threads=1) < 1e-6


def test_callers_leave_the_number_of_threads_alone() -> None:
    ready = problem.Problem(Case("RNN", SHAPE))
    torch.set_num_threads(2)
    runner = providers.build("torch.nn", ready)
    seconds, last = concurrent.run_at_once(runner, ready.checked, 2, 1, 0.0)
    assert seconds > 0 and len(last) == 2 and torch.get_num_threads() == 2
    seen: list[int] = []  # by a new thread: the number that was set last, by any
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [2]


def test_a_record_that_changes_a_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = contest.Setup(1, 2, (), ("auto",))
    case = Case("RNN", SHAPE)
    assert contest.judge(flow.compete(case, "training", setup))[1] == {}
    real = flow.Recorded.gradients

    def nudged(self: Any, inputs: Inputs) -> Sequence[torch.Tensor]:
        first, *others = real(self, inputs)
        return [torch.nextafter(first, first + 1), *others]

    monkeypatch.setattr(flow.Recorded, "gradients", nudged)
    _, wrong = contest.judge(flow.compete(case, "training", setup))
    assert "changes where gradient_flow records it" in wrong["recorded"]


def test_the_cost_of_recording_is_that_of_neighbours() -> None:
    samples = {"plain": [1.0, 10.0, 2.0], "recorded": [1.1, 10.5, 2.4]}
    row = {"results": {name: {"samples_ms": ms} for name, ms in samples.items()}}
    flow.finish(Case("RNN", SHAPE), "training", row)
    assert row["cost"] == pytest.approx(0.1)


def test_parts_are_held_against_the_total() -> None:
    ms = {"total": 10.0, "op": 8.0, "loop": 6.0, "product": 4.0, "overhead": 1.0}
    row: dict[str, Any] = {
        "results": {name: {"ms": value} for name, value in ms.items()},
        "floors": {"gemm": {"rate": 2.0}, "copy": {"rate": 4.0}},
        "wrong": {},
    }
    breakdown.finish(Case("LSTM", SHAPE), "inference", row)
    parts = {part["name"]: part for part in row["parts"]}
    assert [part["ms"] for part in row["parts"]] == [2.0, 4.0, 2.0, 1.0]
    # 2 * 4 gates * T B H (I or H) operations at 2 GFLOP/s; T B H floats of 4 bytes at 4 GB/s
    assert parts["input projection"]["floor_ms"] == pytest.approx(8 * 80 * 3 / 2e6)
    assert parts["forward recurrent product"]["floor_ms"] == pytest.approx(8 * 80 * 4 / 2e6)
    assert parts["forward cell"]["floor_ms"] == pytest.approx(80 * 4 / 4e6)
    assert row["unexplained_ms"] == pytest.approx(1.0) and "warning" not in row
    row["results"]["total"]["ms"] = 12.0
    breakdown.finish(Case("LSTM", SHAPE), "inference", row)
    assert "+25% of the total unexplained, more than the margin of 15%" in row["warning"]


# Memory


def test_the_peak_is_that_of_all_that_lives_at_once() -> None:
    def one_after_the_other() -> None:
        torch.empty(3 * 2**20, dtype=torch.uint8)
        torch.empty(2 * 2**20, dtype=torch.uint8)

    def at_once() -> list[torch.Tensor]:
        return [torch.empty(n * 2**20, dtype=torch.uint8) for n in (3, 2)]

    assert device.Cpu().peak_allocated(one_after_the_other) == 3 * 2**20
    assert device.Cpu().peak_allocated(at_once) == 5 * 2**20


def _allocate(mib: int) -> dict[str, float]:
    def ones(n: int) -> torch.Tensor:
        return torch.ones(n * 2**20, dtype=torch.uint8)

    found = memory.measure(lambda: ones(mib), lambda: ones(1), "cpu")
    return {**found, "pid": float(os.getpid())}


def test_memory_is_measured_in_a_fresh_process() -> None:
    found = memory.in_fresh_process(_allocate, 64)
    assert found["peak_mib"] == 64 and 60 < found["resident_mib"] < 80
    assert found["pid"] != os.getpid()


def test_memory_of_a_training_step(tmp_path: Path) -> None:
    """1024 steps of 16 rows keep 16 MiB in y and as much in dx, which no allocator can hide.

    torch.nn's graph of one node per operation is in the resident memory alone.
    """
    out = tmp_path / "run.json"
    arguments = ["--mode=memory", "--cell=RNN", "--shape=1024,16,256,256", "--threads=1"]
    assert run.main([*arguments, "--out", str(out)]) == 0
    (row,) = record.read(out)["rows"]
    for found in row["results"].values():
        assert 32 < found["peak_mib"] < 100 and found["error"] < 1e-4
        assert found["resident_mib"] > 30
    assert row["results"]["rnnkernels"]["resident_mib"] < 100
