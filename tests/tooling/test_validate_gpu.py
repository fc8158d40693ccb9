"""What tools/validate_gpu.py does with the minutes of a GPU: steps that fail, hang, are cut off, or
have no time left. No GPU: programs of a few lines stand for what would run there."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

import prepare_gpu
import pytest_limits
import timed_run
import validate_gpu
from timed_run import Run, closing

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable


def program(code: str) -> list[str]:
    return [PYTHON, "-c", code]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run("call", tmp_path / "out", tmp_path / "work", seconds=120)


def steps(run: Run) -> list[tuple[str, str]]:
    record = json.loads((run.out / "call.json").read_text())
    return [(step["name"], step["outcome"]) for step in record["steps"]]


def test_steps(run: Run) -> None:
    """Each outcome, in the record as soon as the step is over."""
    with closing(run):
        run.command("a", "good", program("print(1); print(2)"), 60)
        assert steps(run) == [("good", "passed")]
        run.command("a", "bad", program("raise SystemExit(3)"), 60)
        run.command("a", "crash", program("import os; os.abort()"), 60)
        run.command("a", "hang", program("import signal; signal.pause()"), 0.2)
        run.command("a", "missing", ["no-such-program"], 60)
    assert steps(run) == [
        ("good", "passed"),
        ("bad", "exit status 3"),
        ("crash", "ended by SIGABRT"),
        ("hang", "out of time"),
        ("missing", "no-such-program is not there"),
    ]
    assert json.loads((run.out / "call.json").read_text())["steps"][0]["last"] == "2"
    assert "=== a good" in (run.out / "call.log").read_text()
    assert sorted(p.name for p in run.out.iterdir()) == ["call.json", "call.log", "call.tar.gz"]
    with tarfile.open(run.out / "call.tar.gz") as archive:
        assert "a-good.txt" in archive.getnames()


def test_no_time_left(run: Run) -> None:
    run.seconds = timed_run.GRACE + 0.5
    with closing(run):
        run.command("a", "late", program("raise SystemExit(3)"), 60)
    assert steps(run) == [("late", "left out")]


def test_children_end_with_their_step(run: Run, tmp_path: Path) -> None:
    """Also what a step has left behind."""
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid)"
    with closing(run):
        said = run.command("a", "parent", program(child), 60).said
    try:
        child_ended = os.pidfd_open(int(said))
    except ProcessLookupError:
        return
    with os.fdopen(child_ended) as ended:
        assert select.select([ended], [], [], 60)[0]


CUT = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
sys.path.insert(0, {tools!r})
from timed_run import Run, closing
with closing(Run("call", Path({out!r}), Path({work!r}), 600)) as run:
    run.command("a", "first", [sys.executable, "-c", "print(7)"], 60)
    (run.work / "half").write_text("done")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: run.command("a", name, {step!r}, 600), ("b", "c")))
"""


def test_cut_off(tmp_path: Path) -> None:
    """What was done until then is there, and packed; steps of other threads end too."""
    out, work, began = tmp_path / "out", tmp_path / "work", tmp_path / "began"
    os.mkfifo(began)
    step = ["sh", "-c", f"echo > {began}; exec sleep 600"]
    code = CUT.format(tools=str(ROOT / "tools"), out=str(out), work=str(work), step=step)
    with subprocess.Popen(program(code), stdout=subprocess.DEVNULL) as process:
        steps_there = 0
        while steps_there < 2:
            steps_there += began.read_text().count("\n")
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        finally:
            process.kill()  # so that a run that does not end is a failure, and no more
    assert process.returncode == 128 + signal.SIGTERM
    record = json.loads((out / "call.json").read_text())
    outcomes = [s["outcome"] for s in record["steps"]]
    assert outcomes[:2] == ["passed", "told to by SIGTERM"]
    assert set(outcomes[2:]) <= {"ended by SIGKILL", "out of time", "left out"}
    assert record["allowed"] == 600
    with tarfile.open(out / "call.tar.gz") as archive:
        assert {"half", "a-first.txt"} <= set(archive.getnames())


# --- Tests that hang or spoil their process -----------------------------------------------------

TESTS = """
import os, signal

def test_a():
    pass

def test_b_hangs():
    signal.pause()

def test_c():
    pass

def test_d_spoils():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_e_fails():
    assert False

def test_f():
    assert True
"""


