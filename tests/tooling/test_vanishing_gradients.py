"""The picture of examples/vanishing_gradients.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

SMALL = ["--steps=12", "--hidden=6", "--batch-size=2"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    return importlib.import_module("vanishing_gradients")


@pytest.fixture
def plain(example: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example with panels that ask nothing special of the layers."""
    shown = [example.Panel("last", False, {}), example.Panel("every", True, {})]
    monkeypatch.setattr(example, "panels", lambda options: shown)
    return example


def test_picture_and_table(plain: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "flow.png"
    assert plain.main([*SMALL, f"--out={path}"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert out.count("RNN relu, layer 0") == 2 and str(path) in out
    assert plain.main([*SMALL, f"--out={tmp_path}"]) == 2
    assert "--out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]


def test_losses_have_norm_one(plain: Any) -> None:
    options = plain.parse_options(SMALL)
    with plain.tqdm(disable=True) as progress:
        last, every = plain.record(options, progress)
    one = torch.ones(1, dtype=torch.float64)
    for name in plain.CELLS:
        for flow in (last, every):
            torch.testing.assert_close(flow.norms(name)[-1], one)
    relu = last.norms("RNN relu")[:, 0]
    assert (relu[0] < 1.05**12).all()


def test_api_of_panels(example: Any) -> None:
    arguments = [panel.arguments for panel in example.panels(example.parse_options([]))]
    assert arguments == [{}, {"grad_clip": ("norm", 1.0)}, {"truncate": 50}]
