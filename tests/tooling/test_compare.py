"""Two records compared: what counts as a change, what is listed, and the exit status."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tqdm")

from benchmarks import compare, record
from small_records import a_record, row

# Of small_records: a spread of 0.1, that is 0.1 ms of 1 ms.
OLD = a_record(row("RNN", "inference", 4.0, 1.0), row("GRU", "training", 8.0, 2.0))


@pytest.fixture
def compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command on two records: its status, and what it prints or says is wrong."""

    def run(old: Any, new: Any, *options: str) -> tuple[int, str]:
        paths = [tmp_path / "old.json", tmp_path / "new.json"]
        for path, found in zip(paths, (old, new), strict=True):
            if isinstance(found, str):
                path.write_text(found)
            elif found is not None:
                record.write(path, found)
        try:
            status = compare.main([*map(str, paths), *options])
        except SystemExit as exit:
            assert exit.code == 2
            said = capsys.readouterr()
            assert not said.out
            return 2, said.err
        return status, capsys.readouterr().out

    return run


def of_ways(*times: dict[str, float]) -> list[Any]:
    """A record for each, with one row of these ways in milliseconds."""
    results = [{way: {"ms": ms, "spread": 0.1} for way, ms in each.items()} for each in times]
    return [a_record(row("RNN", "inference", None, None, results=each)) for each in results]


def in_rounds(torch_ms: list[float], ours_ms: list[float]) -> Any:
    """A record with one row, of these samples."""
    times = {"torch.nn": torch_ms, "rnnkernels": ours_ms}
    results = {
        way: {**compare.timing.summary(samples), "samples_ms": samples}
        for way, samples in times.items()
    }
    return a_record(row("RNN", "inference", None, None, results=results))


def test_nothing_changed(compared: Any) -> None:
    status, out = compared(OLD, OLD)
    assert status == 0
    assert "| suite: RNN 5,2,3,4 inference | rnnkernels | 1.00 ± 5 % ms | 1.00 ± 5 % ms |" in out
    assert "0 of 2 figures of ours are worse beyond their spread, 0 better." in out
    assert "only in" not in out and "## worse" not in out


def test_what_is_slower_beyond_the_spread_is_named(compared: Any) -> None:
    new = a_record(row("RNN", "inference", 4.0, 1.2), row("GRU", "training", 8.0, 1.0))
    status, out = compared(OLD, new)
    assert status == 1
    assert out.endswith(
        "## worse beyond the spread: 1\n\n"
        "* suite: RNN 5,2,3,4 inference, rnnkernels: 1.00 ± 5 % ms -> 1.20 ± 5 % ms\n\n"
        "1 of 2 figures of ours are worse beyond their spread, 1 better. "
        "torch.nn's own times: old / new 1.000, the geometric mean of 2.\n"
    )
    assert "| 2.00 ± 5 % ms | 1.00 ± 5 % ms | 2.000 | better |" in out


@pytest.mark.parametrize(
    ("ms", "old_spread", "new_spread", "status"),
    [
        (1.1, 0.1, 0.1, 0),
        (1.15, 0.1, 0.1, 1),
        (1.3, 0.1, 0.1, 1),
        (1.3, 0.1, 0.5, 0),
        (1.3, 0.5, 0.1, 0),
        (0.5, 0.1, 0.1, 0),
    ],
)
def test_the_larger_spread_counts(
    ms: float, old_spread: float, new_spread: float, status: int, compared: Any
) -> None:
    old, new = of_ways({"x": 1.0}, {"x": ms})
    old["rows"][0]["results"]["x"]["spread"] = old_spread
    new["rows"][0]["results"]["x"]["spread"] = new_spread
    assert compared(old, new)[0] == status


def test_others_may_get_slower(compared: Any) -> None:
    new = a_record(row("RNN", "inference", 8.0, 1.0), row("GRU", "training", 16.0, 2.0))
    status, out = compared(OLD, new)
    assert status == 0
    assert "torch.nn's own times: old / new 0.500, the geometric mean of 2." in out
    assert "| suite | GRU | training | torch.nn | 1 | 0.500 | 1 | 0 |" in out
    for way in ("torch.compile", "onnxruntime", "openvino", "haste", "torch.nn packed"):
        assert compared(*of_ways({way: 1.0}, {way: 2.0}))[0] == 0
    for way in ("packed", "rnnkernels:reference", "total"):
        assert compared(*of_ways({way: 1.0}, {way: 2.0}))[0] == 1


