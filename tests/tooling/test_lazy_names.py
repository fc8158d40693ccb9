"""What importing the package leaves to whoever first asks for it; nothing is lost by that."""

from __future__ import annotations

import subprocess
import sys

import pytest

import rnnkernels
from rnnkernels._core import lazy

#: Of the package itself; behind an import of it and of torch.
LATER = (
    "nn.gated", "interop", "interop._conversion", "interop._flax", "interop._keras",
    "interop._onnx", "diagnostics", "diagnostics._verify", "streaming", "serving", "torch_types",
    "testing",
)  # fmt: skip


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_an_import_leaves_out() -> None:
    """And names that are asked for bring it; also the cell of a layer that a program, which may
    have been exported elsewhere, knows by its name alone: in Python, and in C++."""
    name = rnnkernels.MGU.definition.name
    run(
        f"""
import sys, torch, rnnkernels
found = [m for m in {LATER!r} if "rnnkernels." + m in sys.modules]
assert not found, found
missing = [n for n in rnnkernels.__all__ if n not in dir(rnnkernels)]
assert not missing, missing
if rnnkernels._ops.missing is None:
    from rnnkernels import _C
    assert _C.load_cell({name!r}, "/nowhere", "cpu")  # a reason: the cell is known
assert "rnnkernels.nn.gated" in sys.modules or rnnkernels._ops.missing
assert rnnkernels.cells.find({name!r}).title == "mgu"
assert rnnkernels.nn.MGU is rnnkernels.MGU and "MGU" in vars(rnnkernels)
for n in rnnkernels.__all__:
    getattr(rnnkernels, n)
for n in rnnkernels.interop.__all__:
    getattr(rnnkernels.interop, n)
"""
    )


def test_a_name_that_is_none() -> None:
    with pytest.raises(AttributeError, match="module 'rnnkernels' has no attribute 'LSTN'"):
        rnnkernels.LSTN  # type: ignore[attr-defined]  # noqa: B018
    get, listed = lazy.attributes("rnnkernels", {"rnnkernels.serving": ()})
    assert get("serving") is rnnkernels.serving and "serving" in listed()
    assert not hasattr(rnnkernels.nn, "LSTN")
