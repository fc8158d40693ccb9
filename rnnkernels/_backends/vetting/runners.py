"""How each family of kernels is made to run a case, whatever a call of those sizes would take."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch

from rnnkernels import _ops
from rnnkernels._backends import cuda_plan, triton
from rnnkernels._backends.vetting.cases import Case, Results, by_ops, by_reference
from rnnkernels._core.call import Call

#: Forward's results, and what runs backward.
Run = tuple[Results, Callable[[], Results]]


class NotHere(Exception):
    """This device has no such kernels, or no size of a case that takes them."""


class Runner(Protocol):
    """The families of one backend."""

    @property
    def families(self) -> tuple[str, ...]:
        """Their names; first the one that takes what all others leave."""

    @property
    def numbers(self) -> tuple[str, ...]:
        """What numbers may be in their products."""

    def cases(self, family: str, numbers: str, device: torch.device) -> list[Case]:
        """What is run before the family runs for the first time.

        Raises:
            NotHere: the family does not exist on this device.
        """

    def takes(self, family: str, call: Call) -> bool:
        """Whether this family would run both passes of a case."""

    def run(self, family: str, call: Call) -> Run:
        """Runs a case by this family, in this thread."""

    def fault(self, device: torch.device) -> str:
        """A fault that kernels have recorded on the device since this was asked last, or ``''``."""


class EarlierFault(RuntimeError):
    """A kernel that ran before has recorded a fault, and what it computed is not valid."""

    def __init__(self, device: torch.device, fault: str) -> None:
        super().__init__(f"rnnkernels: a kernel that ran before on {device} failed: {fault}")


def take_fault(device: torch.device) -> str:
    """What CUDA kernels have recorded on a device, such as a wait that reached its bound; it is
    forgotten with that. ``''`` where there is nothing, or where there are no such kernels."""
    if "cuda" not in _ops.kernel_devices or device.type != "cuda":
        return ""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _ops.take_cuda_fault(index)


class Cuda:
    """The CUDA kernels of this package."""

    families = ("stepwise", "grid", "cluster", "grid wavefront", "cluster wavefront")
    numbers = ("float32", "tf32", "bfloat16", "float16", "float64")
    #: Hidden sizes: of one block, and those of which the first has several.
    ALONE = 24
    SHARED = (72, 136, 264, 520)
    AGAIN = 11  # steps, in which every hand-off uses its buffers again

    def cases(self, family: str, numbers: str, device: torch.device) -> list[Case]:
        layers = 3 if "wavefront" in family else 1
        if family == "stepwise":
            return [
                Case("lstm", self.ALONE, lengths=True, reset=True),
                Case("gru", self.ALONE, D=2, drop=True),
            ]
        H = next(
            (H for H in self.SHARED if self._blocks(family, H, layers, numbers, device) > 1), 0
        )
        if not H:
            raise NotHere(self._why(family, layers, numbers, device))
        D = 1 if layers > 1 else 2
        found = [Case("lstm", H, lengths=True, reset=True, layers=layers),
                 Case("gru", H, self.AGAIN, layers=layers, D=D, drop=True)]  # fmt: skip
        if self._blocks(family, self.ALONE, layers, numbers, device):
            found.append(Case("lstm", self.ALONE, layers=layers))
        return found

    def takes(self, family: str, call: Call) -> bool:
        with self._forced(family):
            kernels = {cuda_plan.of_pass(call, backward).kernels for backward in (False, True)}
        return kernels == {family}

    def run(self, family: str, call: Call) -> Run:
        with self._forced(family):
            out, back = by_ops(torch.ops.rnnkernels, call)

        def backward() -> Results:
            with self._forced(family):
                return back()

        return out, backward

    def fault(self, device: torch.device) -> str:
        return take_fault(device)

    @contextmanager
    def _forced(self, family: str) -> Iterator[None]:
        _ops.force_cuda_kernels(family)
        try:
            yield
        finally:
            _ops.force_cuda_kernels("")

    def _plans(
        self, family: str, H: int, layers: int, numbers: str, device: torch.device
    ) -> list[cuda_plan.Plan]:
        with self._forced(family):
            limits = cuda_plan.Device.of(device)
            return [
                cuda_plan.plan("lstm", backward, numbers, H, 18, 1, limits, layers=layers, steps=5)
                for backward in (False, True)
            ]

    def _blocks(self, family: str, H: int, layers: int, numbers: str, device: torch.device) -> int:
        """That share the weights in both passes; 0 where other kernels would run."""
        plans = self._plans(family, H, layers, numbers, device)
        return min(p.blocks for p in plans) if all(p.kernels == family for p in plans) else 0

    def _why(self, family: str, layers: int, numbers: str, device: torch.device) -> str:
        plans = self._plans(family, self.SHARED[0], layers, numbers, device)
        reasons = [p.reason for p in plans if p.reason]
        return reasons[0] if reasons else f"no case is planned as {family} here"


class Triton:
    """The Triton kernels of this package. Of cells whose products are normalised there is one
    family, for which no other stands in."""

    families = ("step", "grid", "resident", triton.ROWS)
    numbers = ("float32", "tf32", "tf32x3", "bfloat16", "float16")

    def cases(self, family: str, numbers: str, device: torch.device) -> list[Case]:
        if family == triton.ROWS:  # of one block of units, of two
            return [
                Case("layer_norm_gru", 24),
                Case("layer_norm_lstm", 264, lengths=True, reset=True),
            ]
        H = 16 if family == "resident" else 72  # of one program, of several
        return [Case("lstm", H, lengths=True, reset=True)]

    def takes(self, family: str, call: Call) -> bool:
        from rnnkernels._backends.triton import launch

        if call.cell.normed or family == triton.ROWS:
            return triton.family_of(call) == family
        with triton.forced.to(family):
            return launch.kinds(call) == {family}

    def run(self, family: str, call: Call) -> Run:
        with triton.forced.to(family):
            out, back = by_ops(torch.ops.rnnkernels_triton, call)

        def backward() -> Results:
            with triton.forced.to(family):
                return back()

        return out, backward

    def fault(self, device: torch.device) -> str:
        from rnnkernels._backends.triton import launch

        return launch.take_fault(device)


class Cpu:
    """The kernels for the CPU, for :func:`rnnkernels.verify`."""

    families = ("kernels",)
    numbers = ("float32", "bfloat16", "float16", "float64")

    def cases(self, family: str, numbers: str, device: torch.device) -> list[Case]:
        one = Case("lstm", 24, lengths=True, reset=True)
        return [one, replace(one, H=72), Case("gru", 24, layers=3)]

    def takes(self, family: str, call: Call) -> bool:
        return True

    def run(self, family: str, call: Call) -> Run:
        return by_ops(torch.ops.rnnkernels, call)

    def fault(self, device: torch.device) -> str:
        return ""


class Reference:
    """The reference itself, against itself in float64."""

    families = ("loop",)
    numbers = ("float32", "bfloat16", "float16")

    def cases(self, family: str, numbers: str, device: torch.device) -> list[Case]:
        return [Case("lstm", 24, lengths=True, reset=True)]

    def takes(self, family: str, call: Call) -> bool:
        return True

    def run(self, family: str, call: Call) -> Run:
        return by_reference(call)

    def fault(self, device: torch.device) -> str:
        return ""


#: By the names of backends.
RUNNERS: dict[str, Runner] = {
    "cuda": Cuda(),
    "triton": Triton(),
    "cpu": Cpu(),
    "reference": Reference(),
}


def in_fresh_thread(work: Callable[[], Any]) -> Any:
    """The result of ``work`` from a thread of its own: autocast, modes, transforms, inference mode
    and what is excluded from dispatch are those of the caller's thread, and none of them is to
    change how a case runs."""
    result: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="rnnkernels check on first use")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
