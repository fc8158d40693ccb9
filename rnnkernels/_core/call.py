"""What a backend is asked to do: a call of all layers of a module, one layer of it, the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnkernels._core import noise
from rnnkernels.cells import Cell, find


class Clip(NamedTuple):
    """How backward bounds the gradients of the gates' pre-activations at every step.

    The gradients g of ``gx`` and of ``gh``, ``[G*H]`` for each row, are bounded in the same way:

    ========= ==================================================================================
    kind      what becomes of g
    ========= ==================================================================================
    ``none``  ``g``
    ``value`` ``max(-bound, min(bound, g))``, elementwise (Graves 2013, section 2.1)
    ``norm``  ``g * min(1, bound / |dgx|)``, the norm over all gates of a row (Pascanu et al. 2013)
    ``tanh``  ``bound * tanh(g / bound)``, elementwise: smooth, and the identity for small g
    ========= ==================================================================================
    """

    kind: str = "none"
    bound: float = 1.0


NO_CLIP = Clip()


class LayerWeights(NamedTuple):
    """The weights of one layer and direction."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor | None  # [G*H, R]; None: gates of the cell have no hidden part
    b_ih: Tensor | None = None  # [G*H]
    b_hh: Tensor | None = None  # [G*H]
    w_hr: Tensor | None = None  # [R, H]; None: no projection, R = H
    params: tuple[Tensor, ...] = ()  # [H] each: those of the cell itself, in its order

    @classmethod
    def from_list(
        cls,
        weights: Sequence[Tensor],
        projected: bool | None = None,
        params: int = 0,
        recurrent: bool = True,
    ) -> LayerWeights:
        """From torch's order: w_ih, w_hh, then b_ih, b_hh and w_hr as far as they exist, and behind
        them as many parameters of the cell as said; without w_hh and b_hh if not recurrent.

        Where ``projected`` does not say whether there is a w_hr, a last matrix is one.
        """
        for w in weights:
            if not isinstance(w, Tensor):
                raise TypeError(f"weights: expected tensors, got {type(w).__name__}")
        own, matrices = len(weights) - params, 1 + recurrent
        if projected is None:
            projected = own > matrices and weights[own - 1].dim() == 2
        if not matrices <= own - projected <= 2 * matrices:
            order = "[w_ih, w_hh, b_ih, b_hh, w_hr]" if recurrent else "[w_ih, b_ih, w_hr]"
            behind = f", and behind them the parameters of the cell, {params}" if params else ""
            raise ValueError(
                f"weights: expected {order} as far as they exist for each layer and "
                f"direction{behind}, got {len(weights)} tensors"
            )
        w_ih, *rest = weights[:own]
        w_hh = rest.pop(0) if recurrent else None
        w_hr = rest[-1] if projected else None
        b_ih, b_hh = [*rest[: len(rest) - projected], None, None][:2]
        return cls(w_ih, w_hh, b_ih, b_hh, w_hr, tuple(weights[own:]))

    @property
    def tensors(self) -> list[Tensor]:
        """Those that there are, in the order of the ops."""
        return [w for w in self[:5] if w is not None] + list(self.params)

    def each(self, f: Callable[[Tensor], Tensor]) -> LayerWeights:
        """The same with f(tensor) in place of each."""

        def some(w: Tensor | None) -> Tensor | None:
            return None if w is None else f(w)

        w_hh, b_ih, b_hh = some(self.w_hh), some(self.b_ih), some(self.b_hh)
        params = tuple(map(f, self.params))
        return LayerWeights(f(self.w_ih), w_hh, b_ih, b_hh, some(self.w_hr), params)


