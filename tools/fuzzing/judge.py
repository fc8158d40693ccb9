"""What became of a call: right, refused clearly, or a finding."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

#: Exceptions by which a call may be refused; anything else was not thought of.
REFUSALS = (TypeError, ValueError, RuntimeError, NotImplementedError)
#: Words of torch's own faults, and of Python's where a value was not looked at.
UNCLEAR = re.compile(
    r"INTERNAL ASSERT|report a bug|Unknown exception|object is not (iterable|callable|subscript)"
    r"|unsupported operand|object has no attribute|unexpected EOF|vector::|basic_string|std::bad"
    r"|must be real number|not supported between",
    re.IGNORECASE,
)
#: What torch says, as clearly, of a tensor that it cannot work with; of its own layers too.
TORCHS = re.compile(
    r"Inference tensors cannot be saved|Cannot copy out of meta tensor|from the 'Sparse\w+' backend"
    r"|version_counter for inference tensor|MathBitsFallback|not implemented for sparse tensors"
    r"|unsupported memory format"
)
#: What memory says of an input that does not fit: torch's words, which name the bytes.
NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|Storage size calculation overflowed|numel: integer"
    r"|overflow",
    re.IGNORECASE,
)
#: Relative to the largest number of a result; results of 16 bits are compared more loosely.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass
class Attempt:
    """One input.

    Attributes:
        what: the name of the layer, function or op.
        names: those of its arguments, as errors may say them.
        run: makes the call.
        expected: the same by the reference, where there is one; ``None`` for no comparison.
    """

    what: str
    names: Iterable[str]
    run: Callable[[], Any]
    expected: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Verdict:
    """``kind`` is accepted, compared, refused, memory, or the kind of a finding."""

    kind: str
    about: str = ""  # a refusal's type, or a finding's text
    trace: str = ""

    @property
    def finding(self) -> bool:
        return self.kind not in ("accepted", "compared", "refused", "memory")


def judged(attempt: Attempt) -> Verdict:
    """Makes the call, and says what became of it."""
    try:
        found = attempt.run()
    except REFUSALS as error:
        return _refused(attempt, error)
    except Exception as error:
        return _finding("unexpected exception", error)
    if attempt.expected is None:
        return Verdict("accepted")
    try:
        wanted = attempt.expected()
    except Exception as error:
        if NO_MEMORY.search(str(error)):
            return Verdict("accepted")
        return _finding("accepted, but not by the reference", error)
    wrong = difference(found, wanted)
    return Verdict("wrong numbers", wrong) if wrong else Verdict("compared")


def _refused(attempt: Attempt, error: Exception) -> Verdict:
    text, kind = str(error), type(error)
    if kind not in (*REFUSALS, torch.OutOfMemoryError) and kind.__module__ != (
        "rnnkernels.streaming._runner"
    ):
        return _finding("unexpected exception", error)
    if NO_MEMORY.search(text):
        return Verdict("memory", kind.__name__)
    if TORCHS.search(text):
        return Verdict("refused", kind.__name__)
    if UNCLEAR.search(text):
        return _finding("unclear", error)
    words = "|".join(re.escape(name) for name in attempt.names)
    if not re.search(rf"(?<![A-Za-z0-9])({words})(?![a-z])", text):
        return _finding("names no argument", error)
    return Verdict("refused", kind.__name__)


def _finding(kind: str, error: Exception) -> Verdict:
    trace = "".join(traceback.format_exception(error)[-6:])
    return Verdict(kind, f"{type(error).__name__}: {str(error)[:300]}", trace)


def difference(found: Any, wanted: Any) -> str:
    """In what two results differ by more than rounding, or an empty text."""
    a, b = flat(found), flat(wanted)
    if len(a) != len(b):
        return f"{len(a)} tensors in place of {len(b)}"
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
            return (
                f"result {i}: {list(x.shape)} {x.dtype} {x.device}, not "
                f"{list(y.shape)} {y.dtype} {y.device}"
            )
        if x.device.type == "meta" or not x.is_floating_point() or x.numel() == 0:
            continue
        tolerance, x, y = TOLERANCE.get(x.dtype, 0.1), x.detach().double(), y.detach().double()
        if not torch.equal(x.isfinite(), y.isfinite()):
            return f"result {i}: finite in other places"
        gap = (x - y)[x.isfinite()].abs()
        scale = 1 + y[y.isfinite()].abs().max() if gap.numel() else y.new_ones(())
        if gap.numel() and float(gap.max() / scale) > tolerance:
            return f"result {i}: off by {float(gap.max()):.3g} of {float(scale):.3g}"
    return ""


def flat(value: Any) -> list[Tensor]:
    """The tensors of a nested result."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value.values()] if value.is_nested else [value]
    if isinstance(value, dict):
        return [t for part in value.values() for t in flat(part)]
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in flat(part)]
    return []
