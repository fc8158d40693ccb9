"""The parity report, and the helper that judges results, on right and wrong ones."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import parity_report
import rnnkernels
from rnnkernels.testing import RTOL, TERMS, assert_close, relative_error, tolerance

SMALL = ["--time", "7", "--batch", "3", "--input", "5", "--hidden", "16"]


@pytest.mark.slow
def test_report_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity_report.main([]) == 0
    out = capsys.readouterr().out
    for name in parity_report.MODULES:
        assert len(re.findall(rf"^{name} ", out, re.MULTILINE)) == 3
    assert out.endswith("all comparisons are within limits\n")


def test_report_fails_on_a_wrong_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = rnnkernels.GRUCell.forward

    def off(self: Any, *args: Any) -> Any:
        return forward(self, *args) * (1 + 1e-5)

    monkeypatch.setattr(rnnkernels.GRUCell, "forward", off)
    assert parity_report.main(SMALL) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if "TOO FAR" in line]
    assert [line.split()[0] for line in wrong] == ["GRUCell"] * 3


def test_report_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parity_report.main(["--help"])
    assert exit.value.code == 0
    assert "--hidden" in capsys.readouterr().out


def test_limits_are_the_documented_ones() -> None:
    assert RTOL[torch.float64] == 1e-12 and RTOL[torch.float32] == 5e-6
    assert tolerance(torch.float32) == tolerance(torch.float32, terms=2) == 5e-6
    assert tolerance(torch.float32, terms=4 * TERMS) == 1e-5
    with pytest.raises(KeyError):
        tolerance(torch.int64)


def test_relative_error_is_relative_to_the_greatest_magnitude() -> None:
    expected = torch.tensor([[1.0, -8.0], [0.0, 2.0]], dtype=torch.float64)
    assert relative_error(expected.float(), expected) == 0
    assert relative_error(expected + torch.tensor([0.5, 0.25]), expected) == 0.5 / 8
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(torch.zeros(2), torch.zeros(3))


def test_assert_close_names_the_worst_element() -> None:
    expected = torch.linspace(-4, 4, 9, dtype=torch.float64).view(3, 3)
    actual = expected.clone()
    actual[2, 1] += 8e-12
    message = r"dW\[2, 1\]: 3.000000000008 where 3.0 is expected; off by 2e-12 .* 4, 2 times"
    with pytest.raises(AssertionError, match=message):
        assert_close(actual, expected, name="dW")
    assert assert_close(actual, expected, rtol=4e-12) == pytest.approx(0.5, rel=1e-3)
    assert 0.4 < assert_close(actual, expected, terms=16 * TERMS) < 0.6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_assert_close_takes_no_nan_or_infinity(bad: float) -> None:
    expected = torch.ones(3, dtype=torch.float64)
    actual = expected.clone()
    actual[1] = bad
    with pytest.raises(AssertionError, match=r"x\[1\]"):
        assert_close(actual, expected, name="x", rtol=1e9)
    with pytest.raises(AssertionError, match=r"x\[1\]"):
        assert_close(expected, actual, name="x")
    assert assert_close(actual, actual.clone()) == 0


def test_assert_close_compares_structures() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    assert assert_close((a, [None, b]), [a, (None, b)]) == 0
    with pytest.raises(AssertionError, match=r"r\[1\]\[0\]"):
        assert_close((a, [b]), (a, [a]), name="r")
    with pytest.raises(AssertionError, match="None where a tensor"):
        assert_close(None, a)
    with pytest.raises(AssertionError, match="2 parts, not 1"):
        assert_close((a, a), (a,))
    with pytest.raises(AssertionError, match="shape"):
        assert_close(a, b[:1])


def test_fresh_memory_is_poisoned() -> None:
    """What conftest.py promises, for the kernels' own allocations too."""
    assert torch.empty(3).isnan().all() and torch.zeros(3).new_empty(2, 2).isnan().all()
    assert torch.empty_like(torch.zeros(3, dtype=torch.float64)).isnan().all()