def test_geometric_means(compared: Any) -> None:
    old = a_record(
        row("RNN", "inference", 4.0, 1.0),
        row("RNN", "inference", 4.0, 1.0, shape="6,2,3,4"),
        row("RNN", "inference", 4.0, 1.0, suite="peak"),
    )
    new = a_record(
        row("RNN", "inference", 4.0, 2.0),
        row("RNN", "inference", 4.0, 8.0, shape="6,2,3,4"),
        row("RNN", "inference", 4.0, 0.5, suite="peak"),
    )
    out = compared(old, new)[1]
    assert "| suite | RNN | inference | rnnkernels | 2 | 0.250 | 2 | 0 |" in out
    assert "| peak | RNN | inference | rnnkernels | 1 | 2.000 | 0 | 1 |" in out


@pytest.mark.parametrize(
    "more",
    [
        {"suite": "peak"},
        {"shape": "6,2,3,4"},
        {"dtype": "float64"},
        {"directions": 2},
        {"layers": 2},
        {"threads": 1},
        {"window": 2},
        {"variant": "step"},
    ],
)
def test_rows_of_other_cases_are_listed(more: dict[str, Any], compared: Any) -> None:
    """And not compared with each other, were one a hundred times slower."""
    same, one = OLD["rows"][1], row("RNN", "inference", 400.0, 100.0, **more)
    status, out = compared(OLD, a_record(same, one))
    assert status == 0
    assert "## only in old: 1\n\n* suite: RNN 5,2,3,4 inference (torch.nn, rnnkernels)\n" in out
    assert f"## only in new: 1\n\n* {compare.name(one)} (torch.nn, rnnkernels)\n" in out
    assert compare.name(one) != compare.name(OLD["rows"][0])
    assert "0 of 1 figures of ours" in out


