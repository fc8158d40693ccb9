"""Kernels are checked on a GPU before they first run there for a user.

The first call of a family of kernels in a process, on a device and in a precision, runs small cases
of it, forward and backward, against the reference (``cases``). A wrong result, an error or a fault
that a kernel has recorded refuses the family on that device, with one warning; the next family runs
in its place, and where the last one is refused, the next backend. What was found is kept on disk
(``store``), so that later processes need not ask. ``runners`` knows how each family is made to
run.

Compiled code asks through :func:`settle` wherever it plans a call (``csrc/cuda/vetting.h``),
Triton's launches where they lay one out. Nothing of it concerns the CPU.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from rnnkernels import _ops
from rnnkernels._backends.vetting import cases, store
from rnnkernels._backends.vetting.runners import (
    RUNNERS,
    EarlierFault,
    NotHere,
    Runner,
    in_fresh_thread,
    take_fault,
)
from rnnkernels._core import option_checks
from rnnkernels._core.call import Call
from rnnkernels._core.users_line import users_level

__all__ = [
    "RUNNERS", "EarlierFault", "check", "describe", "forget", "learn", "not_now", "prepare",
    "refusal", "refused", "renew", "settle", "take_fault", "verification",
]  # fmt: skip

PASSES = ("forward", "backward")

#: False where nothing is to be checked; the environment is read once.
_enabled = os.environ.get("RNNKERNELS_VERIFY", "") != "0"


@contextmanager
def verification(mode: bool) -> Iterator[None]:
    """Whether kernels are checked on a GPU before they first run there; on unless the environment
    variable ``RNNKERNELS_VERIFY`` is 0.

    What was refused before stays refused. The setting holds for the whole process. See
    :func:`rnnkernels.verify` for the whole check at once.

    Raises:
        TypeError: ``mode`` is no bool.

    Example::

        with rnnkernels.verification(False):
            y, h_n = gru(x)  # by kernels that nothing may be known of
    """
    global _enabled
    before, _enabled = _enabled, option_checks.flag("mode", mode)
    try:
        yield
    finally:
        _enabled = before


@dataclass
class _Device:
    """What is known of the kernels on one GPU.

    Attributes:
        passed: backend, family and numbers of what was right.
        refused: reasons by backend and family.
        postponed: why a family has not been checked so far, though it was asked for.
    """

    store: store.Store | None
    kept: dict[str, str]
    passed: set[tuple[str, str, str]] = field(default_factory=set)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    postponed: dict[tuple[str, str], str] = field(default_factory=dict)


_devices: dict[int, _Device] = {}
_lock = threading.RLock()


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _of(device: torch.device) -> _Device:
    index = _index(device)
    if index not in _devices:
        kept = store.Store(store.key(device))
        _devices[index] = _Device(kept, kept.load())
    return _devices[index]


def forget() -> None:
    """Of what this process knows; files stay."""
    with _lock:
        _devices.clear()
        if _ops.missing is None:
            _ops.forget_cuda_kernels()


def renew(device: torch.device) -> None:
    """Forgets what is known of one GPU, on disk too."""
    with _lock:
        kept = _of(device).store
        if kept is not None:
            kept.clear()
        forget()


def _capturing(device: torch.device) -> bool:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def not_now(device: torch.device) -> str:
    """Why nothing can be checked on a GPU at this moment, in this thread; ``''`` where it can."""
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export traces the call"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func runs the call"
    if _capturing(device):
        return "a CUDA graph is being captured"
    return ""


@dataclass(frozen=True)
class Outcome:
    """Of all cases of one family in one precision.

    Attributes:
        reason: why they are refused, ``''`` if they are right.
        cases: that ran.
        errors: the largest relative error of forward and of backward.
        seconds: of forward and of backward, the comparison included.
        failed: ``'forward'`` or ``'backward'`` where that is what was wrong.
    """

    reason: str
    cases: int
    errors: tuple[float, ...]
    seconds: tuple[float, ...]
    failed: str = ""


def check(
    backend: str, family: str, numbers: str, device: torch.device, thorough: bool = False
) -> Outcome:
    """Runs the cases of a family against the reference, in this thread.

    Raises:
        NotHere: the device has no such kernels.
        torch.OutOfMemoryError: it has no memory left for them.
        EarlierFault: another kernel recorded a fault before.
    """
    runner = RUNNERS[backend]
    fault = runner.fault(device)
    if fault:
        raise EarlierFault(device, fault)
    dtype = cases.DTYPES.get(numbers, torch.float32)
    errors, seconds = [0.0, 0.0], [0.0, 0.0]
    todo = runner.cases(family, numbers, device)
    if thorough:
        todo = [*todo, *cases.thorough(todo, "wavefront" in family, numbers)]
    ran = 0
    for case in todo:
        call = cases.make(case)
        forward, backward = cases.by_reference(call)
        wanted = forward, backward()
        given = cases.converted(call, dtype, device)
        if not runner.takes(family, given):
            continue
        ran += 1
        passes = _passes(runner, family, given)
        for n, direction in enumerate(PASSES):
            start = time.perf_counter()
            try:
                results = next(passes)
                errors[n] = max(errors[n], cases.largest_error(results, wanted[n]))
                reason = cases.mismatch(results, wanted[n], numbers)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                text = str(error).strip().splitlines() or [""]
                reason = f"{type(error).__name__}: {text[0]}"
            reason = runner.fault(device) or reason  # of which the rest follows
            seconds[n] += time.perf_counter() - start
            if reason:
                why = f"{case} in {numbers}, {direction}: {reason}"
                return Outcome(why, ran, tuple(errors), tuple(seconds), direction)
    if ran == 0:
        raise NotHere(f"{family} kernels take none of the cases in {numbers}")
    return Outcome("", ran, tuple(errors), tuple(seconds))


def _passes(runner: Runner, family: str, call: Call) -> Iterator[cases.Results]:
    found, backward = runner.run(family, call)
    yield found
    yield backward()


def settle(backend: str, device: torch.device, family: str, numbers: str) -> bool:
    """Checks a family in one precision on a device, unless that is known; False where that cannot
    be done now, or nobody wants it done."""
    if not _enabled:
        return False
    with _lock:
        state, name = _of(device), (backend, family)
        if name in state.refused or (*name, numbers) in state.passed:
            return True
        kept = state.kept.get(" ".join(name)) or state.kept.get(" ".join((*name, numbers)))
        if kept is not None:
            learn(device, backend, family, numbers, kept)
            return True
        postponed = not_now(device)
        if not postponed:
            try:
                found = in_fresh_thread(lambda: check(backend, family, numbers, device))
            except EarlierFault:
                raise
            except torch.OutOfMemoryError:
                postponed = "the device has no memory left for it"
            except NotHere as error:
                postponed = str(error)
            except Exception as error:  # before any case ran: the next process may fare better
                learn(device, backend, family, numbers, f"{type(error).__name__}: {error}")
                return True
        if postponed:
            state.postponed[name] = postponed
            return False
        learn(device, backend, family, numbers, found.reason, keep=True)
        return True


def learn(
    device: torch.device,
    backend: str,
    family: str,
    numbers: str,
    reason: str,
    keep: bool = False,
    warn: bool = True,
) -> None:
    """Takes up what was found, ``reason`` being empty where a family is right; and writes it down
    (``keep``)."""
    with _lock:
        state, index = _of(device), _index(device)
        state.postponed.pop((backend, family), None)
        if reason:
            state.refused[backend, family] = reason
        else:
            state.passed.add((backend, family, numbers))
        if keep and state.store is not None:
            name = (backend, family) if reason else (backend, family, numbers)
            state.store.save({" ".join(name): reason})
        if backend == "cuda" and _ops.missing is None:
            _ops.settle_cuda_kernels(index, family, numbers, not reason)
            if reason and family == RUNNERS["cuda"].families[0]:
                _ops.open_short_ways(index, False)
    if reason and warn:
        warnings.warn(
            f"rnnkernels: the {family} kernels of the {backend} backend are refused on {device}, "
            f"and others run in their place: {reason}. rnnkernels.verify() checks all of them.",
            RuntimeWarning,
            stacklevel=users_level(),
        )


def refused(backend: str, device: torch.device) -> dict[str, str]:
    """Reasons by family, as far as they are known."""
    if device.type != "cuda" or device.index not in _devices:
        return {}
    found = list(_devices[device.index].refused.items())  # others may add to it
    return {family: reason for (name, family), reason in found if name == backend}


def refusal(backend: str, device: torch.device, family: str | None = None) -> str | None:
    """Why a whole backend is refused on a device: the family is that takes what no other does, the
    first one unless it is named."""
    last = family or RUNNERS[backend].families[0]
    reason = refused(backend, device).get(last)
    return (
        None if reason is None else f"a check on this device refused its {last} kernels: {reason}"
    )


def prepare(
    backend: str, device: torch.device, numbers: str, family: str | None = None
) -> str | None:
    """Before the first call on a device: checks what stands in for all other families, so that
    none of these is refused with nothing left. Returns what :func:`refusal` does."""
    settle(backend, device, family or RUNNERS[backend].families[0], numbers)
    return refusal(backend, device, family)


def describe(backend: str, device: torch.device) -> str:
    """What is known of the families of a backend on a device, in words."""
    if device.type != "cuda":
        return ""
    known = _devices.get(_index(device), _Device(None, {}))
    parts = []
    for family in reversed(RUNNERS[backend].families):
        passed = [n for b, f, n in list(known.passed) if (b, f) == (backend, family)]
        if (backend, family) in known.refused:
            parts.append(f"{family} refused: {known.refused[backend, family]}")
        elif passed:
            parts.append(f"{family} passed ({', '.join(sorted(passed))})")
        else:
            why = known.postponed.get((backend, family), "")
            why = why or ("" if _enabled else "the check is off")
            parts.append(f"{family} not yet checked" + (f" ({why})" if why else ""))
    return "; ".join(parts)
