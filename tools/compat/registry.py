"""What a row is, the list of them, and how one is tried."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import rnnkernels

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
I, H, T, B = 4, 6, 5, 3

PASSES, FAILS, NONE, MISSING = "pass", "FAIL", "n/a", "not installed"


@dataclass(frozen=True)
class Library:
    """Whose layers a row tries."""

    name: str
    module: Any

    @property
    def ours(self) -> bool:
        return self.module is rnnkernels

    def make(self, kind: str, *sizes: int, **options: Any) -> Any:
        """A layer or cell [I, H] whose weights depend on nothing else."""
        torch.manual_seed(0)
        return getattr(self.module, kind)(*(sizes or (I, H)), **options)

    def model(self, kind: str = "LSTM", **options: Any) -> Model:
        """A layer and a linear head on its output."""
        return Model(self.make(kind, **options))


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        hidden: Any = layer.hidden_size
        width = hidden * (2 if layer.bidirectional else 1)
        self.layer, self.head = layer, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.layer(x)[0])
        return result


#: In the order in which they are printed.
LIBRARIES = (Library("torch.nn", nn), Library("rnnkernels", rnnkernels))


@dataclass(frozen=True)
class Row:
    """One line of the table: ``run`` raises where a library does not do what ``title`` says."""

    section: str
    title: str
    run: Callable[[Library], None]
    ours_only: bool = False
    needs: tuple[str, ...] = ()
    exception: str = ""  # why ours fail, where they do
    costly: bool = False  # seconds, not parts of one: compilers of C++, further processes

    def attempt(self, library: Library) -> Outcome:
        """Tries it; whatever goes wrong is the outcome, since that is what the table tells."""
        if self.ours_only and not library.ours:
            return Outcome(NONE)
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if absent:
            return Outcome(MISSING, f"needs {', '.join(absent)}")
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.run(library)
        except Exception as error:
            return Outcome(FAILS, f"{type(error).__name__}: {error}")
        finally:
            torch.compiler.reset()
            torch.set_autocast_cache_enabled(True)  # torch.onnx leaves it off where it fails
        return Outcome(PASSES)


@dataclass(frozen=True)
class Outcome:
    word: str
    reason: str = ""


@dataclass
class Section:
    """Rows of one kind, which a module of this package lists by decorating functions."""

    name: str
    rows: list[Row] = field(default_factory=list)

    def row(
        self,
        title: str,
        *,
        ours_only: bool = False,
        needs: Iterable[str] = (),
        exception: str = "",
        costly: bool = False,
    ) -> Callable[[Callable[[Library], None]], Callable[[Library], None]]:
        """Adds a row with this title, which the decorated function tries."""

        def add(run: Callable[[Library], None]) -> Callable[[Library], None]:
            assert title not in {row.title for row in self.rows}, f"{title}: listed twice"
            self.rows.append(Row(self.name, title, run, ours_only, tuple(needs), exception, costly))
            return run

        return add


def tensors(result: Any) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else [t for part in result for t in tensors(part)]


def total(result: Any) -> Tensor:
    """A loss to which every output contributes."""
    return torch.stack([t.float().square().sum() for t in tensors(result)]).sum()


def same(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """An error where two results differ."""
    left, right = tensors(found), tensors(wanted)
    assert len(left) == len(right) > 0, f"{len(left)} outputs instead of {len(right)}"
    for got, want in zip(left, right, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def gradients(module: nn.Module, *args: Any) -> list[Tensor]:
    """Of every parameter, for :func:`total`."""
    return list(torch.autograd.grad(total(module(*args)), list(module.parameters())))
