"""tools/compatibility.py: what a row is, and how a run is compared with docs/compatibility.md."""

from __future__ import annotations

import re
from typing import Any

import pytest

import compatibility
from compat.registry import LIBRARIES, Library, Outcome, Row, Section


def rows() -> list[Row]:
    return [row for section in compatibility.SECTIONS for row in section.rows]


def test_the_page_has_every_row() -> None:
    """So that none is added, taken away or renamed without a run."""
    lines = compatibility.PAGE.read_text("utf-8").splitlines()
    titles = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    listed = [title for title in titles if title not in ("", "|", "---", "| torch.nn")]
    assert listed == [row.title for row in rows()]


def test_the_page_promises_what_it_shows() -> None:
    found = compatibility.promised(compatibility.PAGE.read_text("utf-8"))
    assert ("Export", "torch.export, T and B dynamic") in found
    assert ("Hooks, modes and training", "FlopCounterMode counts forward and backward") in found


def attempt(run: Any, **options: Any) -> list[Outcome]:
    section = Section("A section")
    section.row("a title", **options)(run)
    return [section.rows[0].attempt(library) for library in LIBRARIES]


def test_outcomes() -> None:
    def ours(library: Library) -> None:
        if not library.ours:
            raise ValueError("says why")

    words = ["FAIL", "pass"]
    found = attempt(ours)
    assert [o.word for o in found] == words and "ValueError: says why" in found[0].reason
    assert [o.word for o in attempt(ours, ours_only=True)] == ["n/a", "pass"]
    missing = attempt(ours, needs=["no_such_module"])
    assert {(o.word, o.reason) for o in missing} == {("not installed", "needs no_such_module")}


def test_what_passed_and_fails_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    section, works = Section("Rows"), {"one": True, "two": False}

    def check(name: str) -> Any:
        def run(library: Library) -> None:
            assert works[name], f"{name} broke"

        return run

    for name in works:
        section.row(name)(check(name))
    monkeypatch.setattr(compatibility, "SECTIONS", (section,))
    monkeypatch.setattr(compatibility, "PAGE", tmp_path / "page.md")
    assert compatibility.main(["--write"]) == 0
    assert "| two | FAIL | FAIL |" in compatibility.PAGE.read_text("utf-8")
    assert compatibility.main([]) == 0
    works.update(one=False, two=True)
    capsys.readouterr()
    assert compatibility.main(["--only", "two"]) == 0
    assert compatibility.main([]) == 1
    assert (
        "Rows: one: passes in page.md, and failed: AssertionError: one" in capsys.readouterr().err
    )


def test_quick_rows_are_ours_and_need_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section, ran = Section("Rows"), []

    def run(library: Library) -> None:
        ran.append(library.name)

    section.row("quick")(run)
    section.row("of a library", needs=["torch"])(run)
    section.row("of a compiler", costly=True)(run)
    monkeypatch.setattr(compatibility, "SECTIONS", (section,))
    assert compatibility.main(["--quick"]) == 0
    assert ran == ["rnnkernels"] and "Rows: quick: pass\n" in capsys.readouterr().out
    assert any(not row.costly and not row.needs for row in rows())


def test_the_page_says_why_ours_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    section = Section("Rows")

    def fails(library: Library) -> None:
        raise ValueError(library.name)

    section.row("of theirs", exception="torch asks nobody.")(fails)
    section.row("of ours", exception="not so any more.")(lambda library: None)
    monkeypatch.setattr(compatibility, "SECTIONS", (section,))
    monkeypatch.setattr(compatibility, "PAGE", tmp_path / "page.md")
    assert compatibility.main(["--write"]) == 0
    text = compatibility.PAGE.read_text("utf-8")
    assert "\n\n*of theirs*: torch asks nobody.\n" in text and "not so any more" not in text


def test_every_failure_on_the_page_has_a_reason() -> None:
    """And nothing else has one."""
    text = compatibility.PAGE.read_text("utf-8")
    failed = {
        (row.section, row.title)
        for row in rows()
        if re.search(rf"\| {re.escape(row.title)} \| [^|]+ \| FAIL \|", text)
    }
    assert failed == {(row.section, row.title) for row in rows() if row.exception}


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert compatibility.main(["--list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(rows())
    for wrong in (
        ["--only", "no such row"],
        ["--write", "--section", "Export"],
        ["--write", "--quick"],
    ):
        with pytest.raises(SystemExit) as ended:
            compatibility.main(wrong)
        assert ended.value.code == 2
    assert "--write writes the whole page" in capsys.readouterr().err