def share_of(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    file = tmp_path / "test_share.py"
    file.write_text(TESTS)
    monkeypatch.setattr(validate_gpu, "TESTS", str(file))
    monkeypatch.setattr(validate_gpu, "TEST_LIMIT", 2)
    with closing(run):
        validate_gpu.run_share(run, validate_gpu.Share("some", "test", "grid-2"), {})
    (step,) = json.loads((run.out / "call.json").read_text())["steps"]
    return dict(step)


def test_processes_take_over(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one that hung and from one whose device was spoiled; every test has run once."""
    step = share_of(run, tmp_path, monkeypatch)
    assert step["outcome"] == "exit status 1"
    assert step["counts"] == {"passed": 3, "began": 1, "failed": 2}
    assert {name.split("::")[1]: what for name, what in step["bad"].items()} == {
        "test_b_hangs": "began", "test_d_spoils": "failed", "test_e_fails": "failed",
    }  # fmt: skip
    lines = (run.work / "tests-some.jsonl").read_text().splitlines()
    began = [line for line in map(json.loads, lines) if line["outcome"] == "began"]
    assert len({line["test"] for line in began}) == len(began) == 6
    a, b, c, d, e, f = (line["process"] for line in began)
    assert a == b != c == d != e == f


def test_a_family_that_the_probe_found_bad(run: Run) -> None:
    with closing(run):
        validate_gpu.run_share(run, validate_gpu.Share("x", "x", "grid-2"), {"grid-2": "wrong"})
    assert steps(run) == [("x", "left out")]


def test_what_the_record_of_tests_says(tmp_path: Path) -> None:
    record = tmp_path / "record"
    assert pytest_limits.read(record) == {}
    record.write_text('{"test": "a", "outcome": "began"}\n{"test": "a", "outcome": "passed"}\n')
    assert pytest_limits.read(record) == {"a": "passed"}


# --- Where there is less than usual -------------------------------------------------------------


def test_without_git_and_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine with the GPU gets the files of the tree alone."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(prepare_gpu, "MADE", tmp_path / "made.json")
    found = validate_gpu.about()
    assert found["commit"] == found["gpu"] == ""
    assert len(found["sources"]) == 12
    (tmp_path / "made.json").write_text(
        json.dumps({"sources": found["sources"], "commit": "abc1234"})
    )
    assert validate_gpu.about()["commit"] == "abc1234"


def test_what_was_built_of_other_sources_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(prepare_gpu, "MADE", tmp_path / "made.json")
    assert prepare_gpu.made() == {}
    made = {"sources": prepare_gpu.sources(), "probe": "probe"}
    (tmp_path / "made.json").write_text(json.dumps(made))
    assert prepare_gpu.made() == made
    (tmp_path / "made.json").write_text(json.dumps(made | {"sources": "of yesterday"}))
    assert prepare_gpu.made() == {}


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(validate_gpu, "about", lambda: {"gpu": ""})
    monkeypatch.setattr("sys.argv", ["validate_gpu", f"--out={tmp_path}"])
    assert validate_gpu.main() == 2
    assert "finds no GPU here" in capsys.readouterr().err


def test_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stands in the record, beside what was done before it; the other call runs."""

    def first(run: Run, args: argparse.Namespace) -> None:
        run.command("a", "good", program(""), 60)
        raise ValueError("no such thing")

    monkeypatch.setattr(validate_gpu, "about", lambda: {"gpu": "some"})
    monkeypatch.setattr(validate_gpu, "first", first)
    monkeypatch.setattr(validate_gpu, "second", lambda run, args: run.note("b", "c", "passed", 0))
    monkeypatch.setattr("sys.argv", ["validate_gpu", f"--out={tmp_path}"])
    assert validate_gpu.main() == 1
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second")]
    assert [s["outcome"] for s in records[0]["steps"]] == ["passed", "ValueError: no such thing"]
    assert [s["outcome"] for s in records[1]["steps"]] == ["passed"]


PROBE = """#!{python}
import json, sys
names = ["grid-1/forward/bfloat16", "grid-2/forward/bfloat16", "cluster-2/forward/bfloat16"]
what, *rest = sys.argv[1:]
if what == "list":
    for name in names:
        print(name, names[0] * ("grid-2" in name), 0, sep="\\t")
elif what == "measured":
    print("B16-H256")
elif what == "measure":
    print(json.dumps({{"measured": rest[0], "us_per_step": 0.9}}))
else:
    outcome = "failed" if "grid-1" in rest[0] else "passed"
    print(json.dumps({{"case": rest[0], "outcome": outcome, "layout": "some"}}))
"""


def test_first_call(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that fails is left out of what follows, also of the sanitizers."""
    for name, text in (
        ("probe", PROBE.format(python=PYTHON)),
        ("micro", "#!/bin/sh\necho '{\"round\": 1}'\n"),
        ("compute-sanitizer", '#!/bin/sh\nshift 2\nexec "$@"\n'),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(validate_gpu, "AFTER_CASES", 20)
    args = argparse.Namespace(probe=tmp_path / "probe", micro=tmp_path / "micro")
    with closing(run):
        validate_gpu.first(run, args)
    record = json.loads((run.out / "call.json").read_text())
    assert record["families"] == {"grid-1": "failed", "grid-2": "left out", "cluster-2": "passed"}
    outcomes = {(s["stage"], s["name"]): s["outcome"] for s in record["steps"]}
    assert outcomes["memcheck", "grid-2/forward/bfloat16"] == "left out"
    assert outcomes["racecheck", "cluster-2/forward/bfloat16"] == "passed"
    assert outcomes["micro", "hand-offs"] == "passed"
    (measured,) = (s for s in record["steps"] if s["stage"] == "measure")
    assert measured["measured"] == [{"measured": "B16-H256", "us_per_step": 0.9}]
