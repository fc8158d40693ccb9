"""Runs all kernels for a device against the reference, and says what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rnnkernels import _ops
from rnnkernels._backends import devices, float32, triton, vetting
from rnnkernels._backends.vetting.runners import RUNNERS, NotHere, in_fresh_thread


@dataclass(frozen=True)
class Row:
    """One pass of one family of kernels in one precision.

    Attributes:
        family: with its backend in front.
        direction: ``'forward'`` or ``'backward'``.
        numbers: the dtype, or ``'tf32'``, ``'tf32x3'`` for float32 multiplied so.
        cases: that ran, up to the first that failed.
        error: the largest difference, relative to the greatest magnitude of its result.
        verdict: ``'passed'``, ``'refused'`` or ``'not here'``.
        seconds: that the cases took, comparison included.
        reason: why it was refused, or is not here.
    """

    family: str
    direction: str
    numbers: str
    cases: int
    error: float
    verdict: str
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found; prints as a table.

    Attributes:
        device: that was checked.
        rows: a :class:`Row` for each family, precision and pass; one for a family that this device
            or this build does not have.
    """

    device: torch.device
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether something ran, and nothing was refused."""
        verdicts = {row.verdict for row in self.rows}
        return "passed" in verdicts and "refused" not in verdicts

    def __str__(self) -> str:
        lines = [["family", "pass", "numbers", "cases", "largest error", "verdict", "seconds"]]
        for r in self.rows:
            if r.verdict == "not here":
                absent = f"not here in {r.numbers}" if r.numbers else "not here"
                lines.append([r.family, f"{absent}: {r.reason}"])
                continue
            ran = [r.numbers, str(r.cases), f"{r.error:.1e}", r.verdict, f"{r.seconds:.2f}"]
            lines.append([r.family, r.direction, *ran])
        whole = [line for line in lines if len(line) == len(lines[0])]
        widths = [max(len(line[i]) for line in whole) for i in range(len(lines[0]))]
        widths[0] = max(len(line[0]) for line in lines)
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths)) for line in lines]  # noqa: B905
        refused = (row for row in self.rows if row.verdict == "refused")
        reasons = [f"{row.family} refused: {row.reason}" for row in refused]
        return "\n".join(line.rstrip() for line in [f"on {self.device}:", *table, *reasons])


def verify(device: torch.device | str | None = None) -> Verification:
    """Runs every family of kernels for a device on small cases, forward and backward, against the
    reference in float64; prints a table.

    On a GPU this is what the check on first use does, with every cell and more options, and afresh:
    what it finds replaces what was known, in this process and in the user's cache folder. Takes
    seconds for the CPU and the CUDA kernels; Triton compiles its kernels first, for minutes.

    Args:
        device: a CPU or a GPU; None for the current GPU, or the CPU where there is none. float32 is
            multiplied as torch's settings have it (``torch.backends.cudnn.rnn.fp32_precision``).

    Returns:
        A :class:`Verification`: its ``ok`` says whether nothing was refused.

    Raises:
        ValueError: ``device`` is neither a CPU nor a GPU.
        RuntimeError: there is no such GPU here.

    Example::

        >>> assert rnnkernels.verify("cpu").ok
        on cpu:
        family          pass      numbers   cases  largest error  verdict  seconds
        cpu kernels     forward   float32   28     2.1e-07        passed   0.02
        ...
    """
    where = _device(device)
    if where.type == "cuda":
        vetting.renew(where)
    found = Verification(where, tuple(_rows(where)))
    print(found)
    return found


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.device(device)
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected a CPU or a GPU (cuda), got {str(found)!r}")
    if found.type == "cpu":
        return found
    there = torch.cuda.device_count()
    if (found.index or 0) >= there:
        raise RuntimeError(f"device: expected a GPU that is here, of {there}, got {str(found)!r}")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def _missing(backend: str, device: torch.device) -> str:
    """Why nothing of a backend can run on a device, or ``''``."""
    on_gpu = backend in ("cuda", "triton")
    if on_gpu and device.type != "cuda":
        return "no GPU is checked"
    if backend == "cpu" and device.type != "cpu":
        return "no CPU is checked"
    if backend == "reference":
        return "" if device.type == "cpu" else "it is what the others are compared with"
    if _ops.missing is not None:
        return "the compiled kernels are missing"
    if backend == "triton":
        return (devices.too_old(device) or "") if triton.INSTALLED else "Triton is not installed"
    if backend not in _ops.kernel_devices:
        return f"this build has no kernels for {backend} tensors"
    return (devices.cannot_run(device) or "") if backend == "cuda" else ""


def _numbers(backend: str, family: str, device: torch.device) -> list[str]:
    """In which a family is checked: float32 as torch's settings have it."""
    all_of_them = RUNNERS[backend].numbers
    if backend not in ("cuda", "triton"):
        return list(all_of_them)
    now = float32.numbers(torch.float32)
    if backend == "triton":
        now = triton.numbers(family, torch.float32, device)
    return [n for n in all_of_them if n == now or n not in ("float32", "tf32", "tf32x3")]


def _rows(device: torch.device) -> Iterator[Row]:
    for backend, runner in RUNNERS.items():
        missing = _missing(backend, device)
        for family in runner.families:
            name = f"{backend} {family}"
            if missing:
                yield Row(name, "", "", 0, 0.0, "not here", 0.0, missing)
                continue
            for numbers in _numbers(backend, family, device):
                yield from _checked(backend, family, numbers, device)


def _checked(backend: str, family: str, numbers: str, device: torch.device) -> Iterator[Row]:
    name = f"{backend} {family}"
    try:
        found = in_fresh_thread(lambda: vetting.check(backend, family, numbers, device, True))
    except NotHere as error:
        yield Row(name, "", numbers, 0, 0.0, "not here", 0.0, str(error))
        return
    if device.type == "cuda":
        vetting.learn(device, backend, family, numbers, found.reason, keep=True, warn=False)
    for n, direction in enumerate(("forward", "backward")):
        if found.failed == "forward" and direction == "backward":
            continue
        wrong = found.failed == direction
        verdict = "refused" if wrong else "passed"
        reason = found.reason if wrong else ""
        yield Row(name, direction, numbers, found.cases, found.errors[n], verdict,
                  found.seconds[n], reason)  # fmt: skip
