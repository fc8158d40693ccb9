"""Records of benchmarks, and the tables, pictures and documents that are made from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

from benchmarks import readme, record, report
from small_records import a_record, row

ROOT = Path(__file__).parents[2]


SMALL = a_record(
    row("RNN", "inference", 4.0, 2.0),
    row("RNN", "training", 9.0, 10.0),
    row("RNN", "inference", 8.0, 1.0, shape="6,2,3,4"),
    row("RNN", "training", 4.0, 4.0, shape="6,2,3,4"),
    row("GRU", "inference", 3.0, 2.0),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where SMALL stands as a file."""
    found = tmp_path / "small.json"
    record.write(found, SMALL)
    return found


def test_a_record_is_read_as_it_was_written(path: Path) -> None:
    assert record.read(path) == json.loads(path.read_text()) == SMALL
    assert len(path.read_text().splitlines()) < 30  # a line per row


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a record that --out wrote"),
        ("{", "expected a record that --out wrote"),
        ('{"rows": []}', "expected a record that --out wrote"),
        ('{"rows": [], "format": 2}', "expected a record that --out wrote: KeyError('commit')"),
        (json.dumps(a_record({})), "expected a record that --out wrote: KeyError('suite')"),
        (json.dumps(a_record(1)), "expected a record that --out wrote: TypeError("),
        ('{"rows": [], "format": 1}', "expected a record of format 2, got 1"),
    ],
)
def test_other_files_are_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "other.json"
    found.write_text(text)
    with pytest.raises(SystemExit) as exit:
        report.main([str(found)])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_ratios_and_where_ours_loses() -> None:
    assert report.view("suite", SMALL) == "\n".join(
        [
            "| T,B,I,H | RNN: inference / training | GRU: inference / training |",
            "| --- | --- | --- |",
            "| 5,2,3,4 | 2.00 / 0.90 | 1.50 / – |",
            "| 6,2,3,4 | 8.00 / 1.00 | – / – |",
            "| geometric mean | 4.00 / 0.95 | 1.50 / – |",
            "| worst | 2.00 / 0.90 | 1.50 / – |",
            "",
            "Slower than torch.nn: RNN training at 5,2,3,4.",
        ]
    )


def test_summary() -> None:
    assert report.view("summary", SMALL) == "\n".join(
        [
            "| 2 shapes | RNN: inference / training | GRU: inference / training |",
            "| --- | --- | --- |",
            "| geometric mean | 4.00 / 0.95 | 1.50 / – |",
            "| worst | 2.00 / 0.90 | 1.50 / – |",
            "",
            "Slower than torch.nn: RNN training at 5,2,3,4.",
        ]
    )


def test_shares_of_the_product() -> None:
    floors = {"gemm": {"ms": 1.0, "spread": 0.0, "rate": 100.0}}
    found = row("RNN", "training", 20.0, 10.0, suite="peak", floors=floors)
    text = report.view("peak", a_record(found))
    assert text is not None
    # 0.5 GFLOP in 20 and in 10 ms are 25 and 50 GFLOP/s
    assert "| RNN 5,2,3,4 | training | 25 / 50 | 100 | 0.25 / 0.50 |" in text


def test_memory_in_both_ways() -> None:
    results = {
        "torch.nn": {"peak_mib": 8.0, "resident_mib": 10.0},
        "rnnkernels": {"peak_mib": 2.0, "resident_mib": 5.0},
    }
    text = report.view("memory", a_record(row("RNN", "memory", 0, 0, results=results)))
    assert text is not None
    assert text.endswith("| RNN 5,2,3,4 | 8.0 (10) | 2.0 (5) | 0.25 (0.50) |")


def test_calls_per_second() -> None:
    results = {
        "torch.nn, 4 callers x 1": {"ms": 2.0, "spread": 0.2},
        "rnnkernels, 4 callers x 1": {"ms": 0.5, "spread": 0.1},
    }
    found = row("RNN", "inference", 0, 0, suite="concurrent", results=results)
    text = report.view("concurrent", a_record(found))
    assert text is not None
    assert text.splitlines()[2:] == [
        "| RNN 5,2,3,4 | torch.nn | 500 ± 10 % |",
        "| RNN 5,2,3,4 | rnnkernels | 2000 ± 5 % |",
    ]


