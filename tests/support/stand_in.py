"""Kernels that stand in for those of a GPU where families are checked: those for the CPU, right or
wrong in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rnnkernels._backends import vetting
from rnnkernels._backends.vetting import cases, runners, store
from rnnkernels._backends.vetting.cases import Case, Results
from rnnkernels._core.call import Call, Clip

GPU = torch.device("cuda", 0)
CASES = [Case("lstm", 8, lengths=True, reset=True), Case("gru", 6, D=2, clip=Clip("value", 0.3))]

Change = Callable[[Tensor], Tensor]


@dataclass
class StandIn:
    """A runner; ``wrong`` has for a family the result that is changed, and how."""

    families: tuple[str, ...]
    numbers: tuple[str, ...]
    wrong: dict[str, tuple[str, Change]] = field(default_factory=dict)
    raises: dict[str, Exception] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    ran: list[str] = field(default_factory=list)
    pending: str = ""  # a fault that nobody has asked for so far

    def cases(self, family: str, numbers: str, device: torch.device) -> list[Case]:
        assert device == GPU
        if family in self.absent:
            raise runners.NotHere("this card has none")
        return CASES

    def takes(self, family: str, call: Call) -> bool:
        return True

    def run(self, family: str, call: Call) -> runners.Run:
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        self.ran.append(family)
        self.pending = self.faults.get(family, "")
        if family in self.raises:
            raise self.raises[family]
        out, back = cases.by_ops(torch.ops.rnnkernels, call)

        def changed(results: Results) -> Results:
            name, change = self.wrong.get(family, ("", torch.clone))
            return results | {name: change(results[name])} if name in results else results

        return changed(out), lambda: changed(back())

    def fault(self, device: torch.device) -> str:
        found, self.pending = self.pending, ""
        return found


@contextmanager
def on_gpu(folder: Path, backend: str = "cuda") -> Iterator[StandIn]:
    """A device whose kernels are the stand-in, with an empty cache folder."""
    real = runners.RUNNERS[backend]
    convert = cases.converted
    with pytest.MonkeyPatch.context() as patch:
        runner = StandIn(real.families, real.numbers)
        patch.setitem(runners.RUNNERS, backend, runner)
        patch.setattr(
            cases, "converted", lambda c, dtype, _: convert(c, dtype, torch.device("cpu"))
        )
        patch.setattr(store, "key", lambda device: {"name": str(device)})
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(vetting, "_enabled", True)
        vetting.forget()
        try:
            yield runner
        finally:
            vetting.forget()


def settle(family: str, numbers: str = "float32") -> bool:
    return vetting.settle("cuda", GPU, family, numbers)


def one_more(t: Tensor) -> Tensor:
    t = t.clone()
    t.flatten()[-1] += 1
    return t
