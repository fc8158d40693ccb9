"""What is to be done once a module is imported is done then, once; the module is as ever."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from rnnkernels._core.late_import import when_imported


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a module ``counted``, which can be imported and was not."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "counted", raising=False)
    path = tmp_path / "counted.py"
    path.write_text("value = 3\n")
    return path


def test_when_it_is_imported(module: Path) -> None:
    found: list[int] = []
    finders = len(sys.meta_path)
    when_imported("counted", lambda: found.append(sys.modules["counted"].value))
    import math  # noqa: F401 -- another module

    assert found == [] and len(sys.meta_path) == finders + 1
    counted = importlib.import_module("counted")
    assert found == [3] and len(sys.meta_path) == finders
    assert counted.__spec__ is not None and counted.__spec__.loader is counted.__loader__
    assert type(counted.__loader__).__name__ == "SourceFileLoader"
    importlib.reload(counted)
    assert found == [3]


def test_where_it_was_already(module: Path) -> None:
    importlib.import_module("counted")
    found: list[int] = []
    when_imported("counted", lambda: found.append(1))
    assert found == [1]


def test_an_import_that_fails_may_be_tried_again(module: Path) -> None:
    module.write_text("1 / 0\n")
    found: list[int] = []
    when_imported("counted", lambda: found.append(1))
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("counted")
    assert found == []
    module.write_text("value = 4  # of another length\n")
    importlib.import_module("counted")
    assert found == [1]


def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    found: list[int] = []
    when_imported("no_such_module_at_all", lambda: found.append(1))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        importlib.import_module("no_such_module_at_all")
    assert found == []


def test_two_for_the_same_module(module: Path) -> None:
    found: list[str] = []
    when_imported("counted", lambda: found.append("first"))
    when_imported("counted", lambda: found.append("second"))
    importlib.import_module("counted")
    assert sorted(found) == ["first", "second"]
