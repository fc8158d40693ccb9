"""Everything above a single layer, once for all cells: stacks, directions, dropout, batch_first,
unbatched input, packed and padded sequences, checks of what the user passed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import _VF, Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from rnnkernels import _backends, _ops
from rnnkernels._core import checks, truncation
from rnnkernels._core.call import Call, Result, differentiates
from rnnkernels._core.compiling import left_alone
from rnnkernels._core.packing import Jagged, Packed, Rows, known
from rnnkernels._core.truncation import Outputs
from rnnkernels.functional import _dropout, _normed, _sharded
from rnnkernels.functional._noise import Noise, cell_of
from rnnkernels.functional._spec import (
    AllStates,
    Spec,
    State,
    apart_by_heads,
    each_beside_h,
    each_state,
    given_states,
    side_by_side,
    zeros,
)


class Steps(NamedTuple):
    """Which steps the rows have; see :class:`rnnkernels._core.call.Call`."""

    lengths: Tensor | None = None
    starts: Tensor | None = None
    padded: Callable[[Tensor], Tensor] | None = None
    rows: Tensor | None = None  # [B]: their numbers in the user's batch; None: in order


NO_STEPS = Steps()


def forward(
    spec: Spec,
    input: Tensor | PackedSequence,
    hx: State | None,
    weights: Sequence[Tensor],
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Any = None,
    return_all_states: bool = False,
) -> Any:
    """Runs a stack of layers; ``weights`` are those of all layers and directions, in torch's order.

    See :class:`rnnkernels.LSTM` for the arguments, shapes and errors.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    if isinstance(data, Tensor) and not isinstance(reset, (Tensor, type(None))):
        reset = checks.as_marks(reset, data.device)
    options: dict[str, Any] = {"reset": reset, "return_all_states": return_all_states}
    if _sharded.involved((data, *weights)):
        return _sharded.forward(forward, spec, input, hx, weights, lengths=lengths, **options)
    if isinstance(input, Tensor) and input.is_nested:
        checks.jagged(input, spec.batch_first, lengths)
        return _forward_jagged(spec, input, hx, weights, **options)
    if isinstance(input, PackedSequence):
        if lengths is not None:
            raise ValueError("lengths: a PackedSequence brings its own lengths; pass one of them")
        return _forward_packed(spec, input, hx, weights, reset, return_all_states)
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor or a PackedSequence, got {type(input).__name__}")
    checks.dense("input", input)
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
    weights: Sequence[Tensor],
    reset: Tensor | None,
    return_all_states: bool,
) -> Any:
    compiled = torch.compiler.is_compiling()  # then nobody can look at values
    if not compiled:
        checks.packed(input)
    data, sizes, order, back = input
    if data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
    T, B = sizes.size(0), _rows(sizes, order, hx) if compiled else int(sizes[0])
    # Inside, rows stand in the order of the packed data: longest first.
    initial = None if hx is None else _checked_structure(spec, hx, 3)
    initial = _checked(spec, data, B, initial, weights)
    if hx is not None and order is not None:
        initial = [s.index_select(1, order) for s in initial]
    if reset is not None:
        reset = checks.reset(reset, (B, T) if spec.batch_first else (T, B), data.device)
        reset = reset.transpose(0, 1) if spec.batch_first else reset
        reset = reset if order is None else reset.index_select(1, order)
    packed = Packed.of_batch_sizes(sizes, B, data.device)
    shared = weights, return_all_states
    if not compiled and data.size(0) == T * B:  # nobody is shorter than others
        outputs = _run(spec, data.view(T, B, -1), initial, Steps(rows=order), reset, *shared)

        def restore(t: Tensor) -> PackedSequence:
            return PackedSequence(t.flatten(0, 1), sizes, order, back)

    elif _keeps_padding(spec):
        padded, _ = pad_packed_sequence(PackedSequence(data, sizes))
        steps = Steps(packed.lengths, rows=order)
        outputs = _run(spec, padded, initial, steps, reset, *shared)

        def restore(t: Tensor) -> PackedSequence:
            values, _ = _VF._pack_padded_sequence(t, packed.lengths.cpu(), False)
            return PackedSequence(values, sizes, order, back)

    else:
        if reset is not None:
            reset, _ = _VF._pack_padded_sequence(reset, packed.lengths.cpu(), False)
        outputs = _run(spec, data, initial, Steps(*packed, packed.pad, order), reset, *shared)

        def restore(t: Tensor) -> PackedSequence:
            return PackedSequence(t, sizes, order, back)

    y, states, all_states = outputs
    if back is not None:
        states = [s.index_select(1, back) for s in states]
    return _results(spec, restore(y), states, all_states, restore, return_all_states)


