"""Everything above a single layer, once for all cells: stacks, directions, dropout, batch_first,
unbatched input, packed and padded sequences, checks of what the user passed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import _VF, Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from rnnkernels import backends, checks, ops, truncation
from rnnkernels.call import NO_CLIP, Call, Clip, needs_gradient
from rnnkernels.cells import CELLS
from rnnkernels.checks import Truncate
from rnnkernels.packing import Packed, Rows, known
from rnnkernels.truncation import Outputs

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

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def R(self) -> int:
        """Size of h: the projection's where there is one."""
        return self.proj_size or self.hidden_size

    @property
    def has_c(self) -> bool:
        return CELLS[self.cell].S > 1

    @property
    def drops(self) -> bool:
        """Whether anything falls out between layers."""
        return self.training and self.dropout > 0

    @property
    def chained(self) -> bool:
        """Whether each layer takes the y of the one below it, but for what falls out."""
        return not (self.bidirectional or self.proj_size)


class Steps(NamedTuple):
    """Which steps the rows have; see :class:`rnnkernels.call.Call`."""

    lengths: Tensor | None = None
    starts: Tensor | None = None
    padded: Callable[[Tensor], Tensor] | None = None


NO_STEPS = Steps()


class LayerWeights(NamedTuple):
    """The weights of one layer and direction; see :class:`rnnkernels.call.Call` for shapes."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None

    @classmethod
    def from_list(cls, weights: Sequence[Tensor], projected: bool | None = None) -> LayerWeights:
        """From torch's order: w_ih, w_hh, then b_ih, b_hh and w_hr as far as they exist.

        Where ``projected`` does not say whether there is a w_hr, a last matrix is one.
        """
        for w in weights:
            if not isinstance(w, Tensor):
                raise TypeError(f"weights: expected tensors, got {type(w).__name__}")
        if projected is None:
            projected = len(weights) > 2 and weights[-1].dim() == 2
        if not 2 <= len(weights) - projected <= 4:
            raise ValueError(
                "weights: expected [w_ih, w_hh, b_ih, b_hh, w_hr] as far as they exist for each "
                f"layer and direction, got {len(weights)} tensors"
            )
        w_ih, w_hh, *rest = weights
        w_hr = rest[-1] if projected else None
        b_ih, b_hh = [*rest[: len(rest) - projected], None, None][:2]
        return cls(w_ih, w_hh, b_ih, b_hh, w_hr)


def forward(
    spec: Spec,
    input: Tensor | PackedSequence,
    hx: State | None,
    weights: Sequence[Sequence[Tensor]],
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    return_all_states: bool = False,
) -> Any:
    """Runs a stack of layers; ``weights`` lists the tensors of each layer and direction.

    See :class:`rnnkernels.LSTM` for the arguments, shapes and errors.
    """
    if isinstance(input, PackedSequence):
        if lengths is not None:
            raise ValueError("lengths: a PackedSequence brings its own lengths; pass one of them")
        return _forward_packed(spec, input, hx, weights, reset, return_all_states)
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor or a PackedSequence, got {type(input).__name__}")
    if input.dim() not in (2, 3):
        raise ValueError(f"{spec.kind}: Expected input to be 2D or 3D, got {input.dim()}D instead")
    batched, batch_dim = input.dim() == 3, 0 if spec.batch_first and input.dim() == 3 else 1
    initial = None if hx is None else _checked_structure(spec, hx, 3 if batched else 2)
    if not batched:
        input = input.unsqueeze(1)
        initial = None if initial is None else [s.unsqueeze(1) for s in initial]
        reset = reset.unsqueeze(-1) if isinstance(reset, Tensor) else reset
        if isinstance(lengths, Tensor) and lengths.dim() == 0:
            lengths = lengths.unsqueeze(0)
    if reset is not None:
        reset = checks.reset(reset, tuple(input.shape[:2]), input.device)
    if batch_dim == 0:
        input = input.transpose(0, 1)
        reset = None if reset is None else reset.transpose(0, 1)
    y, states, all_states = _stack(spec, input, initial, weights, lengths, reset, return_all_states)

    def restore(t: Tensor) -> Tensor:
        if not batched:
            return t.squeeze(1)
        return t.transpose(0, 1) if batch_dim == 0 else t

    if not batched:
        states = [s.squeeze(1) for s in states]
    return _results(spec, restore(y), states, all_states, restore, return_all_states)


def _forward_packed(
    spec: Spec,
    input: PackedSequence,
    hx: State | None,
    weights: Sequence[Sequence[Tensor]],
    reset: Tensor | None,
    return_all_states: bool,
) -> Any:
    checks.packed(input)
    data, sizes, order, back = input
    if data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
    T, B = sizes.size(0), int(sizes[0])
    # Inside, rows stand in the order of the packed data: longest first.
    initial = None if hx is None else _checked_structure(spec, hx, 3)
    initial = _checked(spec, data, B, initial, weights)
    if hx is not None and order is not None:
        initial = [s.index_select(1, order) for s in initial]
    if reset is not None:
        reset = checks.reset(reset, (B, T) if spec.batch_first else (T, B), data.device)
        reset = reset.transpose(0, 1) if spec.batch_first else reset
        reset = reset if order is None else reset.index_select(1, order)
    packed = Packed.of_batch_sizes(sizes, data.device)
    shared = weights, return_all_states
    if data.size(0) == T * B:  # nobody is shorter than others
        outputs = _run(spec, data.view(T, B, -1), initial, NO_STEPS, reset, *shared)

        def restore(t: Tensor) -> PackedSequence:
            return PackedSequence(t.flatten(0, 1), sizes, order, back)

    elif _keeps_padding(spec):
        padded, _ = pad_packed_sequence(PackedSequence(data, sizes))
        outputs = _run(spec, padded, initial, Steps(packed.lengths), reset, *shared)

        def restore(t: Tensor) -> PackedSequence:
            values, _ = _VF._pack_padded_sequence(t, packed.lengths.cpu(), False)
            return PackedSequence(values, sizes, order, back)

    else:
        if reset is not None:
            reset, _ = _VF._pack_padded_sequence(reset, packed.lengths.cpu(), False)
        outputs = _run(spec, data, initial, Steps(*packed, packed.pad), reset, *shared)

        def restore(t: Tensor) -> PackedSequence:
            return PackedSequence(t, sizes, order, back)

    y, states, all_states = outputs
    if back is not None:
        states = [s.index_select(1, back) for s in states]
    return _results(spec, restore(y), states, all_states, restore, return_all_states)


def _keeps_padding(spec: Spec) -> bool:
    """Whether something needs all rows to be of one length: the overlapping windows of a pair."""
    return isinstance(spec.truncate, tuple)


def _results(
    spec: Spec,
    y: Any,
    states: list[Tensor],
    all_states: list[list[Tensor]],
    restore: Any,
    return_all_states: bool,
) -> Any:
    h_n = (states[0], states[1]) if spec.has_c else states[0]
    if not return_all_states:
        return y, h_n
    h, c = (tuple(restore(t) for t in kind) for kind in all_states)
    return y, h_n, AllStates(h, c if spec.has_c else None)


def _checked_structure(spec: Spec, hx: Any, dim: int) -> list[Tensor]:
    """hx as a list of states, after a check of its form and number of dimensions."""
    if spec.has_c:
        if isinstance(hx, Tensor) or not isinstance(hx, (tuple, list)) or len(hx) != 2:
            got = f"{len(hx)} values" if isinstance(hx, (tuple, list)) else type(hx).__name__
            raise TypeError(f"hx: expected a tuple of two tensors (h_0, c_0), got {got}")
        states, names = list(hx), "hx and cx"
    else:
        states, names = [hx], "hx"
    for s in states:
        if not isinstance(s, Tensor):
            raise TypeError(f"hx: expected a Tensor, got {type(s).__name__}")
        if s.dim() != dim:
            kind = "batched 3-D" if dim == 3 else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, {names} should also be {dim}-D but got {s.dim()}-D tensor"
            )
    return states


def _checked(
    spec: Spec, x: Tensor, B: int, hx: list[Tensor] | None, weights: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """The initial states, after a check of them and of the input [..., I] of B rows."""
    autocast = checks.autocast(x.device)
    checks.input_like_weight(x, weights[0][0], autocast)
    if x.size(-1) != spec.input_size:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {spec.input_size}, got {x.size(-1)}"
        )
    rows = spec.num_layers * spec.D, B
    widths = (spec.R, spec.hidden_size) if spec.has_c else (spec.R,)
    if hx is None:
        return [x.new_zeros(*rows, width) for width in widths]
    for slot, (s, width) in enumerate(zip(hx, widths, strict=True)):
        name = f"hidden[{slot}]" if spec.has_c else "hidden"
        message = f"Expected {name} size {{}}, got {{}}"
        checks.state(("hx", "cx")[slot], s, x, (*rows, width), message, autocast)
    return hx


def _stack(
    spec: Spec,
    x: Tensor,
    hx: list[Tensor] | None,
    weights: Sequence[Sequence[Tensor]],
    lengths: Any,
    reset: Tensor | None,
    return_all_states: bool,
) -> Outputs:
    """All layers over a batch: x [T, B, I], hx [L*D, B, R] and [L*D, B, H], reset [T, B]."""
    T, B = x.size(0), x.size(1)
    hx = _checked(spec, x, B, hx, weights)
    if lengths is not None:
        lengths = checks.lengths(lengths, T, B)
        total = int(lengths.sum()) if known(lengths) and not _keeps_padding(spec) else 0
        if 0 < total == T * B:
            lengths = None
        elif total > 0:
            rows = Rows(lengths, T, x.device)
            entering = [rows.enter(s) for s in hx]
            reset = None if reset is None else rows.pack(reset)
            packed = Steps(*rows.packed, rows.unpack)
            y, finals, everything = _run(
                spec, rows.pack(x), entering, packed, reset, weights, return_all_states
            )
            finals = [
                rows.leave(s.to(final.dtype), final) for s, final in zip(hx, finals, strict=True)
            ]
            everything = [[rows.unpack(t) for t in kind] for kind in everything]
            return Outputs(rows.unpack(y), finals, everything)
    steps = NO_STEPS if lengths is None else Steps(lengths.to(x.device))
    return _run(spec, x, hx, steps, reset, weights, return_all_states)


def _run(
    spec: Spec,
    x: Tensor,
    hx: list[Tensor],
    steps: Steps,
    reset: Tensor | None,
    weights: Sequence[Sequence[Tensor]],
    return_all_states: bool,
) -> Outputs:
    """The same after all checks, over padded or packed steps."""
    lengths = steps.lengths
    if checks.autocast(x.device):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, hx = ops.cast(x, dtype), [ops.cast(s, dtype) for s in hx]
        weights = [[ops.cast(w, dtype) for w in group] for group in weights]

    run = partial(_layers, spec, weights, steps)
    drop = partial(F.dropout, p=spec.dropout) if spec.drops else None
    backward = needs_gradient((x, *hx, *(w for group in weights for w in group)))
    if lengths is not None and steps.starts is None and backward:
        padding = torch.arange(x.size(0), device=x.device)[:, None] >= lengths  # [T, B]
        x = x.masked_fill(padding[:, :, None], 0)  # what stands there reaches no gradient
    if isinstance(spec.truncate, tuple) and backward:
        return truncation.overlapping(
            run, x, hx, lengths, reset, return_all_states, spec.truncate, drop
        )
    return run(x, hx, lengths, reset, return_all_states, lambda _, y: drop(y) if drop else y)


def _layers(
    spec: Spec,
    weights: Sequence[Sequence[Tensor]],
    steps: Steps,
    x: Tensor,
    hx: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    return_all_states: bool,
    dropout: Callable[[int, Tensor], Tensor],
) -> Outputs:
    """All layers, with ``dropout(layer, y)`` between them: at once where the backend offers that,
    else one after another."""
    D, L, shared = spec.D, spec.num_layers, (hx, lengths, steps, reset, return_all_states)
    call = _call(spec, weights, 0, x, *shared)
    at_once = None
    if L > 1 and spec.chained and (run_stack := backends.stack_runner(call, spec.backend)):
        calls = [call, *(_call(spec, weights, i, x, *shared) for i in range(1, L))]
        at_once = run_stack(calls, _masks(spec, x, dropout))

    finals: list[list[Tensor]] = [[], []]
    everything: list[list[Tensor]] = [[], []]
    for layer in range(L):
        if at_once is not None:
            result = at_once[layer]
        else:
            if layer > 0:
                call = _call(spec, weights, layer, x, *shared)
            result = backends.run(call, spec.backend)
        finals[0].append(result.h_n)
        if result.c_n is not None:
            finals[1].append(result.c_n)
        if return_all_states:
            everything[0].append(result.y.view(*result.y.shape[:-1], D, spec.R))
            if result.c is not None:
                everything[1].append(result.c)
        x = _merge(result.y, spec)
        if at_once is None and layer + 1 < L:
            x = dropout(layer, x)
    states = [torch.cat(parts) for parts in finals if parts]
    return Outputs(x, states, everything)


def _masks(spec: Spec, x: Tensor, dropout: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """What ``dropout`` multiplies the y of each layer but the last by, drawn as it would be there;
    none where nothing falls out."""
    if not spec.drops:
        return []
    ones = x.new_ones(*x.shape[:-1], spec.hidden_size)  # like any y
    return [dropout(layer, ones) for layer in range(spec.num_layers - 1)]


def _call(
    spec: Spec,
    weights: Sequence[Sequence[Tensor]],
    layer: int,
    x: Tensor,
    hx: list[Tensor],
    lengths: Tensor | None,
    steps: Steps,
    reset: Tensor | None,
    return_all_states: bool,
) -> Call:
    """What one layer of a stack is asked to do."""
    D = spec.D
    rows_of_layer = slice(layer * D, (layer + 1) * D)
    directions = [
        LayerWeights.from_list(group, spec.proj_size > 0) for group in weights[rows_of_layer]
    ]
    return Call(
        spec.cell,
        x,
        [w.w_ih for w in directions],
        [w.w_hh for w in directions],
        [w.b_ih for w in directions if w.b_ih is not None],
        [w.b_hh for w in directions if w.b_hh is not None],
        [w.w_hr for w in directions if w.w_hr is not None],
        hx[0][rows_of_layer],
        hx[1][rows_of_layer] if spec.has_c else None,
        lengths,
        reset,
        all_c=return_all_states,
        layer=layer,
        window=spec.truncate if isinstance(spec.truncate, int) else 0,
        clip=spec.grad_clip,
        stack=spec.num_layers if spec.chained else 1,
        starts=steps.starts,
        padded=steps.padded,
    )


def _merge(y: Tensor, spec: Spec) -> Tensor:
    """Both directions of y [T, B, D*R] as one output."""
    if spec.merge_mode == "concat" or not spec.bidirectional:
        return y
    forward, reverse = y.chunk(2, dim=-1)
    if spec.merge_mode == "mul":
        return forward * reverse
    total = forward + reverse
    return total if spec.merge_mode == "sum" else total / 2