class Call(NamedTuple):
    """All layers and directions of a module over one sequence.

    The fields up to ``step`` are the arguments of ``rnnkernels::sequence_forward``, in its order
    (``csrc/ops/calls.h``); the others are for Python alone.
    """

    cell_name: str
    layers: int
    directions: int
    #: Of each direction, with states and recurrent weights of their own: each counts as a direction
    #: wherever shapes have a D. Weights have the rows of one head behind those of another.
    heads: int
    projected: bool  # each layer and direction has a w_hr
    merge_mode: str  # how both directions become one output
    window: int  # no gradient crosses a boundary of windows of so many steps; 0: no windows
    clip: str  # see Clip
    bound: float
    x: Tensor  # [T, B, I]; packed: [N, I]
    weights: Sequence[Tensor]  # of all layers and directions, in torch's order
    h0: Tensor  # [L*D, B, R]
    #: [L*D, B, C*H] where the cell has C states beside h, one behind the other.
    c0: Tensor | None
    #: Factors of each layer's output on its way to the next (dropout), one between any two layers:
    #: of y's shape, or [1, B, ...] for all steps.
    masks: Sequence[Tensor] | None = None
    #: [L*D, B, R]: factors of the h that W_hh is multiplied by, and of nothing else, at all steps.
    h_mask: Tensor | None = None
    lengths: Tensor | None = None  # [B] int64
    #: Of packed steps, without padding: rows stand longest first and none is empty, and of each
    #: step t only those that reach it, from place ``starts[t]`` on. [T + 1] int64.
    starts: Tensor | None = None
    reset: Tensor | None = None  # [T, B] bool; packed: [N]
    noise: Tensor | None = None  # [E] float64: the probabilities of a cell that draws
    #: By what it is drawn: :mod:`rnnkernels._core.noise`. [B, 5] int64; None: the probabilities
    #: themselves are taken.
    draws: Tensor | None = None
    #: [L, T, B, D], of :func:`norms_dtype`: filled with ``|dL/dh_t|`` by every backward.
    flow: Tensor | None = None
    save: bool = False  # keep what a backward needs: autograd sees to it
    all_states: bool = False  # return every h and c
    step: bool = False  # of a cell: parameters have its names in errors
    #: Packed steps [N, ...] as [T, B, ...], with zeros for padding: for who looks on.
    padded: Callable[[Tensor], Tensor] | None = None
    #: For backward, keep the states every so many steps only and compute the rest again; 0: keep
    #: everything.
    recompute: int = 0
    #: Number of the first of these layers in its module, for who looks on.
    first: int = 0

    @property
    def numbers(self) -> Sequence[int]:
        """Those of the layers in their module; -1 for a cell."""
        return [-1] if self.step else range(self.first, self.first + self.layers)

    @property
    def cell(self) -> Cell:
        return find(self.cell_name)

    @property
    def T(self) -> int:
        return self.x.size(0) if self.starts is None else self.starts.size(0) - 1

    @property
    def B(self) -> int:
        return self.h0.size(1)

    @property
    def H(self) -> int:
        return units(self)

    @property
    def merged(self) -> bool:
        """Whether y is another tensor than what the last layer gives."""
        return self.directions > 1 and self.merge_mode != "concat"

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that a gradient may be asked for."""
        return [self.x, self.h0, *([] if self.c0 is None else [self.c0]), *self.weights]

    def layer(self, index: int, x: Tensor) -> Layer:
        """One layer of the call, which takes x."""
        D, cell = self.directions, self.cell
        each = len(self.weights) // (self.layers * D)
        groups = [
            LayerWeights.from_list(
                self.weights[(index * D + d) * each :][:each],
                self.projected,
                cell.P,
                cell.recurrent,
            )
            for d in range(D)
        ]
        rows = slice(index * D * self.heads, (index + 1) * D * self.heads)
        draws = None if self.draws is None else noise.of_stream(self.draws, rows.start)
        return Layer(
            self.cell_name,
            x,
            [w.w_ih for w in groups],
            [w.w_hh for w in groups if w.w_hh is not None],
            [w.b_ih for w in groups if w.b_ih is not None],
            [w.b_hh for w in groups if w.b_hh is not None],
            [w.w_hr for w in groups if w.w_hr is not None],
            self.h0[rows],
            None if self.c0 is None else self.c0[rows],
            self.lengths,
            self.reset,
            starts=self.starts,
            noise=self.noise,
            draws=draws,
            all_states=self.all_states,
            number=-1 if self.step else index,
            window=self.window,
            clip=Clip(self.clip, self.bound),
            flow=None if self.flow is None else self.flow[index],
            params=[list(w.params) for w in groups],
            heads=self.heads,
            h_mask=None if self.h_mask is None else self.h_mask[rows],
        )


def units(call: Any) -> int:
    """H of a call or a layer, or of the arguments of an op that have its names."""
    if call.c0 is None:
        return call.h0.size(2)  # type: ignore[no-any-return]
    cell_name = getattr(call, "cell_name", None) or call.cell
    return call.c0.size(2) // find(cell_name).C  # type: ignore[no-any-return]


#: How many fields of a :class:`Call` the op takes.
ARGUMENTS = Call._fields.index("step") + 1


class Layer(NamedTuple):
    """One layer over one sequence, both directions at once. Lists hold one tensor per direction;
    those of recurrent weights, biases and projections may be empty."""

    cell_name: str
    x: Tensor  # [T, B, I]; packed: [N, I]
    w_ih: list[Tensor]  # [G*H, I] each
    w_hh: list[Tensor]  # [G*H, R] each
    b_ih: list[Tensor]  # [G*H] each
    b_hh: list[Tensor]  # [G*H] each
    w_hr: list[Tensor]  # [R, H] each
    h0: Tensor  # [D, B, R]
    c0: Tensor | None  # [D, B, C*H] where the cell has states beside h
    lengths: Tensor | None
    reset: Tensor | None
    all_states: bool = False
    number: int = -1  # of the layer, for the names of parameters in errors; -1: a single cell
    window: int = 0
    clip: Clip = NO_CLIP
    flow: Tensor | None = None  # [T, B, D]
    starts: Tensor | None = None
    params: Sequence[list[Tensor]] = ()  # of each direction those of the cell, [H] each
    heads: int = 1  # see Call
    h_mask: Tensor | None = None  # [D, B, R]
    noise: Tensor | None = None  # as those of a call whose first layer it is
    draws: Tensor | None = None

    @property
    def cell(self) -> Cell:
        return find(self.cell_name)

    @property
    def T(self) -> int:
        return self.x.size(0) if self.starts is None else self.starts.size(0) - 1

    @property
    def B(self) -> int:
        return self.h0.size(1)

    @property
    def H(self) -> int:
        return units(self)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that a gradient may be asked for."""
        lists = (self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr)
        states = [self.h0, *([] if self.c0 is None else [self.c0])]
        params = [t for some in self.params for t in some]
        return [self.x, *(t for some in lists for t in some), *states, *params]

    def call(self) -> Call:
        """The call of this layer alone."""
        lists = (self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr)
        D = len(self.w_ih)
        params = self.params or [[]] * D
        return Call(
            self.cell_name,
            layers=1,
            directions=D,
            heads=self.heads,
            projected=bool(self.w_hr),
            merge_mode="concat",
            window=self.window,
            clip=self.clip.kind,
            bound=self.clip.bound,
            x=self.x,
            weights=[
                t for d in range(D) for t in (*(some[d] for some in lists if some), *params[d])
            ],
            h0=self.h0,
            c0=self.c0,
            h_mask=self.h_mask,
            lengths=self.lengths,
            starts=self.starts,
            reset=self.reset,
            noise=self.noise,
            draws=self.draws,
            flow=None if self.flow is None else self.flow[None],
            all_states=self.all_states,
            step=self.number < 0,
        )