def test_nothing_is_left_out_of_a_report(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = row("RNN", "inference", 1.0, None, wrong={"rnnkernels": "output 0 is off"})
    refused = [
        row("GRU", mode, 1.0, 1.0, refused={"haste": "not installed"})
        for mode in ("inference", "training")
    ]
    warned = row("LSTM", "inference", 1.0, 1.0, warning="parts do not add up")
    record.write(path, a_record(wrong, *refused, warned))
    assert report.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "A Processor (avx9), 2 threads, torch 9.9, float32; rnnkernels abc1234" in out
    assert "* rnnkernels is WRONG, and was not timed: output 0 is off (suite: RNN 5,2,3,4" in out
    assert "* haste refuses: not installed (suite: GRU 5,2,3,4 inference, and 1 more)" in out
    assert "* parts do not add up (suite: LSTM 5,2,3,4 inference)" in out
    assert "| RNN 5,2,3,4 | inference | 1.00 ± 5 % | wrong | – |" in out
    assert report.main([str(path), "--view=suite"]) == 0
    assert "suite-times" not in capsys.readouterr().out


def test_documents_are_renewed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = path.with_name("page.md")
    document.write_text(
        "before\n<!-- benchmarks: suite -->\nold\n<!-- /benchmarks -->\nbetween\n"
        "<!-- benchmarks: cells -->\nkept\n<!-- /benchmarks -->\nafter\n"
    )
    arguments = [str(path), "--document", str(document)]
    assert readme.main([*arguments, "--check"]) == 1
    assert "old" in document.read_text() and "out of date" in capsys.readouterr().out
    assert readme.main(arguments) == 0
    text = document.read_text()
    table = report.view("suite", SMALL)
    assert f"before\n<!-- benchmarks: suite -->\n{table}\n\nMeasured on A Processor" in text
    assert "old" not in text and text.endswith(
        "record `small.json`.\n<!-- /benchmarks -->\nbetween\n"
        "<!-- benchmarks: cells -->\nkept\n<!-- /benchmarks -->\nafter\n"
    )
    assert "no record has rows for cells: left as it is" in capsys.readouterr().err
    assert readme.main([*arguments, "--check"]) == 0
    other = path.with_name("other.json")
    record.write(other, {**SMALL, "processor": "Another", "rows": SMALL["rows"][:2]})
    assert readme.main([str(path), str(other), "--document", str(document)]) == 0
    text = document.read_text()
    assert text.count("| T,B,I,H |") == 2
    assert -1 < text.index("Measured on A Processor") < text.index("Measured on Another")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- benchmarks: speed -->\n<!-- /benchmarks -->\n", "expected a view among suite, "),
        ("<!-- benchmarks: suite -->\n", "to be followed by a '<!-- /benchmarks -->'"),
        ("<!-- /benchmarks -->\n", "to be followed by a '<!-- /benchmarks -->'"),
    ],
)
def test_wrong_marks_are_refused(
    text: str, message: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = path.with_name("page.md")
    document.write_text(text)
    with pytest.raises(SystemExit) as exit:
        readme.main([str(path), "--document", str(document)])
    assert exit.value.code == 2 and message in capsys.readouterr().err
    assert document.read_text() == text


def test_pictures(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    sizes = [("H", {"shape": f"5,2,{n},{n}"}) for n in (4, 8)]
    sizes += [("T", {"shape": f"{n},2,3,4"}) for n in (4, 8)]
    sizes += [("threads", {"threads": n}) for n in (1, 2)]
    scaling = [
        row("RNN", "training", 2.0, 1.0, suite="scaling", variant=variant, **more)
        for variant, more in sizes
    ]
    parts = [{"name": name, "ms": 1.0, "floor_ms": 0.5} for name in ("dx", "overhead")]
    results = {"total": {"ms": 2.5, "spread": 0.1}}
    broken_down = row("LSTM", "training", 0, 0, suite="breakdown", results=results, parts=parts,
                      unexplained_ms=0.5)  # fmt: skip
    record.write(path, a_record(*SMALL["rows"], *scaling, broken_down))
    folder = path.with_name("pictures")
    assert plots.main([str(path), "--out", str(folder)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [file.stem for file in written] == ["speedup", "per_step", "scaling", "breakdown"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written)
    figure = plots.speedup(SMALL, SMALL["rows"])
    heights = [round(bar.get_height() + 1, 2) for bar in figure.axes[0].patches]
    assert heights == [2.0, 8.0, 1.5]


def test_a_record_without_pictures_is_refused(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    record.write(path, a_record(row("RNN", "training", 1.0, 1.0, suite="flow")))
    with pytest.raises(SystemExit) as exit:
        plots.main([str(path), "--out", str(path.parent)])
    assert exit.value.code == 2 and "expected rows of a suite among" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("*.json")))
def test_the_records_of_the_project_can_be_read(file: Path) -> None:
    found = record.read(file)
    assert "## " in report.markdown(found)


def test_the_documents_of_the_project_have_the_tables_of_its_records() -> None:
    records = [str(file) for file in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    assert readme.main([*records, "--check"]) == 0
