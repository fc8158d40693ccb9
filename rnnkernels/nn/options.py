"""The options of layers beyond torch.nn's, as type checkers, ``help`` and completion see them, and
what a call of layers returns."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict, TypeVar, Unpack, overload

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnkernels._core.option_checks import GradClip, Truncate, Zoneout
from rnnkernels.functional._spec import AllStates

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Options(TypedDict, total=False):
    """What :class:`rnnkernels.LSTM` takes beyond :class:`torch.nn.LSTM`, where it says more."""

    bias_mode: str
    merge_mode: str
    backend: str | None
    truncate: Truncate
    grad_clip: GradClip
    recompute: int | None
    heads: int
    weight_drop: float
    recurrent_dropout: float
    input_dropout: float
    zoneout: Zoneout
    layer_norm: bool


class CallOptions(TypedDict, total=False):
    """What a call takes beyond ``input`` and ``hx``, and ``return_all_states``."""

    lengths: Tensor | NDArray[Any] | Sequence[int] | None
    reset: Tensor | NDArray[Any] | Sequence[Any] | None
    truncate: Truncate | EllipsisType
    grad_clip: GradClip | EllipsisType
    recompute: int | EllipsisType | None


F = TypeVar("F", bound=Callable[..., Any])


def spelled_out(base: type) -> Callable[[F], F]:
    """Gives a constructor, whose ``**options`` go to that of ``base``, a signature that has each of
    them by its name."""

    def wrap(init: F) -> F:
        own = list(inspect.signature(init).parameters.values())
        theirs = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        own = [p for p in own if p.kind is not p.VAR_KEYWORD]
        own += [p for p in theirs if p.kind is p.KEYWORD_ONLY]
        init.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        return init

    return wrap


def known(cls: type, options: Iterable[str]) -> None:
    """Refuses options that are none, in the name of the class that was given them.

    Raises:
        TypeError: there is one.
    """
    for name in options:
        if name not in Options.__annotations__:
            every = [*inspect.signature(cls).parameters]
            near = difflib.get_close_matches(name, every, 1)
            raise TypeError(
                f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}"
                + (f". Did you mean {near[0]!r}?" if near else "")
            )


S = TypeVar("S")

if TYPE_CHECKING:
    from rnnkernels.nn.base import RNNBase

    class Typed(RNNBase, Generic[S]):
        """Layers whose states are S; what a call returns follows from what it is given."""

        @overload
        def __call__(
            self,
            input: Tensor,
            hx: S | None = None,
            *,
            return_all_states: Literal[False] = False,
            **options: Unpack[CallOptions],
        ) -> tuple[Tensor, S]: ...
        @overload
        def __call__(
            self,
            input: PackedSequence,
            hx: S | None = None,
            *,
            return_all_states: Literal[False] = False,
            **options: Unpack[CallOptions],
        ) -> tuple[PackedSequence, S]: ...
        @overload
        def __call__(
            self,
            input: Tensor,
            hx: S | None = None,
            *,
            return_all_states: Literal[True],
            **options: Unpack[CallOptions],
        ) -> tuple[Tensor, S, AllStates]: ...
        @overload
        def __call__(
            self,
            input: PackedSequence,
            hx: S | None = None,
            *,
            return_all_states: Literal[True],
            **options: Unpack[CallOptions],
        ) -> tuple[PackedSequence, S, AllStates]: ...
        @overload
        def __call__(
            self,
            input: Tensor | PackedSequence,
            hx: S | None = None,
            *,
            return_all_states: bool = False,
            **options: Unpack[CallOptions],
        ) -> Any: ...
        def __call__(self, *args: Any, **options: Any) -> Any: ...

    OneState = Typed[Tensor]
    TwoStates = Typed[tuple[Tensor, Tensor]]