def _rows(sizes: Tensor, order: Tensor | None, hx: State | None) -> int:
    """Those of packed data, as a size where something has it: a value breaks graphs."""
    if order is not None:
        return order.size(0)
    if hx is not None:
        return (hx if isinstance(hx, Tensor) else hx[0]).size(1)
    return int(sizes[0])


# Compilers leave it alone: the layout follows from the values of the offsets.
@left_alone
def _forward_jagged(
    spec: Spec,
    input: Any,
    hx: State | None,
    weights: Sequence[Tensor],
    *,
    reset: Tensor | None,
    return_all_states: bool,
) -> Any:
    """A nested tensor [B, j, I], whose offsets are the lengths."""
    offsets, data, B = input.offsets(), input.values(), input.size(0)
    initial = None if hx is None else _checked_structure(spec, hx, 3)
    initial = _checked(spec, data, B, initial, weights)
    marks = None if reset is None else checks.jagged_reset(reset, input)
    lengths = offsets.cpu().diff()  # whose values another device is waited for
    least, most = (int(n) for n in lengths.aminmax()) if B else (0, 0)
    shared = weights, return_all_states
    if data.size(0) == 0:
        outputs = _run(spec, data.view(0, B, data.size(1)), initial, NO_STEPS, None, *shared)

        def leave(t: Tensor) -> Tensor:
            return t.flatten(0, 1)

    elif _keeps_padding(spec):
        rows = Jagged(lengths, data.device)
        marks = None if marks is None else rows.pad(marks)
        steps = Steps(lengths.to(data.device))
        outputs = _run(spec, rows.pad(data), initial, steps, marks, *shared)
        leave = rows.leave_padding
    else:
        rows = Jagged(lengths, data.device)
        outputs = _packed(spec, rows, data, initial, marks, *shared)

        def leave(t: Tensor) -> Tensor:
            return t

    def restore(t: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(
            leave(t), offsets, min_seqlen=least, max_seqlen=most
        )

    y, states, all_states = outputs
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
    h_n = each_state(spec.cell, states, spec.heads)
    if not return_all_states:
        return y, h_n

    def shown(t: Tensor) -> Any:
        """A state of every step, of all heads [.., D, H]."""
        if spec.heads > 1:
            t = t.reshape(*t.shape[:-2], spec.D, spec.heads * t.size(-1))
        return restore(t)

    h, others = all_states
    c: list[Any] = [[shown(s) for s in each_beside_h(t, spec.C)] for t in others]
    c = [each[0] if spec.C == 1 else tuple(each) for each in c]
    return y, h_n, AllStates(tuple(map(shown, h)), tuple(c) if spec.C else None)


def _checked_structure(spec: Spec, hx: Any, dim: int) -> list[Tensor]:
    """hx as a list of states, after a check of its form and number of dimensions."""
    states = given_states(spec.cell, hx)
    names = ("hx", "hx and cx", "all of hx")[min(spec.C, 2)]
    for s in states:
        if not isinstance(s, Tensor):
            raise TypeError(f"hx: expected a Tensor, got {type(s).__name__}")
        checks.dense("hx", s)
        if s.dim() != dim:
            kind = "batched 3-D" if dim == 3 else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, {names} should also be {dim}-D but got {s.dim()}-D tensor"
            )
    return states