def needs_gradient(tensors: Iterable[Tensor]) -> bool:
    """Whether a backward through these can come."""
    return torch.is_grad_enabled() and any(
        level.requires_grad for t in tensors for level in wrapped(t)
    )


def may_need_gradient(tensors: Iterable[Tensor]) -> bool:
    """The same, but for torch.jit.trace: a trace may be trained, whether gradients are on or off
    while it is recorded; and it is checked by another one, for which they are off."""
    compiled = torch.compiler.is_compiling()
    traced = not compiled and torch._C._get_tracing_state() is not None
    return traced or needs_gradient(tensors)


def differentiates(tensors: Iterable[Tensor]) -> bool:
    """Whether a backward through these may come, or tangents may go with them."""
    forward_mode = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    return forward_mode or may_need_gradient(tensors)


def wrapped(t: Tensor) -> Iterator[Tensor]:
    """A tensor, and what it wraps for each transform of torch.func that it is in."""
    yield t
    if torch.compiler.is_compiling():  # which follows no further, and has no need to
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
        yield t


def is_batch(t: Tensor) -> bool:
    """Whether torch.vmap sees several tensors in one, which nobody can look at."""
    return any(torch._C._functorch.is_batchedtensor(level) for level in wrapped(t))


def norms_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the norms of gradients of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LayerResult(NamedTuple):
    """What a layer returns; packed, [N] takes the place of [T, B]."""

    y: Tensor  # [T, B, D*R]; zero past the end of a row
    h_n: Tensor  # [D, B, R]: the state at each row's own end
    c_n: Tensor | None  # [D, B, C*H]
    c: Tensor | None  # [T, B, D, C*H]: every c, if asked for


