"""What tests build for themselves, and which of them run, in which order."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest

import building
import collection


def test_one_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the folder of some settings; it is the same one later, and others have another."""
    monkeypatch.setattr(building, "ROOT", tmp_path)
    with building.folder("name", "-O1", "-g") as path:
        assert path.is_relative_to(tmp_path / "build")
        with (path / ".held").open() as again, pytest.raises(BlockingIOError):
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with building.folder("name", "-O1") as other:
            assert other != path
    with building.folder("name", "-O1", "-g") as later:
        assert later == path
    monkeypatch.setenv("CXX", "another")
    with building.folder("name", "-O1", "-g") as other:
        assert other != path


def test_contents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They change with what is in a source, and with its name."""
    monkeypatch.setattr(building, "ROOT", tmp_path)
    (tmp_path / "src/below").mkdir(parents=True)
    header = tmp_path / "src/below/a.h"
    seen = []
    for name, text in (("a.h", "1"), ("a.h", "2"), ("b.h", "2")):
        header = header.rename(header.with_name(name)) if header.exists() else header
        header.write_text(text)
        (tmp_path / "src/notes.txt").write_text(str(len(seen)))
        seen += [building.contents("src")] * 2
    assert len(set(seen)) == 3
    (tmp_path / "src/notes.txt").write_text("no source")
    assert building.contents("src") == seen[-1]


class Item:
    """As much of a test as its choice looks at."""

    def __init__(self, name: str, *marks: str) -> None:
        self.name, self.marks = name, marks

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None


class Config:
    def __init__(self, **options: Any) -> None:
        self.options, self.hook, self.left_out = options, self, []

    def getoption(self, name: str) -> Any:
        return self.options.get(name)

    def pytest_deselected(self, items: list[Any]) -> None:
        self.left_out = [item.name for item in items]


def chosen(**options: Any) -> tuple[str, str]:
    """The names of tests as they run, and of those that are left out."""
    items: list[Any] = [Item("a"), Item("b", "full"), Item("c", "slow"), Item("d")]
    items += [Item("e", "slow", "full"), *map(Item, "fghij")]
    config: Any = Config(**options)
    collection.choose(config, items)
    return "".join(item.name for item in items), "".join(config.left_out)


def test_choice_and_order() -> None:
    """The slow ones first, else as they stand; what is full only if asked for."""
    assert chosen() == ("cadfghij", "be")
    assert chosen(full=True) == ("ceabdfghij", "")


def test_a_seed_decides_the_order() -> None:
    found = [chosen(shuffle=seed)[0] for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert len({"cadfghij", *found}) == 3
    assert {"".join(sorted(names)) for names in found} == {"acdfghij"}
    assert {names[0] for names in found} == {"c"}  # the slow one still begins
