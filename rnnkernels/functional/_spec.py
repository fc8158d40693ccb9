"""What a call of layers is asked to do, without its tensors, and what it may give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from rnnkernels._core.call import NO_CLIP, Clip
from rnnkernels._core.checks import Truncate
from rnnkernels.cells import find

State = Tensor | tuple[Tensor, Tensor]


class AllStates(NamedTuple):
    """Every state of every layer, as ``return_all_states=True`` gives it.

    Attributes:
        h: one tensor per layer, ``[T, B, D, R]`` (``[B, T, D, R]`` with batch_first,
            ``[T, D, R]`` unbatched, a PackedSequence of ``[N, D, R]`` for packed input).
        c: the same for c with H in place of R; None for cells without c.
    """

    h: tuple[Any, ...]
    c: tuple[Any, ...] | None


@dataclass(frozen=True)
class Spec:
    """A stack of layers without its weights."""

    kind: str  # as errors call it: RNN, LSTM or GRU
    cell: str
    input_size: int
    hidden_size: int
    num_layers: int = 1
    proj_size: int = 0
    bidirectional: bool = False
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = False
    merge_mode: str = "concat"
    backend: str | None = None
    truncate: Truncate = None
    grad_clip: Clip = NO_CLIP
    recompute: int = 0

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def R(self) -> int:
        """Size of h: the projection's where there is one."""
        return self.proj_size or self.hidden_size

    @property
    def has_c(self) -> bool:
        return find(self.cell).S > 1

    @property
    def drops(self) -> bool:
        """Whether anything falls out between layers."""
        return self.training and self.dropout > 0

    @property
    def width(self) -> int:
        """Size of the output of a layer, once its directions are merged."""
        return self.D * self.R if self.merge_mode == "concat" else self.R
