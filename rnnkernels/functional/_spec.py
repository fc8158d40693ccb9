"""What a call of layers is asked to do, without its tensors, and what it may give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkernels._core.call import NO_CLIP, Clip
from rnnkernels._core.option_checks import Truncate
from rnnkernels.cells import find

#: h, or all states where there are several.
State = Tensor | tuple[Tensor, ...]


class AllStates(NamedTuple):
    """Every state of every layer, as ``return_all_states=True`` gives it.

    Attributes:
        h: one tensor per layer, ``[T, B, D, R]`` (``[B, T, D, R]`` with batch_first,
            ``[T, D, R]`` unbatched, a PackedSequence of ``[N, D, R]`` for packed input).
        c: the same for c with H in place of R; for each layer a tuple of these where there are
            several states beside h; None for cells without any.
    """

    h: tuple[Any, ...]
    c: tuple[Any, ...] | Any


def zeros(like: Tensor, *shape: int | torch.SymInt) -> Tensor:
    """The states where none are given. In graphs for a CPU one zero stands for all of them, which
    the op repeats: a compiler would share the loop that fills them out among threads, and wait for
    these longer than it takes."""
    if torch.compiler.is_compiling() and like.is_cpu:
        return like.new_zeros(()).expand(shape)
    return like.new_zeros(shape)


def side_by_side(states: Sequence[Tensor]) -> list[Tensor]:
    """h, and one tensor [.., C*H] of all states beside it, as calls take them."""
    return [*states] if len(states) < 3 else [states[0], torch.cat(list(states[1:]), -1)]


def each_beside_h(c: Tensor, n: int) -> list[Tensor]:
    """Each of n states [.., H] of c [.., n*H]. They may be changed in place, as what torch.chunk
    gives may not."""
    H = c.size(-1) // n
    return [c] if n == 1 else [c.narrow(-1, k * H, H) for k in range(n)]


def each_state(cell: str, states: Sequence[Tensor], heads: int = 1) -> State:
    """The way back, as users see states, from those of each head."""
    n = find(cell).C
    h = of_all_heads(states[0], heads)
    return (h, *(of_all_heads(c, heads) for c in each_beside_h(states[1], n))) if n else h


def apart_by_heads(t: Tensor, heads: int) -> Tensor:
    """A state [L*D, B, H] of all heads as that of each, [L*D*heads, B, H/heads]."""
    if heads == 1:
        return t
    rows, B, size = t.shape
    return t.reshape(rows, B, heads, size // heads).transpose(1, 2).flatten(0, 1)


def of_all_heads(t: Tensor, heads: int) -> Tensor:
    """The way back; without B too."""
    if heads == 1:
        return t
    return t.view(t.size(0) // heads, heads, *t.shape[1:]).movedim(1, -2).flatten(-2)


def given_states(cell: str, hx: Any) -> list[Any]:
    """The states that a user hands over.

    Raises:
        TypeError: these are not as many as the cell has.
    """
    n = find(cell).S
    if n == 1:
        return [hx]
    if not isinstance(hx, (tuple, list)) or len(hx) != n:
        got = f"{len(hx)} values" if isinstance(hx, (tuple, list)) else type(hx).__name__
        wanted = ", ".join(f"{name}_0" for name in getattr(find(cell), "states", ("h", "c")))
        raise TypeError(
            f"hx: expected a tuple of {'two' if n == 2 else n} tensors ({wanted}), got {got}"
        )
    return [*hx]


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
    heads: int = 1
    weight_drop: float = 0.0
    recurrent_dropout: float = 0.0
    input_dropout: float = 0.0
    noise: tuple[float, ...] = ()  # probabilities of the cell's own
    zoneout: tuple[float, ...] = ()  # of each state; () is none
    layer_norm: bool = False

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def R(self) -> int:
        """Size of h: the projection's where there is one."""
        return self.proj_size or self.hidden_size

    @property
    def C(self) -> int:
        """States beside h."""
        return find(self.cell).C

    @property
    def drops(self) -> bool:
        """Whether anything falls out between layers."""
        return self.training and self.dropout > 0

    @property
    def drops_inputs(self) -> bool:
        return self.training and self.input_dropout > 0

    @property
    def drops_states(self) -> bool:
        return self.training and self.recurrent_dropout > 0

    @property
    def drops_weights(self) -> bool:
        return self.training and self.weight_drop > 0

    @property
    def width(self) -> int:
        """Size of the output of a layer, once its directions are merged."""
        return self.D * self.R if self.merge_mode == "concat" else self.R

    @property
    def is_plain(self) -> bool:
        """Whether no option is on, as where layers take the short way past Python."""
        return _options(self) == _OFF


#: What the short way takes, on or off; every other field is an option that it knows nothing of.
_TAKEN = frozenset(
    (
        "kind", "cell", "input_size", "hidden_size", "num_layers", "proj_size", "bidirectional",
        "batch_first", "training", "merge_mode", "backend",
    )
)  # fmt: skip
_OPTIONS = [field for field in fields(Spec) if field.name not in _TAKEN]
_options = attrgetter(*(field.name for field in _OPTIONS))
_OFF = tuple(field.default for field in _OPTIONS)
