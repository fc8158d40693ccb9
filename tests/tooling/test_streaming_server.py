"""The server of examples/streaming_server.py."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rnnkernels as rk
from rnnkernels.streaming import StreamRunner
from rnnkernels.testing import assert_close

SMALL = ["--hidden=6", "--inputs=3", "--streams=5", "--threads=2", "--chunks=4", "--longest=3"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    before = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    yield importlib.import_module("streaming_server")
    torch.set_num_threads(before)


@pytest.mark.parametrize("arguments", [[], ["--batch"], ["--threads=9", "--cell=gru"]])
def test_figures(example: Any, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert example.main([*SMALL, *arguments]) == 0
    words, rate, latency = capsys.readouterr().out.splitlines()
    assert "20 chunks of 1 to 3 steps, 5 streams" in words
    assert words.endswith("batched" if "--batch" in arguments else "one by one")
    assert re.fullmatch(r"\d+ chunks per second, \d+ steps per second", rate)
    assert re.fullmatch(r"latency: (p\d+ [\d.]+ ms, ){3}longest [\d.]+ ms", latency)


def test_batches_keep_the_order_of_each_stream(example: Any) -> None:
    """A bad chunk among them is an error of its own, and moves nothing."""
    layer = rk.GRU(3, 6).eval()
    batcher, alone = example.Batcher(StreamRunner(layer)), StreamRunner(layer)
    chunks = [(n % 3, torch.randn(1 + n % 4, 3)) for n in range(30)]
    answers = [batcher.submit(*request) for request in chunks[:16]]
    bad = batcher.submit(0, torch.randn(1, 2))
    answers += [batcher.submit(*request) for request in chunks[16:]]
    batcher.stop()
    for request, answer in zip(chunks, answers, strict=True):
        assert_close(answer.result(timeout=30), alone(*request))
    with pytest.raises(ValueError, match="expected shape"):
        bad.result(timeout=30)


def test_percentiles(example: Any) -> None:
    values = [float(n) for n in range(200, 0, -1)]
    assert [example.percentile(values, p) for p in (50, 99, 100)] == [100, 198, 200]
    assert example.percentile([3.0], 50) == 3
