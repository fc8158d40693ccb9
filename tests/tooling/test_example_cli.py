"""The command lines of the examples: help, and what they say of wrong arguments."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

#: Of each example, what its help names, what it needs, and wrong arguments with parts of the error.
EXAMPLES: dict[str, tuple[str, tuple[str, ...], list[tuple[list[str], list[str]]]]] = {
    "streaming_server": (
        "--batch",
        (),
        [
            (["--streams", "0"], ["--streams", "at least 1", "'0'"]),
            (["--cell", "tree"], ["--cell", "'tree'"]),
            (["--colour"], ["--colour", "--help"]),
        ],
    ),
    "vanishing_gradients": (
        "--truncate",
        ("matplotlib", "tqdm"),
        [
            (["--steps", "1"], ["--steps", "at least 2", "'1'"]),
            (["--gain", "nan"], ["--gain", "'nan'"]),
            (["--truncate", "0"], ["--truncate", "at least 1"]),
            (["--colour"], ["--colour", "--help"]),
        ],
    ),
}


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    for needed in EXAMPLES[name][1]:
        pytest.importorskip(needed)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    return importlib.import_module(name)


@pytest.mark.parametrize("name", EXAMPLES)
def test_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        load(name, monkeypatch).main(["--help"])
    assert exit.value.code == 0
    assert EXAMPLES[name][0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [(name, *wrong) for name, (_, _, listed) in EXAMPLES.items() for wrong in listed],
)
def test_wrong_arguments(
    name: str,
    arguments: list[str],
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert load(name, monkeypatch).main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"{name}.py: error: ")
    assert all(part in message for part in parts)
