"""run_all.py of the gallery: its record, what --resume leaves out, the pages of docs/gallery."""

from __future__ import annotations

import copy
import importlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import rnnkernels as rk
from benchmarks import readme, record, report

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/gallery"


@pytest.fixture
def run_all(gallery: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The program, on two runs of which one is never there."""
    module = importlib.import_module("run_all")
    runs = (
        module.Run("digits", "many to many", ("--epochs=1",)),
        module.Run("absent", "one to one"),
        module.Run("tagging", "many to one", ("--pixels",)),
    )
    monkeypatch.setattr(module, "RUNS", runs)
    monkeypatch.chdir(tmp_path)
    return module


@pytest.fixture
def done(run_all: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Runs end at once, and are listed; tagging is stopped by whoever removes this file."""
    (tmp_path / "may go on").touch()
    picture = importlib.import_module("PIL.Image").new("RGB", (40, 30), "white")
    names: list[str] = []

    def run_one(run: Any, options: Any) -> Any:
        names.append(run.name)
        if run.program == "absent":
            raise run_all.UsageError("pip install absent")
        if run.program == "tagging" and not (tmp_path / "may go on").exists():
            raise KeyboardInterrupt
        path = tmp_path / f"{run.stem}.png"
        picture.save(path)
        row = run_all.Row("ones", 3, "accuracy", "60%", "zeros", "50%", True, 1.0, [2.0, 4.0])
        return row, "GRU", path

    monkeypatch.setattr(run_all, "run_one", run_one)
    return names


@pytest.mark.filterwarnings("ignore")  # of the packages
def test_a_run_is_recorded(run_all: Any, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    argv = ["--quick", "--only", "digits", "--record", "a/record.json", "--plots", "pictures"]
    assert run_all.main(argv) == 0
    found = record.read(tmp_path / "a/record.json")
    (row,) = found["rows"]
    assert row["command"] == "python examples/gallery/digits.py --epochs=1 --quick"
    assert (row["cell"], row["quick"], row["metric"]) == ("LSTM", True, "accuracy")
    assert set(row["results"]) == {"rnnkernels", "torch.nn"}
    assert all(result["ms"] > 0 for result in row["results"].values())
    assert (tmp_path / "pictures/digits.png").read_bytes().startswith(b"\x89PNG")


def test_resume_leaves_out_what_is_recorded(
    run_all: Any, done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--record", "record.json", "--plots", "pictures"]
    (tmp_path / "may go on").unlink()
    assert run_all.main(argv) == 130
    (tmp_path / "may go on").touch()
    assert run_all.main([*argv, "--resume"]) == 1  # since one is absent
    assert done == ["digits --epochs=1", "absent", "tagging --pixels", "absent", "tagging --pixels"]
    found = record.read(tmp_path / "record.json")
    assert [row["shape"] for row in found["rows"]] == ["digits --epochs=1", "tagging --pixels"]
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "digits.png", "tagging_pixels.png"
    }  # fmt: skip

    del done[:]
    record.write(tmp_path / "record.json", {**found, "commit": "another"})
    assert run_all.main([*argv, "--resume"]) == 1
    assert len(done) == 3
    del done[:]
    assert run_all.main([*argv, "--only", "tagging"]) == 0
    assert done == ["tagging --pixels"]
    assert len(record.read(tmp_path / "record.json")["rows"]) == 2


def test_what_a_run_writes_is_no_change_of_the_sources(
    run_all: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git")
    files = [tmp_path / name for name in ("docs/gallery/a.md", "benchmarks/results/b", "c.py")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    git = ["git", "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(importlib.import_module("_path"), "ROOT", tmp_path)
    for file in files[:2]:
        file.write_text("new")
    assert run_all.of_sources("abc-dirty") == "abc"
    files[2].write_text("new")
    assert run_all.of_sources("abc-dirty") == "abc-dirty"


def test_wrong_use(
    run_all: Any, done: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_all.main(["--resume"]) == 2
    assert "argument --resume: expected --record FILE" in capsys.readouterr().err
    (tmp_path / "record.json").write_text("[]")
    assert run_all.main(["--record", "record.json"]) == 2
    assert "argument --record: " in capsys.readouterr().err
    assert not done


def test_tables_of_a_record(
    run_all: Any, done: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A block of a document may be about one variant alone."""
    run_all.main(["--record", "record.json", "--only", "digits", "tagging"])
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- benchmarks: gallery -->\n<!-- /benchmarks -->\n"
        "<!-- benchmarks: gallery-program tagging -->\n<!-- /benchmarks -->\n"
        "<!-- benchmarks: gallery-program absent -->\n<!-- /benchmarks -->\n"
    )
    assert readme.main(["record.json", "--document", "page.md"]) == 0
    assert "no record has rows for gallery-program absent" in capsys.readouterr().err
    whole, one, _ = page.read_text().split("<!-- /benchmarks -->")[:3]
    assert "| [`tagging --pixels`](gallery/tagging.md) | ones | accuracy | 60% |" in whole
    assert "2.0 / 4.0 ms" in whole and "(gallery/digits.md)" in whole
    assert "| command | `python examples/gallery/tagging.py --pixels` |" in one
    assert "digits" not in one


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_torch_nn_called_as_ours(gallery: Any, cell: str) -> None:
    stand_in = importlib.import_module("_torch_nn")
    x = torch.randn(7, 4, 3, dtype=torch.float64)
    reset = torch.rand(7, 4) < 0.3
    for options, call in (
        ({}, {"lengths": torch.tensor([2, 7, 1, 7])}),
        ({"bidirectional": True, "merge_mode": "sum"}, {}),
        ({"bias_mode": "single"}, {}),
        ({"truncate": 3}, {}),
        ({}, {"reset": reset}),
    ):
        ours = getattr(rk, cell)(3, 5, dtype=torch.float64, **options)
        model = torch.nn.ModuleDict({"rnn": copy.deepcopy(ours)})
        theirs = stand_in.with_torch_nn(model)["rnn"]
        with torch.no_grad():
            hx = ours(x[:2])[1]
        start = () if "lengths" in call else (hx,)
        y, state = ours(x, *start, **call)
        got, after = theirs(x, *start, **call)
        torch.testing.assert_close(got, y)
        torch.testing.assert_close(after, state)
        gradients = (torch.autograd.grad(out.square().sum(), layer.weight_hh_l0)
                     for out, layer in ((got, theirs.rnn), (y, ours)))  # fmt: skip
        torch.testing.assert_close(*gradients)
    assert stand_in.with_torch_nn(torch.nn.ModuleList([rk.MGU(2, 3)])) is None
    assert stand_in.with_torch_nn(torch.nn.ModuleList([ours, rk.GRU(2, 3, grad_clip=1.0)])) is None


def test_every_program_has_its_page(gallery: Any) -> None:
    runs = importlib.import_module("run_all").RUNS
    programs = {path.stem for path in (ROOT / "examples/gallery").glob("[a-z]*.py")} - {"run_all"}
    assert programs == {run.program for run in runs}
    assert programs == {path.stem for path in PAGES.glob("*.md")}
    overview = (ROOT / "docs/gallery.md").read_text("utf-8")
    for name in programs:
        text = (PAGES / f"{name}.md").read_text("utf-8")
        assert f"{{literalinclude}} ../../examples/gallery/{name}.py" in text
        assert f"<!-- benchmarks: gallery-program {name} -->" in text
        shown = set(re.findall(r"!\[[^\]]+\]\((\w+)\.png\)", text))
        assert shown == {run.stem for run in runs if run.program == name}
        assert f"(gallery/{name}.md)" in overview and f'src="gallery/{name}.png"' in overview
    pictures = {path.stem: path.stat().st_size for path in PAGES.glob("*.png")}
    assert pictures.keys() == {run.stem for run in runs}
    assert max(pictures.values()) < 60_000


def test_the_record_has_every_program(gallery: Any) -> None:
    found = record.read(ROOT / "benchmarks/results/gallery.json")
    runs = importlib.import_module("run_all").RUNS
    assert [row["shape"] for row in found["rows"]] == [run.name for run in runs]
    assert not [row["shape"] for row in found["rows"] if row["beats"] is False and not row["quick"]]
    assert "many to many, unequal" in str(report.view("gallery", found))