def _checked(
    spec: Spec, x: Tensor, B: int, hx: list[Tensor] | None, weights: Sequence[Tensor]
) -> list[Tensor]:
    """The initial states as calls take them, after a check of them and of the input [..., I] of B
    rows."""
    autocast = checks.autocast(x.device)
    checks.input_like_weight(x, weights[0], autocast)
    if x.size(-1) != spec.input_size:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {spec.input_size}, got {x.size(-1)}"
        )
    rows = spec.num_layers * spec.D, B
    H = spec.hidden_size
    if hx is None:
        rows, widths = (rows[0] * spec.heads, B), (spec.R, spec.C * H)[: 1 + (spec.C > 0)]
        return [zeros(x, *rows, n // spec.heads) for n in widths]
    for slot, (s, width) in enumerate(zip(hx, (spec.R, *[H] * spec.C), strict=True)):
        name = f"hidden[{slot}]" if spec.C else "hidden"
        message = f"Expected {name} size {{}}, got {{}}"
        argument = f"hx[{slot}]" if spec.C > 1 else ("hx", "cx")[slot]
        checks.state(argument, s, x, (*rows, width), message, autocast)
    return side_by_side([apart_by_heads(s, spec.heads) for s in hx])


def _stack(
    spec: Spec,
    x: Tensor,
    hx: list[Tensor] | None,
    weights: Sequence[Tensor],
    lengths: Any,
    reset: Tensor | None,
    return_all_states: bool,
) -> Outputs:
    """All layers over a batch: x [T, B, I], hx [L*D, B, R] and others [L*D, B, H], reset [T, B]."""
    T, B = x.size(0), x.size(1)
    hx = _checked(spec, x, B, hx, weights)
    if lengths is not None:
        lengths = checks.lengths(lengths, T, B, x.device)
        total = int(lengths.sum()) if known(lengths) else 0
        if 0 < total == T * B:
            lengths = None
        elif total > 0 and not _keeps_padding(spec):
            rows = Rows(lengths, T, x.device)
            return _packed(spec, rows, x, hx, reset, weights, return_all_states)
    steps = NO_STEPS if lengths is None else Steps(lengths.to(x.device))
    return _run(spec, x, hx, steps, reset, weights, return_all_states)


def _packed(
    spec: Spec,
    rows: Rows | Jagged,
    x: Tensor,
    hx: list[Tensor],
    reset: Tensor | None,
    weights: Sequence[Tensor],
    return_all_states: bool,
) -> Outputs:
    """The same after all checks, over the steps that rows have."""
    entering = [rows.enter(s) for s in hx]
    reset = None if reset is None else rows.pack(reset)
    y, finals, everything = _run(
        spec,
        rows.pack(x),
        entering,
        Steps(*rows.packed, rows.padded, rows.order),
        reset,
        weights,
        return_all_states,
    )
    finals = [rows.leave(s.to(final.dtype), final) for s, final in zip(hx, finals, strict=True)]
    return Outputs(rows.unpack(y), finals, [[rows.unpack(t) for t in kind] for kind in everything])


def _run(
    spec: Spec,
    x: Tensor,
    hx: list[Tensor],
    steps: Steps,
    reset: Tensor | None,
    weights: Sequence[Tensor],
    return_all_states: bool,
) -> Outputs:
    """The same after all checks, over padded or packed steps."""
    lengths = steps.lengths
    weights = _dropout.weights(spec, weights)
    if checks.autocast(x.device):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, hx = _ops.cast(x, dtype), [_ops.cast(s, dtype) for s in hx]
        weights = [_ops.cast(w, dtype) for w in weights]

    differentiated = differentiates((x, *hx, *weights))
    if lengths is not None and steps.starts is None and differentiated:
        padding = torch.arange(x.size(0), device=x.device)[:, None] >= lengths  # [T, B]
        x = x.masked_fill(padding[:, :, None], 0)  # what stands there reaches no gradient

    cell = cell_of(spec.cell, tuple(p > 0 for p in spec.zoneout))
    noise, draws = Noise(spec.noise, spec.zoneout, spec.training).of_call(
        x, hx[0].size(1), steps.rows
    )

    def layers(
        x: Tensor,
        hx: list[Tensor],
        lengths: Tensor | None,
        reset: Tensor | None,
        return_all_states: bool,
        masks: list[Tensor],
        h_mask: Tensor | None,
        draws: Tensor | None,
    ) -> Outputs:
        call = Call(
            cell,
            layers=spec.num_layers,
            directions=spec.D,
            heads=spec.heads,
            projected=spec.proj_size > 0,
            merge_mode=spec.merge_mode,
            window=spec.truncate if isinstance(spec.truncate, int) else 0,
            clip=spec.grad_clip.kind,
            bound=spec.grad_clip.bound,
            x=x,
            weights=weights,
            h0=hx[0],
            c0=hx[1] if spec.C else None,
            masks=masks or None,
            h_mask=h_mask,
            lengths=lengths,
            starts=steps.starts,
            reset=reset,
            noise=noise,
            draws=draws,
            all_states=return_all_states,
            padded=steps.padded,
            recompute=spec.recompute,
        )

        def run(call: Call) -> Result:
            return _backends.run(call, spec.backend)

        result = _normed.run(call, run) if spec.layer_norm else run(call)
        finals = [result.h_n] if result.c_n is None else [result.h_n, result.c_n]
        return Outputs(result.y, finals, [result.h or [], result.c or []])

    x, masks = _dropout.inputs(spec, x, hx[0], steps.starts)
    h_mask = _dropout.recurrent(spec, hx[0])
    if isinstance(spec.truncate, tuple) and differentiated:
        return truncation.overlapping(
            layers, x, hx, lengths, reset, return_all_states, spec.truncate, masks, h_mask, draws
        )
    return layers(x, hx, lengths, reset, return_all_states, masks, h_mask, draws)