class Result(NamedTuple):
    """What a call returns; packed, [N] takes the place of [T, B]."""

    y: Tensor  # [T, B, D*R], or [T, B, R] where directions are merged otherwise
    h_n: Tensor  # [L*D, B, R]: the state at each row's own end
    c_n: Tensor | None  # [L*D, B, C*H]
    h: list[Tensor] | None  # of each layer every h [T, B, D, R], if asked for
    c: list[Tensor] | None  # of each layer every c [T, B, D, C*H], if asked for and there is one


def check_listed(count: int | torch.SymInt, what: str) -> None:
    """Refuses so many steps, or windows of steps, that there is no memory for a list of them: rows
    have some of their own, but there may be none.

    Raises:
        ValueError: there are 2^31 or more.
    """
    if isinstance(count, int) and count >= 2**31:
        raise ValueError(
            f"input: expected fewer than {2**31} {what}, which are listed here, got {count}. "
            "Split the sequence."
        )


def in_turn(call: Call, run: Callable[[Layer], LayerResult]) -> Result:
    """Runs the layers of a call one after the other; ``run`` takes one of them.

    What leads from a layer to the next one happens here, as it does for compiled backends in
    ``csrc/ops/layers.h``: directions are merged, masks multiplied.

    Raises:
        ValueError: there are so many steps that nobody can list them.
    """
    check_listed(call.T, "steps")
    D, x = call.directions, call.x
    results = []
    for index in range(call.layers):
        results.append(run(call.layer(index, x)))
        x = merge(results[-1].y, call.merge_mode) if D > 1 else results[-1].y
        if call.masks and index + 1 < call.layers:
            x = x * of_steps(call.masks[index], call.starts, x.size(0))
    c_n = [r.c_n for r in results if r.c_n is not None]
    every_h = every_c = None
    if call.all_states:
        shape = D * call.heads, call.h0.size(2)
        every_h = [r.y.view(*r.y.shape[:-1], *shape) for r in results]
        every_c = [r.c for r in results if r.c is not None] or None
    return Result(
        x, _joined([r.h_n for r in results]), _joined(c_n) if c_n else None, every_h, every_c
    )


def of_steps(mask: Tensor, starts: Tensor | None, N: int) -> Tensor:
    """A mask as factors of all steps ``[T, B, ...]`` or, packed, ``[N, ...]``, of which it may
    leave out those that it repeats."""
    if starts is None or mask.dim() == 2:
        return mask
    first = starts[:-1].repeat_interleave(starts.diff(), output_size=N)
    return mask[0].index_select(0, torch.arange(N, device=starts.device) - first)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def merge(y: Tensor, mode: str) -> Tensor:
    """Both directions of y [..., 2*R] as one output."""
    if mode == "concat":
        return y
    forward, reverse = y.chunk(2, dim=-1)
    if mode == "mul":
        return forward * reverse
    total = forward + reverse
    return total if mode == "sum" else total / 2