def test_ways_that_only_one_has_are_listed(compared: Any) -> None:
    out = compared(*of_ways({"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0}))[1]
    assert "## only in old: 1\n\n* suite: RNN 5,2,3,4 inference (b)\n" in out
    assert "## only in new: 1\n\n* suite: RNN 5,2,3,4 inference (c)\n" in out


@pytest.mark.parametrize("what", ["wrong", "refused"])
def test_what_no_longer_works_is_worse(what: str, compared: Any) -> None:
    broken = row("RNN", "inference", 4.0, None, **{what: {"rnnkernels": "so it is"}})
    status, out = compared(OLD, a_record(broken, OLD["rows"][1]))
    assert status == 1
    assert "now: 1\n\n* suite: RNN 5,2,3,4 inference, rnnkernels: " + what + ": so it is\n" in out
    assert compared(a_record(broken, OLD["rows"][1]), OLD)[0] == 0
    theirs = row("RNN", "inference", None, 1.0, **{what: {"torch.nn": "so it is"}})
    never = {**OLD["rows"][0], what: {"rnnkernels:cuda": "so it was"}}
    assert compared(OLD, a_record(theirs))[0] == compared(OLD, a_record(never))[0] == 0


@pytest.mark.parametrize(("peak", "status"), [(8.0, 0), (8.001, 1), (7.0, 0)])
def test_more_memory_is_worse_by_any_amount(peak: float, status: int, compared: Any) -> None:
    rows = [
        row("RNN", "memory", None, None, results={"torch.nn": other, "rnnkernels": mine})
        for other, mine in (({"peak_mib": 16.0}, {"peak_mib": mib}) for mib in (8.0, peak))
    ]
    old, new = map(a_record, rows)
    found, out = compared(old, new)
    assert found == status and f"| 8.000 MiB | {peak:.3f} MiB |" in out
    assert "torch.nn's own times" not in out
    found, out = compared(old, new, "--relative")
    assert found == status and f"| 0.500 ± 0 % | {peak / 16:.3f} ± 0 % |" in out


@pytest.mark.parametrize(
    ("field", "value"),
    [("processor", "Another"), ("threads", 4), ("torch", "9.8"), ("device", "cuda"), ("gpu", "G")],
)
def test_times_of_other_surroundings_are_refused(field: str, value: Any, compared: Any) -> None:
    new = {**OLD, field: value}
    new["rows"] = new.pop("rows")  # record.write() wants them last
    status, err = compared(OLD, new)
    assert status == 2
    expected = f"{field}: expected the same in both records, got {OLD.get(field)!r} and {value!r}"
    assert expected in err and "--relative" in err
    assert compared(OLD, new, "--relative")[0] == 0


def test_times_with_other_instructions_are_refused(compared: Any) -> None:
    new = {**OLD, "build": {"cpu_capability": "avx10"}}
    status, err = compared(OLD, new)
    assert status == 2 and "cpu_capability: expected the same in both records, got 'avx9'" in err
    assert compared(OLD, new, "--relative")[0] == 0


def test_relative_to_torch(compared: Any) -> None:
    slower = a_record(row("RNN", "inference", 8.0, 2.0), row("GRU", "training", 16.0, 4.0))
    assert compared(OLD, slower)[0] == 1
    status, out = compared(OLD, slower, "--relative")
    assert status == 0
    assert "| rnnkernels | 0.250 ± 0 % | 0.250 ± 0 % | 1.000 |  |" in out
    assert "torch.nn's own times: old / new 0.500, the geometric mean of 2." in out
    assert "| torch.nn |" not in out and "Figures without it, left out: 0." in out
    status, out = compared(slower, {**slower, "rows": OLD["rows"][:1]}, "--relative")
    assert status == 0 and "## only in old: 1\n" in out
    faster = a_record(row("RNN", "inference", 2.0, 1.0))
    assert compared(OLD, faster)[0] == 0
    status, out = compared(OLD, faster, "--relative")
    assert status == 1
    assert "* suite: RNN 5,2,3,4 inference, rnnkernels: 0.250 ± 0 % -> 0.500 ± 0 %\n" in out


def test_rounds_are_divided_one_by_one(compared: Any) -> None:
    """What slows down a whole round is no spread of the ratio."""
    shaken = [1.0, 2.0, 4.0, 8.0]
    old = in_rounds([2 * ms for ms in shaken], shaken)
    new = in_rounds([2 * ms for ms in shaken], [1.1 * ms for ms in shaken])
    assert compared(old, new)[0] == 0
    status, out = compared(old, new, "--relative")
    assert status == 1 and "0.500 ± 0 % -> 0.550 ± 0 %" in out


@pytest.mark.parametrize(("ms", "text", "status"), [(1.2, "0.300", 0), (1.3, "0.325", 1)])
def test_without_samples_spreads_add_up(ms: float, text: str, status: int, compared: Any) -> None:
    records = of_ways({"torch.nn": 4.0, "x": 1.0}, {"torch.nn": 4.0, "x": ms})
    found, out = compared(*records, "--relative")
    assert found == status and f"| 0.250 ± 10 % | {text} ± 10 % |" in out


def test_which_way_of_torch_is_taken(compared: Any) -> None:
    ways = ["torch.nn loop", "torch.nn, 4 callers", "torch.nn, 2 callers"]
    assert compare.baseline("rnnkernels, 2 callers", ways) == "torch.nn, 2 callers"
    assert compare.baseline("rnnkernels, full BPTT", ways[:1]) == "torch.nn loop"
    assert compare.baseline("packed", ["torch.nn packed", "packed"]) == "torch.nn packed"
    assert compare.baseline("plain", ["plain", "recorded"]) is None
    old, new = of_ways({"torch.nn": 2.0, "x": 1.0}, {"torch.nn": 2.0, "x": 1.0})
    for each in (old, new):
        each["rows"].append(row("GRU", "inference", None, 1.0))
    assert "Figures without it, left out: 1." in compared(old, new, "--relative")[1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (None, OLD, "old.json: expected a record that --out wrote: FileNotFoundError"),
        (OLD, None, "new.json: expected a record that --out wrote: FileNotFoundError"),
        ("{", OLD, "old.json: expected a record that --out wrote: JSONDecodeError"),
        (OLD, {**OLD, "format": 1}, "new.json: expected a record of format 2, got 1"),
        (OLD, {**OLD, "rows": []}, "expected records with a figure in common, got none"),
    ],
)
def test_bad_input_is_refused(old: Any, new: Any, message: str, compared: Any) -> None:
    status, err = compared(old, new)
    assert status == 2 and message in err


def test_nothing_beside_torch_is_refused(compared: Any) -> None:
    old, new = of_ways({"plain": 1.0}, {"plain": 1.0})
    assert compared(old, new)[0] == 0
    status, err = compared(old, new, "--relative")
    assert status == 2 and "a figure that has torch.nn beside it in common, got none" in err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        compare.main(["--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and "--relative" in out and "Exit status: 0" in out
